"""Which model is loaded: read from a folder with true progress, and what is said to it as tokens.

It reads safetensors only, and runs no code from the folder unless that was agreed to. It does not know sessions
or learning, nor how chat templates work.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from ...errors import Invalid, LoadFailed
from ...memory_estimates import estimate_memory, model_shape
from ...messages import Chat, Load, Loaded, Progress, Prompt, Turn
from ...model_checks import quantization_method, require_loadable, token_beyond_embedding, tokenizer_too_large_problem
from ...model_files import ModelFiles, Vocabulary, canonical_config, inspect_folder
from ...options import Precision, SessionConfig
from ...safetensors_files import READ_ERRORS
from ..parallel import SMALL_MODEL_PARAMETERS, CorePool
from .adapters import AdapterSlots
from .chat_batch import PreparedChat, conversation_too_long
from .chat_templates import (
    NEXT_STEP,
    ChatTemplate,
    TemplateFailed,
    choose_template,
    close_thinking,
    is_in_thinking,
    opening_after,
    probe_template,
)
from .dequantization import dequantize
from .fast_forward import FastForward
from .vocabulary import vocabulary_of

INITIALIZING, READING, PARSING, PLACING, WARMING = 0.11, 0.15, 0.78, 0.8, 0.95
"""Where these stages begin as a fraction of a load; reading takes the bulk."""

PROGRESS_SECONDS = 0.05

MAX_LANES = 4
"""So many requests at most are worked on at once, each on its own thread, where one does not keep all cores busy."""

MASK_NAMES = ("masked_bias", "attn.bias", "attention.bias")
"""Last parts of the names of masks, which older files hold, in which infinite values are meant."""

DEFAULT_CONTEXT_LENGTH = 8192
"""What a conversation may take of a model that does not say how far it looks back."""

PLAIN_TURN_PREFIXES = {"system": "", "user": "\n\nUser: ", "assistant": "\n\nAssistant: "}
"""How a conversation is put to a model without a chat template."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the model reads it: its text, in the chat template where `templated`, and its tokens."""

    text: str
    tokens: list[int]
    is_templated: bool


