"""Which model is loaded: read from a folder with true progress, and spoken to through its chat template.

It reads safetensors only and runs no code from the folder. It does not know sessions or learning.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

from ..errors import Invalid, LoadFailed
from ..messages import Loaded, Progress, Prompt
from .adapters import Slots

READING, PLACING = (
    0.15,
    0.85,
)  # where these stages begin and end as a fraction of a load; reading takes the bulk

PROGRESS_SECONDS = 0.05


@dataclass
class LoadedModel:
    """A model in memory with what it needs to be spoken to."""

    model: Any
    tokenizer: Any
    slots: Slots
    ends: frozenset[int]
    about: Loaded

    def prompt_tokens(self, prompt: Prompt, room: int, context_length: int) -> list[int]:
        """The tokens of a prompt in the model's chat template, or as plain text where it has none.

        Raises Invalid when the prompt leaves no room for `room` more tokens in the context.
        """
        if self.tokenizer.chat_template:
            system = [{"role": "system", "content": prompt.system}] if prompt.system else []
            turns = [*system, {"role": "user", "content": prompt.text}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text = f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text
            tokens = self.tokenizer(text)["input_ids"]
        limit = min(context_length, getattr(self.model.config, "max_position_embeddings", None) or context_length)
        if len(tokens) + room > limit:
            raise Invalid(
                f"The prompt has {len(tokens)} tokens; with answers of up to {room} it does not fit into the "
                f"context of {limit}.",
                code="prompt_too_long",
                field="prompt",
                next_step="Shorten the prompt, allow shorter answers, or use a longer context.",
            )
        return list(tokens)

    def answer_tokens(self, text: str) -> list[int]:
        """A written answer as tokens, closed by the end token so that the model learns to stop there."""
        tokens = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*tokens, self.end_token] if self.end_token is not None else tokens

    @property
    def end_token(self) -> int | None:
        own = self.tokenizer.eos_token_id
        return own if own is not None else min(self.ends, default=None)


def read_model(path: Path) -> Generator[Progress | None, None, LoadedModel]:
    """Load a folder: yields progress of true bytes and tensors, returns the model.

    Raises LoadFailed with the code of what went wrong and a way out.
    """
    started = time.monotonic()
    yield Progress(stage="initializing", fraction=0.02, message="Looking at the folder")
    files = _weight_files(path)
    config, tokenizer = _read_config(path)
    yield Progress(stage="initializing", fraction=READING, message="Reading the weights")
    total = sum(file.stat().st_size for file in files)
    state: dict[str, Tensor] = {}
    done = 0
    begun = told = time.monotonic()
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    state[name] = tensors.get_tensor(name)
                    digest.update(name.encode())
                    digest.update(_sample(state[name]))
                    done += state[name].nbytes
                    now = time.monotonic()
                    if now - told < PROGRESS_SECONDS and told > begun:
                        yield None
                        continue
                    told, seconds = now, max(now - begun, 1e-6)
                    yield Progress(
                        stage="reading",
                        fraction=READING + (PLACING - READING) * min(done / total, 1.0),
                        message=f"Reading {file.name}",
                        bytes=done,
                        total_bytes=total,
                        rate=done / seconds,
                        seconds_left=max(total - done, 0) * seconds / done if done else None,
                    )
        except SafetensorError as error:
            raise LoadFailed(
                f"The file “{file.name}” is not a whole safetensors file: {error}",
                code="corrupt_file",
                next_step="Copy or download the file again.",
            ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield Progress(stage="placing", fraction=PLACING, message=f"Placing {len(state)} tensors on the {device}")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = _place(config, state, dtype).to(device)
    model.requires_grad_(False)
    yield Progress(stage="warming_up", fraction=0.92, message="Warming up")
    with torch.inference_mode():
        model(input_ids=torch.zeros((1, 8), dtype=torch.long, device=device), use_cache=False)
    about = Loaded(
        fingerprint=digest.hexdigest()[:32],
        parameters=sum(p.numel() for p in model.parameters()),
        architecture=type(model).__name__,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        bytes=sum(p.nbytes for p in model.parameters()),
        seconds=time.monotonic() - started,
    )
    return LoadedModel(model, tokenizer, Slots(model), _ends(model, tokenizer), about)


def _weight_files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise LoadFailed(
            f"There is no folder “{path}”.",
            code="not_found",
            next_step="Check the name, or choose another model.",
        )
    try:
        files = sorted(path.glob("*.safetensors"))
        list(path.iterdir())
    except PermissionError:
        raise LoadFailed(
            f"The folder “{path}” may not be read.",
            code="permission_denied",
            next_step="Give the studio's user the right to read it.",
        ) from None
    if not files or not (path / "config.json").is_file():
        missing = "config.json" if files else "*.safetensors"
        raise LoadFailed(
            f"The folder “{path}” has no {missing}.",
            code="not_found",
            next_step="Choose a folder with a Hugging Face config and safetensors files.",
        )
    return files


def _read_config(path: Path) -> tuple[Any, Any]:
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, json.JSONDecodeError) as error:
        code = "unsupported_architecture" if "model type" in str(error) else "corrupt_file"
        raise LoadFailed(
            f"The model's configuration could not be used: {str(error).splitlines()[0]}",
            code=code,
            next_step="Check config.json and the tokenizer's files, or choose another model.",
        ) from None
    return config, tokenizer


def _place(config: Any, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    try:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, info = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    except (ValueError, KeyError, RuntimeError) as error:
        raise LoadFailed(
            f"The architecture “{config.model_type}” could not be loaded: {str(error).splitlines()[0]}",
            code="unsupported_architecture",
            next_step="Choose a causal language model.",
        ) from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise LoadFailed(
            f"{len(missing)} tensors are missing from the model's files, the first is “{missing[0]}”.",
            code="corrupt_file",
            next_step="Copy or download the model again.",
        )
    return model.eval()


def _sample(tensor: Tensor, pieces: int = 16) -> bytes:
    """Some values from all over a tensor: enough to tell two models apart without hashing gigabytes."""
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // (pieces * 16))].float().numpy().tobytes()


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the model's own list, and the tokenizer's."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    tokens = listed if isinstance(listed, list) else [listed]
    return frozenset(token for token in [*tokens, tokenizer.eos_token_id] if token is not None)
