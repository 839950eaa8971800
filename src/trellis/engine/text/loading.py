"""Load a model from a folder, with progress: configuration, tokenizer, weights, chat template, adapter slots.

Code from the folder runs only when the request allows it. It does not know sessions or learning.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, BitsAndBytesConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from ...errors import LoadFailed
from ...memory_estimates import estimate_memory, model_shape
from ...messages import Load, Loaded, Progress
from ...model_checks import quantization_method, require_loadable, token_beyond_embedding, tokenizer_too_large_problem
from ...model_files import ModelFiles, Vocabulary
from ...options import Precision, SessionConfig
from ...safetensors_files import READ_ERRORS
from ..parallel import SMALL_MODEL_PARAMETERS, CorePool
from .adapters import AdapterSlots
from .chat_templates import ChatTemplate, TemplateFailed
from .dequantization import dequantize
from .fast_forward import FastForward
from .loaded_model import LoadedModel, max_positions
from .stored_weights import (
    INITIALIZING,
    PARSING,
    PLACING,
    PROGRESS_SECONDS,
    WARMING,
    is_finite_tensor,
    non_finite_tensor_error,
    not_readable_error,
    read_tensors,
    start_digests,
)
from .template_probe import choose_template, probe_template
from .vocabulary import vocabulary_of

MAX_LANES = 4
"""Most requests that run concurrently, each on its own thread, on models too small to use all cores."""


def load_model(
    path: Path, request: Load, kept_dtype: torch.dtype | None = None
) -> Generator[Progress | None, None, LoadedModel]:
    """Load a model folder. Yields progress in bytes and tensors, returns the model. `kept_dtype` overrides the
    request's precision.

    Raises LoadFailed.
    """
    started = time.monotonic()
    yield Progress(stage="initializing", fraction=INITIALIZING, message="Reading the config")
    device = choose_device(request)
    precision = choose_precision(request.precision, device)
    files = require_loadable(path, precision, request.remote_code)
    config, tokenizer = _read_config(path, request.remote_code)
    _require_embedding_rows(files, tokenizer)
    dtype = torch.float32 if precision == "32-bit" or (device == "cpu" and precision != "16-bit") else torch.bfloat16
    dtype = kept_dtype or dtype
    digests = start_digests(path, precision)
    quantized = quantization_method(files)
    state = yield from read_tensors(files, None if quantized else dtype, digests)
    if quantized:
        yield Progress(stage="parsing", fraction=PARSING, message=f"Dequantizing weights from {quantized}")
        state = dequantize(state, quantized, files.quantization or {}, dtype)
        for name, tensor in state.items():
            if not is_finite_tensor(name, tensor):
                raise non_finite_tensor_error(name, path.name, tensor)
    yield Progress(stage="parsing", fraction=PARSING, message="Loading weights")
    if precision in ("8-bit", "4-bit"):
        yield Progress(stage="quantizing", fraction=PLACING, message=f"Quantizing to {precision}")
    model = _build_model(path, config, state, dtype, precision, device, request)
    del state
    model.requires_grad_(False)
    if device == "cpu" and any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        from .quantized_linear import replace_4bit_layers  # importable here, since bitsandbytes made the layers

        replace_4bit_layers(model)
    if precision in ("32-bit", "16-bit"):
        yield from _move_to_device(model, device)
    yield Progress(stage="warming_up", fraction=WARMING, message="Warming up")
    logits_size = _run_once(model, config, device, precision)
    fast_forward, lanes = FastForward.from_model(model), 1
    if device == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL_MODEL_PARAMETERS:
        lanes = min(MAX_LANES, torch.get_num_threads()) if fast_forward else 1
        torch.set_num_threads(1)
    slots = AdapterSlots(model, fast_forward, CorePool(lanes))
    if fast_forward is None:  # the supported architectures are known to be causal
        _require_causal_model(slots)
    template, problem = _read_template(path, tokenizer)
    info = Loaded(
        fingerprint=digests[0].hexdigest()[:32],
        former_fingerprint=digests[1].hexdigest()[:32],
        parameters=sum(p.numel() for p in model.parameters()),
        architecture=type(model).__name__,
        device=device,
        dtype=precision if precision in ("8-bit", "4-bit") else str(dtype).removeprefix("torch."),
        bytes=sum(p.nbytes for p in model.parameters()),
        seconds=time.monotonic() - started,
        has_template=bool(tokenizer.chat_template),
        template_problem=problem,
        can_switch_thinking=template is not None and template.thinking_switch is not None,
        positions=max_positions(config),
        lanes=lanes,
    )
    end_tokens = _find_end_tokens(path, config, tokenizer)
    vocabulary = vocabulary_of(tokenizer)
    vocabulary.fewest_tokens("")  # computed now, so that no request waits for it later
    if unused := sorted(set(vocabulary.unused_rows(logits_size)) - end_tokens):
        slots.unused_rows = torch.tensor(unused, device=device)
        if fast_forward is not None:
            fast_forward.unused_rows = slots.unused_rows
    return LoadedModel(model, tokenizer, slots, fast_forward, end_tokens, info, template)


def _require_causal_model(slots: AdapterSlots) -> None:
    """Raise LoadFailed for a model that is not causal, such as a masked language model."""
    if not slots.cache_support.is_causal:
        raise LoadFailed(
            "This model reads text in both directions, as models that fill in masks do, so it can't continue one.",
            code="unsupported_architecture",
            next_step="Choose a causal language model, such as a chat model.",
        )


def _read_template(path: Path, tokenizer: Any) -> tuple[ChatTemplate | None, str]:
    """Return the chat template, probed, and what is wrong with one that cannot be used. Vision models have theirs in a
    file that the tokenizer does not read."""
    if not tokenizer.chat_template:
        with suppress(OSError, ValueError, AttributeError):
            tokenizer.chat_template = json.loads((path / "chat_template.json").read_text()).get("chat_template")
    try:
        source = choose_template(tokenizer.chat_template)
        return (probe_template(tokenizer, source) if source else None), ""
    except TemplateFailed as failure:
        return None, str(failure)


def choose_device(request: Load) -> str:
    """Return the device to load on. Raises LoadFailed if it is not available."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if request.device == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available[request.device]:
        raise LoadFailed(
            f"There is no device “{request.device}” here.",
            code="not_found",
            field="device",
            next_step="Choose “auto” or “cpu”. Run `trellis doctor` to see all devices.",
        )
    return request.device


