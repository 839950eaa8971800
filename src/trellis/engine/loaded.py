"""Which model is loaded: read from a folder with true progress, and spoken to through its chat template.

It reads safetensors only, and runs no code from the folder unless that was agreed to. It does not know sessions
or learning.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from ..errors import Invalid, LoadFailed
from ..memory import estimate, shape_of
from ..messages import Chat, Load, Loaded, Progress, Prompt, TemplateKwargs, Turn
from ..params import Precision, SessionConfig
from ..tensors import UNREADABLE, shapes_in
from .adapters import Slots
from .chats import Prepared, too_long
from .crew import Crew
from .lean import Lean
from .reading import SMALL

INITIALIZING, READING, PARSING, PLACING, WARMING = 0.11, 0.15, 0.78, 0.8, 0.95
"""Where these stages begin as a fraction of a load; reading takes the bulk."""

PROGRESS_SECONDS = 0.05

LANES = 4
"""So many requests at most are worked on at once, each on its own thread, where one does not keep all cores busy."""

INDEX = "model.safetensors.index.json"

UNKNOWN_POSITIONS = 8192
"""What a conversation may take of a model that does not say how far it looks back."""

SPEAKS = {"system": "", "user": "\n\nUser: ", "assistant": "\n\nAssistant: "}
"""How a conversation is put to a model without a chat template."""


@dataclass
class LoadedModel:
    """A model in memory with what it needs to be spoken to."""

    model: Any
    tokenizer: Any
    slots: Slots
    lean: Lean | None
    ends: frozenset[int]
    about: Loaded

    def prompt_tokens(self, prompt: Prompt, room: int, context_length: int) -> list[int]:
        """The tokens of a prompt in the model's chat template, or as plain text where it has none or it is off.

        Raises Invalid when the prompt leaves no room for `room` more tokens in the context.
        """
        if self.tokenizer.chat_template and prompt.template:
            tokens = self.tokenizer(self._in_template(prompt) + prompt.opening, add_special_tokens=False)["input_ids"]
        else:
            text = f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text
            tokens = self._text_tokens(text + prompt.opening)
        limit = min(context_length, positions_of(self.model.config) or context_length)
        if len(tokens) + room > limit:
            raise Invalid(
                f"The prompt has {len(tokens)} tokens; with answers of up to {room} it does not fit into the "
                f"context of {limit}.",
                code="prompt_too_long",
                field="prompt",
                next_step="Shorten the prompt, allow shorter answers, or use a longer context.",
            )
        return list(tokens)

    def conversation(self, request: Chat) -> Prepared:
        """A conversation as tokens, without its oldest turns where it may be trimmed and does not fit. Raises Invalid.

        A quarter of the context, or the longest answer where that is less, is kept free for the answer.
        """
        limit = positions_of(self.model.config) or UNKNOWN_POSITIONS
        most = request.sampling.max_new_tokens
        room = min(most, limit // 4) if request.trims else 1
        stop = request.stop
        if not request.turns:
            tokens = self._text_tokens(request.text)
        elif self.tokenizer.chat_template:
            tokens = self._turn_tokens(request.turns, request.template_kwargs)
        else:
            tokens, stop = self._turn_tokens(request.turns, {}), (*stop, SPEAKS["user"])
        left_out = 0
        if len(tokens) + room > limit:
            if not request.trims or not request.turns:
                raise too_long(len(tokens), limit)
            tokens, left_out = self._trimmed(request.turns, request.template_kwargs, limit - room, len(tokens))
        return Prepared(tokens, left_out, limit, most, stop)

    def _trimmed(
        self, turns: Sequence[Turn], template_kwargs: TemplateKwargs, most: int, whole: int
    ) -> tuple[list[int], int]:
        """The longest end of a conversation that fits, after what the system said, and how many turns it leaves out."""
        said = [turn for turn in turns if turn.role == "system"]
        rest = [turn for turn in turns if turn.role != "system"]
        last = max((place for place, turn in enumerate(rest) if turn.role == "user"), default=0)
        beginnings = [place for place, turn in enumerate(rest[: last + 1]) if turn.role == "user" and place] or [0]
        low, high = 0, len(beginnings) - 1
        best: tuple[list[int], int] | None = None
        while low <= high:
            middle = (low + high) // 2
            tokens = self._turn_tokens([*said, *rest[beginnings[middle] :]], template_kwargs)
            if len(tokens) <= most:
                best, high = (tokens, beginnings[middle]), middle - 1
            else:
                low, whole = middle + 1, len(tokens)
        if best is None:
            raise too_long(whole, most)
        return best

    def _turn_tokens(self, turns: Sequence[Turn], template_kwargs: TemplateKwargs) -> list[int]:
        opening = turns[-1].text if turns[-1].role == "assistant" else ""
        if opening and len(turns) == 1:
            raise Invalid(
                "Nothing was said before the answer that is to be gone on with.", field="messages",
                next_step="Begin with a message of the user.",
            )  # fmt: skip
        said = [{"role": turn.role, "content": turn.text} for turn in (turns[:-1] if opening else turns)]
        if not self.tokenizer.chat_template:
            lines = [f"{SPEAKS[each['role']]}{each['content']}" for each in said]
            return self._text_tokens("".join(lines).lstrip() + SPEAKS["assistant"].rstrip(" ") + opening)
        text = self._in_words_of_the_model(said, template_kwargs, "messages") + opening
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text_tokens(self, text: str) -> list[int]:
        """Plain text as tokens, at least one."""
        tokens = list(self.tokenizer(text)["input_ids"])
        if len(tokens) > 1 and tokens[-1] in self.ends:  # some tokenizers close every text
            tokens = tokens[:-1]
        return tokens or [self.tokenizer.bos_token_id or self.end_token or 0]

    def answer_tokens(self, text: str, ended: bool = True) -> list[int]:
        """An answer as tokens; with the end token where it ended by itself, so that the model learns to stop."""
        tokens = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*tokens, self.end_token] if ended and self.end_token is not None else tokens

    @property
    def end_token(self) -> int | None:
        own = self.tokenizer.eos_token_id
        return own if own is not None else min(self.ends, default=None)

    def _in_template(self, prompt: Prompt) -> str:
        """The prompt as the model's own template writes it (in transformers' sandbox). Raises Invalid."""
        turns = [{"role": "user", "content": prompt.text}]
        if prompt.system:
            turns = [{"role": "system", "content": prompt.system}, *turns]
        return self._in_words_of_the_model(turns, prompt.template_kwargs, "prompt")

    def _in_words_of_the_model(self, turns: list[dict[str, str]], template_kwargs: TemplateKwargs, field: str) -> str:
        """A conversation as the model's own template writes it. Raises Invalid, which names where it came from."""
        try:
            return self._written_somehow(turns, template_kwargs)
        except TemplateError as error:
            raise Invalid(
                f"The model's chat template could not write this: {error}",
                code="bad_template",
                field=field,
                next_step="Turn the chat template off where there is a choice, or use another model.",
            ) from None

    def _written_somehow(self, turns: list[dict[str, str]], template_kwargs: TemplateKwargs) -> str:
        """Gemma's template, for one, knows no system role: what it would say is said by the user then."""
        try:
            return self._written(turns, template_kwargs)
        except TemplateError:
            return self._written(by_turns(turns), template_kwargs)

    def _written(self, turns: list[dict[str, str]], template_kwargs: TemplateKwargs) -> str:
        written = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
        assert isinstance(written, str)
        return written