@dataclass
class LoadedModel:
    """A model in memory with what it needs to be spoken to."""

    model: Any
    tokenizer: Any
    slots: AdapterSlots
    fast_forward: FastForward | None
    end_tokens: frozenset[int]
    info: Loaded
    template: ChatTemplate | None = None
    """Its chat template, where it has one that works; `about` says what is wrong with one that does not."""

    def render_prompt(self, prompt: Prompt) -> RenderedPrompt:
        """A prompt in the model's chat template, or as plain text where it has none or it is off. Raises Invalid."""
        template = self._usable_template() if prompt.template else None
        if template is None:
            text = f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text
            text += prompt.opening
        else:
            turns = [Turn(role="user", text=prompt.text)]
            if prompt.system:
                turns = [Turn(role="system", text=prompt.system), *turns]
            text = template.render_prompt(turns, prompt.template_kwargs, "prompt", fixed_day=True)
            text += opening_after(text, prompt.opening)
        tokens = self._tokenize(text, template is not None)
        self.require_known_tokens(tokens, "prompt")
        return RenderedPrompt(text, tokens, template is not None)

    def tokenize_prompt(self, prompt: Prompt, new_tokens: int, context_length: int) -> list[int]:
        """The tokens of a prompt. Raises Invalid when it leaves no room for `room` more tokens in the context."""
        rendered = self.render_prompt(prompt)
        self.require_fits_context(rendered, new_tokens, context_length)
        return rendered.tokens

    def require_fits_context(self, rendered: RenderedPrompt, new_tokens: int, context_length: int) -> None:
        """Raises Invalid when a prompt leaves no room for `room` more tokens in the context."""
        positions = max_positions(self.model.config)
        if len(rendered.tokens) + new_tokens > min(context_length, positions or context_length):
            raise prompt_too_long_error(len(rendered.tokens), new_tokens, context_length, positions)

    def tokenize_answer(self, text: str, is_complete: bool = True, prompt: RenderedPrompt | None = None) -> list[int]:
        """An answer as tokens, as it is written `after` a prompt; with the token that ends an assistant's turn where
        the answer ended by itself, so that the model learns to stop.

        A token may depend on what stands before it, as the space of SentencePiece does: prompt and answer are read
        together, and apart only where the prompt's own tokens would not be the same.
        """
        tokens: list[int] | None = None
        text = self._strip_end_tokens(text) if is_complete else text
        if prompt is not None and text:
            text = opening_after(prompt.text, text)
            if self.template and prompt.is_templated:
                text = self.template.format_answer(prompt.text, text, is_complete)
            elif is_complete:
                text = close_thinking(prompt.text, text)
            joint = self._tokenize(prompt.text + text, prompt.is_templated)
            if joint[: len(prompt.tokens)] == prompt.tokens:
                tokens = joint[len(prompt.tokens) :]
        if tokens is None:
            tokens = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        end = self.end_of_turn_token if prompt is None or prompt.is_templated else self.end_token
        return [*tokens, end] if is_complete and end is not None else tokens

    def _strip_end_tokens(self, text: str) -> str:
        """An answer without an end token at its end, as files have it; it is put there as a token."""
        end_texts = [each for end in self.end_tokens if len(each := str(self.tokenizer.decode([end])).strip()) > 1]
        while cut := next((each for each in end_texts if text.rstrip().endswith(each)), ""):
            text = text.rstrip().removesuffix(cut)
        return text

    def require_known_tokens(self, tokens: Sequence[int], field: str) -> None:
        """Raises Invalid for a text with a token that the model has no row for, such as one for padding."""
        embedding = getattr(self.model.get_input_embeddings(), "weight", None)
        if embedding is not None and tokens and max(tokens) >= embedding.shape[0]:
            unknown = self.tokenizer.convert_ids_to_tokens(max(tokens))
            raise Invalid(
                f"The text has the token “{unknown}”, which this model has no row for.",
                code="unknown_token",
                field=field,
                next_step="Write it otherwise.",
            )

    def prepare_chat(self, request: Chat) -> PreparedChat:
        """A conversation as tokens, without its oldest turns where it may be trimmed and does not fit. Raises Invalid.

        A quarter of the context, or the longest answer where that is less, is kept free for the answer.
        """
        context_length = max_positions(self.model.config) or DEFAULT_CONTEXT_LENGTH
        max_new_tokens = request.sampling.max_new_tokens
        reserved = min(max_new_tokens, context_length // 4) if request.trims else 1
        stop, in_thinking = request.stop, False
        last = request.turns[-1].text.strip() if request.turns and request.turns[-1].role == "user" else ""
        fewest = vocabulary_of(self.tokenizer).fewest_tokens(last if request.turns else request.text)
        if fewest + reserved > context_length:  # known without tokenizing it
            raise conversation_too_long(fewest, context_length, at_least=True)
        if not request.turns:
            tokens = self._tokenize(request.text, False)
        else:
            tokens, in_thinking = self._tokenize_turns(request.turns, request)
            if not (self.template and request.template):
                stop = (*stop, PLAIN_TURN_PREFIXES["user"])
        self.require_known_tokens(tokens, "messages")
        left_out = 0
        if len(tokens) + reserved > context_length:
            if not request.trims or not request.turns:
                raise conversation_too_long(len(tokens), context_length)
            tokens, left_out = self._trim_chat(request, context_length - reserved, len(tokens))
        return PreparedChat(tokens, left_out, context_length, max_new_tokens, stop, in_thinking)

    def _trim_chat(self, request: Chat, max_tokens: int, full_length: int) -> tuple[list[int], int]:
        """The longest end of a conversation that fits, after what the system said, and how many turns it leaves out."""
        system_turns = [turn for turn in request.turns if turn.role == "system"]
        other_turns = [turn for turn in request.turns if turn.role != "system"]
        last = max((place for place, turn in enumerate(other_turns) if turn.role == "user"), default=0)
        starts = [place for place, turn in enumerate(other_turns[: last + 1]) if turn.role == "user" and place] or [0]
        low, high, reach = 0, len(starts) - 1, 1
        best: tuple[list[int], int] | None = None
        while low <= high:
            middle = max((low + high) // 2, high - reach)  # from the end, so that little more is tokenized than fits
            reach *= 2
            tokens, _ = self._tokenize_turns([*system_turns, *other_turns[starts[middle] :]], request)
            if len(tokens) <= max_tokens:
                best, high = (tokens, starts[middle]), middle - 1
            else:
                low, full_length = middle + 1, len(tokens)
        if best is None:
            raise conversation_too_long(full_length, max_tokens)
        return best

    def _tokenize_turns(self, turns: Sequence[Turn], request: Chat) -> tuple[list[int], bool]:
        """Turns as tokens, and whether the answer begins in a thought that the template has opened."""
        opening = ""
        if turns[-1].role == "assistant":
            opening, turns = turns[-1].text, turns[:-1]
        if not turns:
            raise Invalid(
                "Nothing was said before the answer that is to be continued.", field="messages",
                next_step="Begin with a message of the user.",
            )  # fmt: skip
        template = self._usable_template() if request.template else None
        if template is not None:
            text = template.render_prompt(turns, request.template_kwargs, "messages")
            return self._tokenize(template.continue_answer(text, opening), True), is_in_thinking(text) and not opening
        lines = "".join(f"{PLAIN_TURN_PREFIXES[turn.role]}{turn.text}" for turn in turns).lstrip()
        prefix = (
            PLAIN_TURN_PREFIXES["assistant"]
            if opening and not opening[0].isspace()
            else PLAIN_TURN_PREFIXES["assistant"].rstrip(" ")
        )
        return self._tokenize(lines + prefix + opening, False), False

    def _usable_template(self) -> ChatTemplate | None:
        """The model's chat template, None where it has none. Raises Invalid where it has one that does not work."""
        if self.info.template_problem:
            raise Invalid(
                f"The model's chat template cannot be used: {self.info.template_problem}",
                code="bad_template",
                field="chat_template",
                next_step=NEXT_STEP,
            )
        return self.template

    def _tokenize(self, text: str, is_templated: bool) -> list[int]:
        """Text as tokens: a template writes its special tokens itself; of plain text there is at least one token."""
        if is_templated and self.template:
            return self.template.encode(text)
        tokens = list(self.tokenizer(text)["input_ids"])
        if len(tokens) > 1 and tokens[-1] in self.end_tokens:  # some tokenizers close every text
            tokens = tokens[:-1]
        return tokens or [self.tokenizer.bos_token_id or self.end_token or 0]

    @property
    def end_token(self) -> int | None:
        """What ends a plain text."""
        own = self.tokenizer.eos_token_id
        return own if own is not None else min(self.end_tokens, default=None)

    @cached_property
    def end_of_turn_token(self) -> int | None:
        """What ends an assistant's turn: the end that the chat template writes there, else the tokenizer's own."""
        written = self.template.find_end_token(self.end_tokens) if self.template else None
        return self.end_token if written is None else written


def load_model(
    path: Path, request: Load, kept_dtype: torch.dtype | None = None
) -> Generator[Progress | None, None, LoadedModel]:
    """Load a folder: yields progress of true bytes and tensors, returns the model. `own` is a precision to keep
    instead of the one that the request names.

    Raises LoadFailed with the code of what went wrong and a way out.
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
    digests = _start_digests(path, precision)
    quantized = quantization_method(files)
    state = yield from _read_tensors(files, None if quantized else dtype, digests)
    if quantized:
        yield Progress(stage="parsing", fraction=PARSING, message=f"Dequantizing weights from {quantized}")
        state = dequantize(state, quantized, files.quantization or {}, dtype)
        for name, tensor in state.items():
            if not is_finite_tensor(name, tensor):
                raise _not_finite_error(name, path.name, tensor)
    yield Progress(stage="parsing", fraction=PARSING, message="Loading weights")
    if precision in ("8-bit", "4-bit"):
        yield Progress(stage="quantizing", fraction=PLACING, message=f"Quantizing to {precision}")
    model = _build_model(path, config, state, dtype, precision, device, request)
    del state
    model.requires_grad_(False)
    if device == "cpu" and any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        from .quantized_linear import replace_4bit_layers  # needs bitsandbytes, which is there if it made such layers

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
    if fast_forward is None:  # the lean pass is known to be right
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
    vocabulary.fewest_tokens("")  # looked up here, so that nobody waits for it later
    if unused := sorted(set(vocabulary.unused_rows(logits_size)) - end_tokens):
        slots.unused_rows = torch.tensor(unused, device=device)
        if fast_forward is not None:
            fast_forward.unused_rows = slots.unused_rows
    return LoadedModel(model, tokenizer, slots, fast_forward, end_tokens, info, template)


def _require_causal_model(slots: AdapterSlots) -> None:
    """Find out how the model goes on with a text. Raises LoadFailed for one that fills gaps instead."""
    if not slots.cache_support.is_causal:
        raise LoadFailed(
            "This model reads text in both directions, as models that fill in masks do, so it can't continue one.",
            code="unsupported_architecture",
            next_step="Choose a causal language model, such as a chat model.",
        )


def _read_template(path: Path, tokenizer: Any) -> tuple[ChatTemplate | None, str]:
    """The chat template after a trial, and what is wrong with one that cannot be used. Models that also see have theirs
    in a file that their tokenizer does not read."""
    if not tokenizer.chat_template:
        with suppress(OSError, ValueError, AttributeError):
            tokenizer.chat_template = json.loads((path / "chat_template.json").read_text()).get("chat_template")
    try:
        source = choose_template(tokenizer.chat_template)
        return (probe_template(tokenizer, source) if source else None), ""
    except TemplateFailed as failure:
        return None, str(failure)


def _start_digests(path: Path, precision: Precision) -> list[Any]:
    """Where the fingerprints of a folder begin, the one that new sessions use first: over what matters of config.json,
    and over its bytes, as sessions from before have it. What is grown on rounded weights is not the same."""
    text = (path / "config.json").read_bytes()
    digests = [hashlib.sha256(canonical_config(text)), hashlib.sha256(text)]
    if precision != "32-bit":
        for digest in digests:
            digest.update(precision.encode())
    return digests


def fingerprints(path: Path) -> list[str]:
    """The fingerprints that a folder has in each precision. Raises LoadFailed."""
    precisions: tuple[Precision, ...] = ("32-bit", "16-bit", "8-bit", "4-bit")
    digests = [digest for precision in precisions for digest in _start_digests(path, precision)]
    for file in inspect_folder(path).weight_paths:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    sampled = _sample_values(tensors.get_tensor(name))
                    for digest in digests:
                        digest.update(name.encode())
                        digest.update(sampled)
        except SafetensorError as error:
            raise _incomplete_file_error(file, error) from None
    return [digest.hexdigest()[:32] for digest in digests]


def _incomplete_file_error(file: Path, error: Exception) -> LoadFailed:
    return LoadFailed(
        f"The file “{file.name}” is not a complete safetensors file: {error}",
        code="corrupt_file",
        next_step="Copy or download the file again.",
    )


def choose_device(request: Load) -> str:
    """The device to load on. Raises LoadFailed for one that is not there."""
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


def prompt_too_long_error(tokens: int, new_tokens: int, context_length: int, positions: int | None) -> Invalid:
    """Why a prompt does not fit, with the ways out that can work: no option makes a model look back further."""
    limit = min(context_length, positions or context_length)
    left = limit - tokens
    remedies = [f"allow answers of at most {left} tokens"] if left > 0 else []
    if context_length < (positions or context_length + 1):
        most = f" (at most {positions})" if positions else ""
        remedies.append(f"use a longer context{most}")
    whose = "the model, which can look back on no more" if limit == positions else "the session"
    return Invalid(
        f"The prompt has {tokens} tokens; with answers of up to {new_tokens} it does not fit into the context of "
        f"{limit} of {whose}.",
        code="prompt_too_long",
        field="prompt",
        next_step="Shorten the prompt" + "".join(f", or {way}" for way in remedies) + ".",
    )


def max_positions(config: Any) -> int | None:
    """How many tokens a model can look back on, where its configuration says so."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _read_config(path: Path, remote_code: bool) -> tuple[Any, Any]:
    try:
        about = json.loads((path / "config.json").read_text())
        wants_code = "auto_map" in about and about.get("model_type") not in CONFIG_MAPPING
        options = {"local_files_only": True, "trust_remote_code": remote_code and wants_code}
        config = AutoConfig.from_pretrained(path, **options)
    except PermissionError as error:
        raise _not_readable_error(error) from None
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
            del part.quantization_config  # the weights are unpacked as they are read
    return config, tokenizer


def _read_tokenizer(path: Path, options: dict[str, Any]) -> Any:
    """The tokenizer in a folder, after it has read a text once. Raises LoadFailed."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        tokenizer("Once, so that nothing in it changes when several threads read with it.")
    except PermissionError as error:
        raise _not_readable_error(error) from None
    except ImportError as error:
        raise _library_missing_error(error) from None
    except Exception as error:  # noqa: BLE001 - the library raises plain exceptions for files that it cannot read
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
    """Raises LoadFailed for a tokenizer with tokens that the model has no row for, where it came in another file than
    the tokenizer.json that was looked into before."""
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


def _not_readable_error(error: PermissionError) -> LoadFailed:
    return LoadFailed(
        f"No permission to read the file “{error.filename}”.",
        code="permission_denied",
        next_step="Give the studio's user read access.",
    )


def _read_tensors(
    files: ModelFiles, dtype: torch.dtype | None, digests: list[Any]
) -> Generator[Progress | None, None, dict[str, Tensor]]:
    """All tensors in the precision that is wanted, or as they are stored, each copied out of its file as it is read.

    Raises LoadFailed for a file that is not whole, and for a value that is not finite.
    """
    paths = files.weight_paths
    total = sum(file.stat().st_size for file in paths)
    state: dict[str, Tensor] = {}
    done = 0
    started = last_report = time.monotonic()
    yield Progress(stage="reading", fraction=READING, message="Reading weights", bytes=0, total_bytes=total)
    for file in paths:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    stored = tensors.get_tensor(name)
                    sampled = _sample_values(stored)
                    for digest in digests:
                        digest.update(name.encode())
                        digest.update(sampled)
                    done += stored.nbytes
                    tensor = stored.to(dtype, copy=True) if dtype and stored.is_floating_point() else stored.clone()
                    if dtype and not is_finite_tensor(name, tensor):
                        raise _not_finite_error(name, file.name, stored)
                    state[name] = tensor
                    now = time.monotonic()
                    if now - last_report < PROGRESS_SECONDS and last_report > started:
                        yield None
                        continue
                    last_report, seconds = now, max(now - started, 1e-6)
                    yield Progress(
                        stage="reading",
                        fraction=READING + (PARSING - READING) * min(done / total, 1.0),
                        message=f"Reading {file.name}",
                        bytes=done,
                        total_bytes=total,
                        rate=done / seconds,
                        seconds_left=max(total - done, 0) * seconds / done if done else None,
                    )
        except PermissionError as error:
            raise _not_readable_error(error) from None
        except SafetensorError as error:
            raise _incomplete_file_error(file, error) from None
    return state


def is_finite_tensor(name: str, tensor: Tensor) -> bool:
    """Whether all values of a tensor are numbers, in one pass: its extremes are NaN or infinite where one of them is.

    It takes a fifth of the time of copying the tensor (docs/log.md).
    """
    if not tensor.is_floating_point() or not tensor.numel() or name.endswith(MASK_NAMES):
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _not_finite_error(name: str, location: str, stored: Tensor) -> LoadFailed:
    count = int((~torch.isfinite(stored.float())).sum())
    if count:
        return LoadFailed(
            f"The tensor “{name}” in “{location}” contains {count} values that are not numbers (NaN or infinite).",
            code="corrupt_file",
            next_step="Copy or download the file again, or choose another model.",
        )
    return LoadFailed(
        f"The tensor “{name}” in “{location}” contains values that are too large for the precision.",
        code="corrupt_file",
        field="precision",
        next_step="Choose 32-bit.",
    )


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
            ):  # the language model of one that sees, too
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
    """Read a few tokens once, and return how many tokens the model can answer with. Raises LoadFailed for a model that
    can be put together and cannot be run here."""
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
"""What transformers and a model's own code raise for a model that they cannot put together or run."""


def _architecture_error(config: Any, error: Exception, verb: str) -> Exception:
    """Why an architecture cannot be used, as an error for a person; what is told otherwise is returned as it is."""
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
    """The class of a model that brings its own code, which runs now. Raises ValueError where it brings none."""
    named = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if not named:
        raise ValueError("its own code has no causal language model")
    kind = get_class_from_dynamic_module(named, path, local_files_only=True)
    kind.register_for_auto_class("AutoModelForCausalLM")  # so that its code goes along when it is saved
    return add_generation_mixin_to_remote_model(kind)


def _move_to_device(model: Any, device: str) -> Generator[Progress | None, None, None]:
    """Put a model on its device, module by module, with a true count."""
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
    model.to(device)  # what stands in no leaf: buffers, tied weights


def _first_line(error: BaseException) -> str:
    """The first line of what a library said, with the next one where it is only a heading; a whole sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:300].rstrip(" .:")
    return f"{text}."


def _sample_values(tensor: Tensor, pieces: int = 16) -> bytes:
    """Some values from all over a tensor: enough to tell two models apart without hashing gigabytes."""
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // (pieces * 16))].float().numpy().tobytes()


def _find_end_tokens(path: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: those listed for generation, the model's own, and the tokenizer's."""
    listed: list[Any] = [getattr(config.get_text_config(), "eos_token_id", None), tokenizer.eos_token_id]
    with suppress(OSError, ValueError, AttributeError):  # a model without one, or with one that says nothing
        listed.append(json.loads((path / "generation_config.json").read_text()).get("eos_token_id"))
    flat = [token for tokens in listed for token in (tokens if isinstance(tokens, list) else [tokens])]
    return frozenset(token for token in flat if isinstance(token, int))


def require_free_memory(path: Path, request: Load) -> None:
    """After a download the size is known: raises LoadFailed when it cannot fit, before any of it is read."""
    device = choose_device(request)
    if device != "cpu":
        return  # the device says so itself, with its own figures
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