def choose_precision(requested: Precision, device: str) -> Precision:
    if requested == "auto":
        return "32-bit" if device == "cpu" else "16-bit"
    return requested


def _read_config(path: Path, remote_code: bool) -> tuple[Any, Any]:
    try:
        about = json.loads((path / "config.json").read_text())
        wants_code = "auto_map" in about and about.get("model_type") not in CONFIG_MAPPING
        options = {"local_files_only": True, "trust_remote_code": remote_code and wants_code}
        config = AutoConfig.from_pretrained(path, **options)
    except PermissionError as error:
        raise not_readable_error(error) from None
    except ImportError as error:
        raise _library_missing_error(error) from None
    except (StrictDataclassError, RecursionError, *READ_ERRORS) as error:
        raise LoadFailed(
            f"The model's configuration can't be used: {_first_line(error)}",
            code="corrupt_file",
            next_step="Check config.json or copy it again.",
        ) from None
    tokenizer = _read_tokenizer(path, options)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config  # weights are dequantized on reading
    return config, tokenizer


def _read_tokenizer(path: Path, options: dict[str, Any]) -> Any:
    """Read the tokenizer and use it once. Raises LoadFailed."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        tokenizer("Once, so that nothing in it changes when several threads read with it.")
    except PermissionError as error:
        raise not_readable_error(error) from None
    except ImportError as error:
        raise _library_missing_error(error) from None
    except Exception as error:  # noqa: BLE001 - the library raises plain exceptions for files it cannot read
        raise LoadFailed(
            f"The model's tokenizer can't be used: {_first_line(error)}",
            code="corrupt_file",
            next_step="Copy the tokenizer's files again. If they were made by a newer version of tokenizers, update it "
            "and transformers.",
        ) from None
    return tokenizer


def _library_missing_error(error: ImportError) -> LoadFailed:
    return LoadFailed(
        f"A library that this model needs is not installed: {_first_line(error)}",
        code="not_installed",
        next_step="Install it where Trellis runs, then load the model again.",
    )


def _require_embedding_rows(files: ModelFiles, tokenizer: Any) -> None:
    """Raise LoadFailed if the tokenizer has tokens without an embedding, unless its tokenizer.json was already
    checked."""
    rows = files.embedding_rows
    if rows is None or files.vocabulary is not None:
        return
    added = tokenizer.get_added_vocab()
    known = Vocabulary(max((number for text, number in tokenizer.get_vocab().items() if text not in added), default=-1),
                       added)  # fmt: skip
    template = json.dumps(tokenizer.chat_template or "", ensure_ascii=False, default=str)
    needed = f"{template}\n{tokenizer.bos_token}\n{tokenizer.eos_token}"
    if beyond := token_beyond_embedding(known, rows, needed):
        raise tokenizer_too_large_problem(beyond, rows).to_error()


def _build_model(
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
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            if model_class.config_class is config.sub_configs.get(
                "text_config"
            ):  # the language model inside a vision model
                config = config.get_text_config()
        elif request.remote_code:
            model_class = _remote_code_class(path, config)
        else:
            raise ValueError("it is not a causal language model")
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options
        )  # fmt: skip
    except LIBRARY_ERRORS as error:
        raise _architecture_error(config, error, "loaded") from None
    if info["missing_keys"] or info.get("mismatched_keys"):
        missing = sorted(str(key) for key in info["missing_keys"] or info["mismatched_keys"])
        raise LoadFailed(
            f"{len(missing)} tensors are missing from the model's files, such as “{missing[0]}”.",
            code="corrupt_file",
            next_step="Copy or download the model again.",
        )
    return model.eval()


def _run_once(model: Any, config: Any, device: str, precision: Precision) -> int:
    """Read a few tokens, and return the size of the logits. Raises LoadFailed for a model that cannot run here."""
    ids = torch.zeros((1, 8), dtype=torch.long, device=device)
    try:
        with torch.inference_mode():
            return int(model(input_ids=ids, use_cache=False).logits.shape[-1])
    except LIBRARY_ERRORS as error:
        found = _architecture_error(config, error, "run")
        if precision in ("8-bit", "4-bit") and getattr(found, "code", "") == "unsupported_architecture":
            found = LoadFailed(
                f"The model cannot read a text in {precision}, as it is where a model uses the weights of some layers "
                f"directly: {_first_line(error)}",
                code="unsupported_architecture",
                field="precision",
                next_step="Choose 16-bit or 32-bit.",
            )
        raise found from None


LIBRARY_ERRORS = (
    StrictDataclassError, ImportError, ValueError, LookupError, RuntimeError, TypeError, AttributeError,
    ArithmeticError, AssertionError,
)  # fmt: skip
"""What transformers and a model's own code raise for a model they cannot build or run."""