def by_turns(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """A conversation in which user and assistant speak by turns, and what the system said comes first from the user."""
    told: list[dict[str, str]] = []
    for turn in turns:
        role = "user" if turn["role"] == "system" else turn["role"]
        if told and told[-1]["role"] == role:
            told[-1] = {"role": role, "content": f"{told[-1]['content']}\n\n{turn['content']}"}
        else:
            told.append({"role": role, "content": turn["content"]})
    return told


def read_model(
    path: Path, request: Load, own: torch.dtype | None = None
) -> Generator[Progress | None, None, LoadedModel]:
    """Load a folder: yields progress of true bytes and tensors, returns the model. `own` is a precision to keep
    instead of the one that the request names.

    Raises LoadFailed with the code of what went wrong and a way out.
    """
    started = time.monotonic()
    yield Progress(stage="initializing", fraction=INITIALIZING, message="Reading the configuration")
    files = _weight_files(path)
    config, tokenizer = _read_config(path, request.remote_code)
    device = device_for(request)
    precision = precision_for(request.precision, device)
    if precision in ("8-bit", "4-bit"):
        _require_bitsandbytes(precision)
    dtype = torch.float32 if precision == "32-bit" or (device == "cpu" and precision != "16-bit") else torch.bfloat16
    dtype = own or dtype
    digest = _digest(path, precision)
    state = yield from _read_tensors(files, dtype, digest)
    yield Progress(stage="parsing", fraction=PARSING, message=f"Putting {len(state)} tensors into their places")
    if precision in ("8-bit", "4-bit"):
        yield Progress(stage="quantizing", fraction=PLACING, message=f"Rounding the linear layers to {precision}")
    model = _build(path, config, state, dtype, precision, device, request)
    del state
    model.requires_grad_(False)
    if precision in ("32-bit", "16-bit"):
        yield from _move(model, device)
    yield Progress(stage="warming_up", fraction=WARMING, message="Warming up")
    _warm_up(model, device, precision)
    lean, lanes = Lean.of(model), 1
    if device == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL:
        lanes = min(LANES, torch.get_num_threads()) if lean else 1
        torch.set_num_threads(1)
    slots = Slots(model, lean, Crew(lanes))
    if lean is None:  # the lean pass is known to be right
        _require_causal(slots)
    tokenizer("Once, so that nothing in it changes when several threads read with it.")
    about = Loaded(
        fingerprint=digest.hexdigest()[:32],
        parameters=sum(p.numel() for p in model.parameters()),
        architecture=type(model).__name__,
        device=device,
        dtype=precision if precision in ("8-bit", "4-bit") else str(dtype).removeprefix("torch."),
        bytes=sum(p.nbytes for p in model.parameters()),
        seconds=time.monotonic() - started,
        has_template=bool(tokenizer.chat_template),
        positions=positions_of(config),
        lanes=lanes,
    )
    return LoadedModel(model, tokenizer, slots, lean, _ends(path, config, tokenizer), about)


def _warm_up(model: Any, device: str, precision: Precision) -> None:
    """Read a few tokens. Raises LoadFailed where the model cannot."""
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, 8), dtype=torch.long, device=device), use_cache=False)
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        if "memory" in str(error).lower():
            raise
        if precision in ("8-bit", "4-bit"):
            raise LoadFailed(
                f"The model cannot read a text in {precision}, as it is where a model uses the weights of some layers "
                f"directly: {_first_line(error)}",
                code="unsupported_architecture",
                field="precision",
                next_step="Choose 16-bit or 32-bit.",
            ) from None
        raise LoadFailed(
            f"The model was loaded and cannot read a text: {_first_line(error)}",
            code="unsupported_architecture",
            next_step="Choose a causal language model that needs nothing but text.",
        ) from None