def _architecture_error(config: Any, error: Exception, verb: str) -> Exception:
    """Return why an architecture cannot be used as a LoadFailed; memory and device errors unchanged."""
    if isinstance(error, torch.OutOfMemoryError) or re.search(r"memory|CUDA error|CUBLAS|MPS backend", str(error)):
        return error
    if isinstance(error, ImportError):
        return _library_missing_error(error)
    return LoadFailed(
        f"The architecture “{config.model_type}” could not be {verb}: {_first_line(error)}",
        code="unsupported_architecture",
        next_step="Update transformers if the architecture is new, or choose a causal language model that it knows.",
    )


def _remote_code_class(path: Path, config: Any) -> Any:
    """Import the model class from the folder, which runs its code. Raises ValueError if there is none."""
    named = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if not named:
        raise ValueError("its own code has no causal language model")
    kind = get_class_from_dynamic_module(named, path, local_files_only=True)
    kind.register_for_auto_class("AutoModelForCausalLM")  # so that its code is saved with the model
    return add_generation_mixin_to_remote_model(kind)


def _move_to_device(model: Any, device: str) -> Generator[Progress | None, None, None]:
    """Move a model to its device, module by module, with progress."""
    modules = [module for module in model.modules() if not any(True for _ in module.children())]
    total = sum(p.nbytes for p in model.parameters())
    done, last_report = 0, 0.0
    for number, module in enumerate(modules, 1):
        module.to(device)
        done += sum(p.nbytes for p in module.parameters(recurse=False))
        now = time.monotonic()
        if now - last_report >= PROGRESS_SECONDS or number == len(modules):
            last_report = now
            yield Progress(
                stage="placing",
                fraction=PLACING + (WARMING - PLACING) * number / len(modules),
                message=f"Moving weights to {device}: {number} of {len(modules)}",
                bytes=min(done, total),
                total_bytes=total,
            )
    model.to(device)  # the rest: buffers, tied weights


def _first_line(error: BaseException) -> str:
    """Return the first line of an error as a sentence, with the next line if it is only a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:300].rstrip(" .:")
    return f"{text}."


def _find_end_tokens(path: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: those of the generation config, the model's, and the tokenizer's."""
    listed: list[Any] = [getattr(config.get_text_config(), "eos_token_id", None), tokenizer.eos_token_id]
    with suppress(OSError, ValueError, AttributeError):  # no file, or no such entry
        listed.append(json.loads((path / "generation_config.json").read_text()).get("eos_token_id"))
    flat = [token for tokens in listed for token in (tokens if isinstance(tokens, list) else [tokens])]
    return frozenset(token for token in flat if isinstance(token, int))


def require_free_memory(path: Path, request: Load) -> None:
    """Raise LoadFailed if a downloaded model cannot fit in memory, before it is read."""
    device = choose_device(request)
    if device != "cpu":
        return  # a GPU reports its own memory when it runs out
    precision = choose_precision(request.precision, device)
    files = require_loadable(path, precision, request.remote_code)
    shape = model_shape(files.config, {name: list(about["shape"]) for name, about in files.tensors.items()})
    needed = estimate_memory(shape, SessionConfig(), precision).loading
    free = psutil.virtual_memory().available
    if needed > free:
        raise LoadFailed(
            f"The model needs about {needed / 1e9:.1f} GB in {precision}; {free / 1e9:.1f} GB are free.",
            code="out_of_memory",
            next_step="Choose a lower precision or a smaller model, or close other programs. The download is kept.",
        )