def _require_causal(slots: Slots) -> None:
    """Find out how the model goes on with a text. Raises LoadFailed for one that fills gaps instead."""
    if not slots.caching.causal:
        raise LoadFailed(
            "This model reads a text in both directions, as models that fill gaps do, and cannot go on with one.",
            code="unsupported_architecture",
            next_step="Choose a causal language model, such as a chat model.",
        )


def _digest(path: Path, precision: Precision) -> Any:
    """Where a fingerprint begins: what is grown on rounded weights is not the same."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    if precision != "32-bit":
        digest.update(precision.encode())
    return digest


def fingerprints(path: Path) -> list[str]:
    """The fingerprints that a folder has in each precision. Raises LoadFailed."""
    digests = [_digest(path, precision) for precision in ("32-bit", "16-bit", "8-bit", "4-bit")]
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    sampled = _sample(tensors.get_tensor(name))
                    for digest in digests:
                        digest.update(name.encode())
                        digest.update(sampled)
        except SafetensorError as error:
            raise _torn(file, error) from None
    return [digest.hexdigest()[:32] for digest in digests]


def _torn(file: Path, error: Exception) -> LoadFailed:
    return LoadFailed(
        f"The file “{file.name}” is not a whole safetensors file: {error}",
        code="corrupt_file",
        next_step="Copy or download the file again.",
    )


def device_for(request: Load) -> str:
    """The device to load on. Raises LoadFailed for one that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if request.device == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there[request.device]:
        raise LoadFailed(
            f"There is no device “{request.device}” here.",
            code="not_found",
            field="device",
            next_step="Choose “auto” or “cpu”; `trellis doctor` says what there is.",
        )
    return request.device


def precision_for(wanted: Precision, device: str) -> Precision:
    if wanted == "auto":
        return "32-bit" if device == "cpu" else "16-bit"
    return wanted


def positions_of(config: Any) -> int | None:
    """How many tokens a model can look back on, where its configuration says so."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model: those that its index names, or its one file, or all there are."""
    index = path / INDEX
    if index.is_file():
        named = json.loads(index.read_text())["weight_map"].values()
        return [path / name for name in sorted(set(named)) if "/" not in name]
    single = path / "model.safetensors"
    return [single] if single.is_file() else sorted(path.glob("*.safetensors"))


def _weight_files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise LoadFailed(
            f"There is no folder “{path}”.",
            code="not_found",
            next_step="Check the name, or choose another model.",
        )
    try:
        list(path.iterdir())
        files = weight_files(path)
    except PermissionError:
        raise LoadFailed(
            f"The folder “{path}” may not be read.",
            code="permission_denied",
            next_step="Give the studio's user the right to read it.",
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise LoadFailed(
            f"The file “{INDEX}” cannot be read.",
            code="corrupt_file",
            next_step="Copy or download it again.",
        ) from None
    absent = [file.name for file in files if not file.is_file()]
    if not files or absent or not (path / "config.json").is_file():
        missing = "*.safetensors" if not files else absent[0] if absent else "config.json"
        raise LoadFailed(
            f"The folder “{path}” has no {missing}.",
            code="not_found",
            next_step="Choose a folder with a Hugging Face config and safetensors files.",
        )
    for file in files:
        try:
            file.open("rb").close()  # the library that reads them says of a file without rights that it is not there
        except PermissionError as error:
            raise _not_readable(error) from None
    return files


def _read_config(path: Path, remote_code: bool) -> tuple[Any, Any]:
    try:
        about = json.loads((path / "config.json").read_text())
        wants_code = "auto_map" in about and about.get("model_type") not in CONFIG_MAPPING
    except PermissionError as error:
        raise _not_readable(error) from None
    except (ValueError, OSError, AttributeError, TypeError):
        wants_code = False
    if wants_code and not remote_code:
        raise LoadFailed(
            "This model brings Python code of its own, which would run on this computer with your rights.",
            code="remote_code_refused",
            next_step="Read that code. If you trust it, pin the revision to the commit you read and turn on "
            "“Run the model's own code”; or choose a model that needs none.",
        )
    try:
        options = {"local_files_only": True, "trust_remote_code": remote_code and wants_code}
        config = AutoConfig.from_pretrained(path, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except PermissionError as error:
        raise _not_readable(error) from None
    except (ValueError, KeyError, OSError, TypeError, AttributeError, ImportError) as error:
        code = "unsupported_architecture" if "model type" in str(error) else "corrupt_file"
        raise LoadFailed(
            f"The model's configuration could not be used: {_first_line(error)}",
            code=code,
            next_step="Update transformers if the architecture is new, or choose another model."
            if code == "unsupported_architecture"
            else "Check config.json and the tokenizer's files, or copy them again.",
        ) from None
    return config, tokenizer


def _not_readable(error: PermissionError) -> LoadFailed:
    return LoadFailed(
        f"The file “{error.filename}” may not be read.",
        code="permission_denied",
        next_step="Give the studio's user the right to read it.",
    )


def _read_tensors(
    files: list[Path], dtype: torch.dtype, digest: Any
) -> Generator[Progress | None, None, dict[str, Tensor]]:
    """All tensors in the precision that is wanted, each copied out of its file as it is read."""
    total = sum(file.stat().st_size for file in files)
    state: dict[str, Tensor] = {}
    done = 0
    begun = told = time.monotonic()
    yield Progress(stage="reading", fraction=READING, message="Reading the weights", bytes=0, total_bytes=total)
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    stored = tensors.get_tensor(name)
                    digest.update(name.encode())
                    digest.update(_sample(stored))
                    done += stored.nbytes
                    state[name] = stored.to(dtype, copy=True) if stored.is_floating_point() else stored.clone()
                    now = time.monotonic()
                    if now - told < PROGRESS_SECONDS and told > begun:
                        yield None
                        continue
                    told, seconds = now, max(now - begun, 1e-6)
                    yield Progress(
                        stage="reading",
                        fraction=READING + (PARSING - READING) * min(done / total, 1.0),
                        message=f"Reading {file.name}",
                        bytes=done,
                        total_bytes=total,
                        rate=done / seconds,
                        seconds_left=max(total - done, 0) * seconds / done if done else None,
                    )
        except SafetensorError as error:
            raise _torn(file, error) from None
    return state


def _build(
    path: Path,
    config: Any,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    precision: Precision,
    device: str,
    request: Load,
) -> Any:
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": "eager" if request.engine == "transformers-eager" else None,
    }
    if precision == "8-bit":
        options |= {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
    elif precision == "4-bit":
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        options |= {"quantization_config": four, "device_map": {"": device}}
    try:
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            if kind.config_class is config.sub_configs.get("text_config"):  # the language model of one that sees, too
                config = config.get_text_config()
        elif request.remote_code:
            kind, options = AutoModelForCausalLM, options | {"trust_remote_code": True}
        else:
            raise ValueError("it is not a causal language model")
        place = path if kind is AutoModelForCausalLM else None
        model, info = kind.from_pretrained(
            place, config=config, state_dict=state, output_loading_info=True, **options
        )  # fmt: skip
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, ZeroDivisionError) as error:
        if "memory" in str(error).lower():
            raise
        raise LoadFailed(
            f"The architecture “{config.model_type}” could not be loaded: {_first_line(error)}",
            code="unsupported_architecture",
            next_step="Choose a causal language model that transformers knows.",
        ) from None
    if info["missing_keys"] or info.get("mismatched_keys"):
        missing = sorted(str(key) for key in info["missing_keys"] or info["mismatched_keys"])
        raise LoadFailed(
            f"{len(missing)} tensors are missing from the model's files, the first is “{missing[0]}”.",
            code="corrupt_file",
            next_step="Copy or download the model again.",
        )
    return model.eval()


def _move(model: Any, device: str) -> Generator[Progress | None, None, None]:
    """Put a model on its device, module by module, with a true count."""
    modules = [module for module in model.modules() if not any(True for _ in module.children())]
    total = sum(p.nbytes for p in model.parameters())
    done, told = 0, 0.0
    for number, module in enumerate(modules, 1):
        module.to(device)
        done += sum(p.nbytes for p in module.parameters(recurse=False))
        now = time.monotonic()
        if now - told >= PROGRESS_SECONDS or number == len(modules):
            told = now
            yield Progress(
                stage="placing",
                fraction=PLACING + (WARMING - PLACING) * number / len(modules),
                message=f"Placing part {number} of {len(modules)} on the {device}",
                bytes=min(done, total),
                total_bytes=total,
            )
    model.to(device)  # what stands in no leaf: buffers, tied weights


def _require_bitsandbytes(precision: Precision) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LoadFailed(
            f"{precision} needs bitsandbytes, which is not installed.",
            code="not_installed",
            field="precision",
            next_step="Install it with `pip install 'trellis-studio[quantized]'`, or choose 16-bit.",
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _sample(tensor: Tensor, pieces: int = 16) -> bytes:
    """Some values from all over a tensor: enough to tell two models apart without hashing gigabytes."""
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // (pieces * 16))].float().numpy().tobytes()


def _ends(path: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: those listed for generation, the model's own, and the tokenizer's."""
    listed: list[Any] = [getattr(config.get_text_config(), "eos_token_id", None), tokenizer.eos_token_id]
    with suppress(OSError, ValueError, AttributeError):  # a model without one, or with one that says nothing
        listed.append(json.loads((path / "generation_config.json").read_text()).get("eos_token_id"))
    flat = [token for tokens in listed for token in (tokens if isinstance(tokens, list) else [tokens])]
    return frozenset(token for token in flat if isinstance(token, int))


def require_memory(path: Path, request: Load) -> None:
    """After a download the size is known: raises LoadFailed when it cannot fit, before any of it is read."""
    device = device_for(request)
    if device != "cpu":
        return  # the device says so itself, with its own figures
    precision = precision_for(request.precision, device)
    try:
        config = json.loads((path / "config.json").read_text())
        shape = shape_of(config, {name: dims for file in weight_files(path) for name, dims in shapes_in(file).items()})
    except UNREADABLE:
        return  # reading the model says what is wrong with it
    needed = estimate(shape, SessionConfig(), precision).loading
    free = psutil.virtual_memory().available
    if needed > free:
        raise LoadFailed(
            f"The model needs about {needed / 1e9:.1f} GB in {precision}, and {free / 1e9:.1f} GB are free.",
            code="out_of_memory",
            next_step="Choose fewer bits or a smaller model, or close other programs. The download is kept.",
        )
