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
from ...memory_estimates import estimate, shape_of
from ...messages import Chat, Load, Loaded, Progress, Prompt, Turn
from ...model_checks import quantization_method, require_loadable, token_beyond_embedding, tokenizer_too_large_problem
from ...model_files import ModelFiles, Vocabulary, canonical_config, inspect_folder
from ...params import Precision, SessionConfig
from ...safetensors_files import UNREADABLE
from ..parallel import SMALL, Crew
from .adapters import Slots
from .chat_batch import Prepared, too_long
from .chat_templates import (
    NEXT_STEP,
    ChatTemplate,
    TemplateFailed,
    choose_template,
    close_thought,
    in_thought,
    opening_after,
    probe,
)
from .dequantization import dequantize
from .fast_forward import Lean
from .vocabulary import vocabulary_of

INITIALIZING, READING, PARSING, PLACING, WARMING = 0.11, 0.15, 0.78, 0.8, 0.95
"""Where these stages begin as a fraction of a load; reading takes the bulk."""

PROGRESS_SECONDS = 0.05

LANES = 4
"""So many requests at most are worked on at once, each on its own thread, where one does not keep all cores busy."""

MASKS = ("masked_bias", "attn.bias", "attention.bias")
"""Last parts of the names of masks, which older files hold, in which infinite values are meant."""

UNKNOWN_POSITIONS = 8192
"""What a conversation may take of a model that does not say how far it looks back."""

SPEAKS = {"system": "", "user": "\n\nUser: ", "assistant": "\n\nAssistant: "}
"""How a conversation is put to a model without a chat template."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the model reads it: its text, in the chat template where `templated`, and its tokens."""

    text: str
    tokens: list[int]
    templated: bool


@dataclass
class LoadedModel:
    """A model in memory with what it needs to be spoken to."""

    model: Any
    tokenizer: Any
    slots: Slots
    lean: Lean | None
    ends: frozenset[int]
    about: Loaded
    template: ChatTemplate | None = None
    """Its chat template, where it has one that works; `about` says what is wrong with one that does not."""

    def render(self, prompt: Prompt) -> RenderedPrompt:
        """A prompt in the model's chat template, or as plain text where it has none or it is off. Raises Invalid."""
        template = self._template() if prompt.template else None
        if template is None:
            text = f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text
            text += prompt.opening
        else:
            turns = [Turn(role="user", text=prompt.text)]
            if prompt.system:
                turns = [Turn(role="system", text=prompt.system), *turns]
            text = template.prompt(turns, prompt.template_kwargs, "prompt", fixed_day=True)
            text += opening_after(text, prompt.opening)
        tokens = self._tokens(text, template is not None)
        self.require_known(tokens, "prompt")
        return RenderedPrompt(text, tokens, template is not None)

    def prompt_tokens(self, prompt: Prompt, room: int, context_length: int) -> list[int]:
        """The tokens of a prompt. Raises Invalid when it leaves no room for `room` more tokens in the context."""
        rendered = self.render(prompt)
        self.require_room(rendered, room, context_length)
        return rendered.tokens

    def require_room(self, rendered: RenderedPrompt, room: int, context_length: int) -> None:
        """Raises Invalid when a prompt leaves no room for `room` more tokens in the context."""
        positions = positions_of(self.model.config)
        if len(rendered.tokens) + room > min(context_length, positions or context_length):
            raise prompt_too_long(len(rendered.tokens), room, context_length, positions)

    def answer_tokens(self, text: str, ended: bool = True, after: RenderedPrompt | None = None) -> list[int]:
        """An answer as tokens, as it is written `after` a prompt; with the token that ends an assistant's turn where
        the answer ended by itself, so that the model learns to stop.

        A token may depend on what stands before it, as the space of SentencePiece does: prompt and answer are read
        together, and apart only where the prompt's own tokens would not be the same.
        """
        tokens: list[int] | None = None
        text = self._without_end(text) if ended else text
        if after is not None and text:
            text = opening_after(after.text, text)
            if self.template and after.templated:
                text = self.template.answer_after(after.text, text, ended)
            elif ended:
                text = close_thought(after.text, text)
            both = self._tokens(after.text + text, after.templated)
            if both[: len(after.tokens)] == after.tokens:
                tokens = both[len(after.tokens) :]
        if tokens is None:
            tokens = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        end = self.end_of_turn if after is None or after.templated else self.end_token
        return [*tokens, end] if ended and end is not None else tokens

    def _without_end(self, text: str) -> str:
        """An answer without an end token at its end, as files have it; it is put there as a token."""
        ends = [each for end in self.ends if len(each := str(self.tokenizer.decode([end])).strip()) > 1]
        while cut := next((each for each in ends if text.rstrip().endswith(each)), ""):
            text = text.rstrip().removesuffix(cut)
        return text

    def require_known(self, tokens: Sequence[int], field: str) -> None:
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

    def conversation(self, request: Chat) -> Prepared:
        """A conversation as tokens, without its oldest turns where it may be trimmed and does not fit. Raises Invalid.

        A quarter of the context, or the longest answer where that is less, is kept free for the answer.
        """
        limit = positions_of(self.model.config) or UNKNOWN_POSITIONS
        most = request.sampling.max_new_tokens
        room = min(most, limit // 4) if request.trims else 1
        stop, thinks = request.stop, False
        last = request.turns[-1].text.strip() if request.turns and request.turns[-1].role == "user" else ""
        least = vocabulary_of(self.tokenizer).fewest_tokens(last if request.turns else request.text)
        if least + room > limit:  # known without tokenizing it
            raise too_long(least, limit, at_least=True)
        if not request.turns:
            tokens = self._tokens(request.text, False)
        else:
            tokens, thinks = self._turn_tokens(request.turns, request)
            if not (self.template and request.template):
                stop = (*stop, SPEAKS["user"])
        self.require_known(tokens, "messages")
        left_out = 0
        if len(tokens) + room > limit:
            if not request.trims or not request.turns:
                raise too_long(len(tokens), limit)
            tokens, left_out = self._trimmed(request, limit - room, len(tokens))
        return Prepared(tokens, left_out, limit, most, stop, thinks)

    def _trimmed(self, request: Chat, most: int, whole: int) -> tuple[list[int], int]:
        """The longest end of a conversation that fits, after what the system said, and how many turns it leaves out."""
        said = [turn for turn in request.turns if turn.role == "system"]
        rest = [turn for turn in request.turns if turn.role != "system"]
        last = max((place for place, turn in enumerate(rest) if turn.role == "user"), default=0)
        beginnings = [place for place, turn in enumerate(rest[: last + 1]) if turn.role == "user" and place] or [0]
        low, high, reach = 0, len(beginnings) - 1, 1
        best: tuple[list[int], int] | None = None
        while low <= high:
            middle = max((low + high) // 2, high - reach)  # from the end, so that little more is tokenized than fits
            reach *= 2
            tokens, _ = self._turn_tokens([*said, *rest[beginnings[middle] :]], request)
            if len(tokens) <= most:
                best, high = (tokens, beginnings[middle]), middle - 1
            else:
                low, whole = middle + 1, len(tokens)
        if best is None:
            raise too_long(whole, most)
        return best

    def _turn_tokens(self, turns: Sequence[Turn], request: Chat) -> tuple[list[int], bool]:
        """Turns as tokens, and whether the answer begins in a thought that the template has opened."""
        opening = ""
        if turns[-1].role == "assistant":
            opening, turns = turns[-1].text, turns[:-1]
        if not turns:
            raise Invalid(
                "Nothing was said before the answer that is to be continued.", field="messages",
                next_step="Begin with a message of the user.",
            )  # fmt: skip
        template = self._template() if request.template else None
        if template is not None:
            text = template.prompt(turns, request.template_kwargs, "messages")
            return self._tokens(template.go_on(text, opening), True), in_thought(text) and not opening
        lines = "".join(f"{SPEAKS[turn.role]}{turn.text}" for turn in turns).lstrip()
        speaks = SPEAKS["assistant"] if opening and not opening[0].isspace() else SPEAKS["assistant"].rstrip(" ")
        return self._tokens(lines + speaks + opening, False), False

    def _template(self) -> ChatTemplate | None:
        """The model's chat template, None where it has none. Raises Invalid where it has one that does not work."""
        if self.about.template_problem:
            raise Invalid(
                f"The model's chat template cannot be used: {self.about.template_problem}",
                code="bad_template",
                field="chat_template",
                next_step=NEXT_STEP,
            )
        return self.template

    def _tokens(self, text: str, templated: bool) -> list[int]:
        """Text as tokens: a template writes its special tokens itself; of plain text there is at least one token."""
        if templated and self.template:
            return self.template.encode(text)
        tokens = list(self.tokenizer(text)["input_ids"])
        if len(tokens) > 1 and tokens[-1] in self.ends:  # some tokenizers close every text
            tokens = tokens[:-1]
        return tokens or [self.tokenizer.bos_token_id or self.end_token or 0]

    @property
    def end_token(self) -> int | None:
        """What ends a plain text."""
        own = self.tokenizer.eos_token_id
        return own if own is not None else min(self.ends, default=None)

    @cached_property
    def end_of_turn(self) -> int | None:
        """What ends an assistant's turn: the end that the chat template writes there, else the tokenizer's own."""
        written = self.template.end_token(self.ends) if self.template else None
        return self.end_token if written is None else written


def read_model(
    path: Path, request: Load, own: torch.dtype | None = None
) -> Generator[Progress | None, None, LoadedModel]:
    """Load a folder: yields progress of true bytes and tensors, returns the model. `own` is a precision to keep
    instead of the one that the request names.

    Raises LoadFailed with the code of what went wrong and a way out.
    """
    started = time.monotonic()
    yield Progress(stage="initializing", fraction=INITIALIZING, message="Reading the config")
    device = device_for(request)
    precision = precision_for(request.precision, device)
    described = require_loadable(path, precision, request.remote_code)
    config, tokenizer = _read_config(path, request.remote_code)
    _require_rows(described, tokenizer)
    dtype = torch.float32 if precision == "32-bit" or (device == "cpu" and precision != "16-bit") else torch.bfloat16
    dtype = own or dtype
    digests = _digests(path, precision)
    quantized = quantization_method(described)
    state = yield from _read_tensors(described, None if quantized else dtype, digests)
    if quantized:
        yield Progress(stage="parsing", fraction=PARSING, message=f"Dequantizing weights from {quantized}")
        state = dequantize(state, quantized, described.quantization or {}, dtype)
        for name, tensor in state.items():
            if not is_finite(name, tensor):
                raise _not_finite(name, path.name, tensor)
    yield Progress(stage="parsing", fraction=PARSING, message="Loading weights")
    if precision in ("8-bit", "4-bit"):
        yield Progress(stage="quantizing", fraction=PLACING, message=f"Quantizing to {precision}")
    model = _build(path, config, state, dtype, precision, device, request)
    del state
    model.requires_grad_(False)
    if device == "cpu" and any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        from .quantized_linear import replace_4bit_layers  # needs bitsandbytes, which is there if it made such layers

        replace_4bit_layers(model)
    if precision in ("32-bit", "16-bit"):
        yield from _move(model, device)
    yield Progress(stage="warming_up", fraction=WARMING, message="Warming up")
    rows = _rows_of_logits(model, config, device, precision)
    lean, lanes = Lean.of(model), 1
    if device == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL:
        lanes = min(LANES, torch.get_num_threads()) if lean else 1
        torch.set_num_threads(1)
    slots = Slots(model, lean, Crew(lanes))
    if lean is None:  # the lean pass is known to be right
        _require_causal(slots)
    template, problem = _read_template(path, tokenizer)
    about = Loaded(
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
        can_switch_thinking=template is not None and template.switch is not None,
        positions=positions_of(config),
        lanes=lanes,
    )
    ends = _ends(path, config, tokenizer)
    vocabulary = vocabulary_of(tokenizer)
    vocabulary.fewest_tokens("")  # looked up here, so that nobody waits for it later
    if missing := sorted(set(vocabulary.missing(rows)) - ends):
        slots.missing = torch.tensor(missing, device=device)
        if lean is not None:
            lean.missing = slots.missing
    return LoadedModel(model, tokenizer, slots, lean, ends, about, template)


def _require_causal(slots: Slots) -> None:
    """Find out how the model goes on with a text. Raises LoadFailed for one that fills gaps instead."""
    if not slots.caching.causal:
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
        return (probe(tokenizer, source) if source else None), ""
    except TemplateFailed as failure:
        return None, str(failure)


def _digests(path: Path, precision: Precision) -> list[Any]:
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
    digests = [digest for precision in precisions for digest in _digests(path, precision)]
    for file in inspect_folder(path).weight_paths:
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
        f"The file “{file.name}” is not a complete safetensors file: {error}",
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
            next_step="Choose “auto” or “cpu”. Run `trellis doctor` to see all devices.",
        )
    return request.device


def precision_for(wanted: Precision, device: str) -> Precision:
    if wanted == "auto":
        return "32-bit" if device == "cpu" else "16-bit"
    return wanted


def prompt_too_long(tokens: int, room: int, context_length: int, positions: int | None) -> Invalid:
    """Why a prompt does not fit, with the ways out that can work: no option makes a model look back further."""
    limit = min(context_length, positions or context_length)
    left = limit - tokens
    ways = [f"allow answers of at most {left} tokens"] if left > 0 else []
    if context_length < (positions or context_length + 1):
        most = f" (at most {positions})" if positions else ""
        ways.append(f"use a longer context{most}")
    whose = "the model, which can look back on no more" if limit == positions else "the session"
    return Invalid(
        f"The prompt has {tokens} tokens; with answers of up to {room} it does not fit into the context of {limit} of "
        f"{whose}.",
        code="prompt_too_long",
        field="prompt",
        next_step="Shorten the prompt" + "".join(f", or {way}" for way in ways) + ".",
    )


def positions_of(config: Any) -> int | None:
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
        raise _not_readable(error) from None
    except ImportError as error:
        raise _library_missing(error) from None
    except (StrictDataclassError, RecursionError, *UNREADABLE) as error:
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
        raise _not_readable(error) from None
    except ImportError as error:
        raise _library_missing(error) from None
    except Exception as error:  # noqa: BLE001 - the library raises plain exceptions for files that it cannot read
        raise LoadFailed(
            f"The model's tokenizer can't be used: {_first_line(error)}",
            code="corrupt_file",
            next_step="Copy the tokenizer's files again. If they were made by a newer version of tokenizers, update it "
            "and transformers.",
        ) from None
    return tokenizer


def _library_missing(error: ImportError) -> LoadFailed:
    return LoadFailed(
        f"A library that this model needs is not installed: {_first_line(error)}",
        code="not_installed",
        next_step="Install it where Trellis runs, then load the model again.",
    )


def _require_rows(described: ModelFiles, tokenizer: Any) -> None:
    """Raises LoadFailed for a tokenizer with tokens that the model has no row for, where it came in another file than
    the tokenizer.json that was looked into before."""
    rows = described.embedding_rows
    if rows is None or described.vocabulary is not None:
        return
    added = tokenizer.get_added_vocab()
    known = Vocabulary(max((number for text, number in tokenizer.get_vocab().items() if text not in added), default=-1),
                       added)  # fmt: skip
    template = json.dumps(tokenizer.chat_template or "", ensure_ascii=False, default=str)
    needed = f"{template}\n{tokenizer.bos_token}\n{tokenizer.eos_token}"
    if beyond := token_beyond_embedding(known, rows, needed):
        raise tokenizer_too_large_problem(beyond, rows).to_error()


def _not_readable(error: PermissionError) -> LoadFailed:
    return LoadFailed(
        f"No permission to read the file “{error.filename}”.",
        code="permission_denied",
        next_step="Give the studio's user read access.",
    )


def _read_tensors(
    described: ModelFiles, dtype: torch.dtype | None, digests: list[Any]
) -> Generator[Progress | None, None, dict[str, Tensor]]:
    """All tensors in the precision that is wanted, or as they are stored, each copied out of its file as it is read.

    Raises LoadFailed for a file that is not whole, and for a value that is not finite.
    """
    files = described.weight_paths
    total = sum(file.stat().st_size for file in files)
    state: dict[str, Tensor] = {}
    done = 0
    begun = told = time.monotonic()
    yield Progress(stage="reading", fraction=READING, message="Reading weights", bytes=0, total_bytes=total)
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    stored = tensors.get_tensor(name)
                    sampled = _sample(stored)
                    for digest in digests:
                        digest.update(name.encode())
                        digest.update(sampled)
                    done += stored.nbytes
                    kept = stored.to(dtype, copy=True) if dtype and stored.is_floating_point() else stored.clone()
                    if dtype and not is_finite(name, kept):
                        raise _not_finite(name, file.name, stored)
                    state[name] = kept
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
        except PermissionError as error:
            raise _not_readable(error) from None
        except SafetensorError as error:
            raise _torn(file, error) from None
    return state


def is_finite(name: str, tensor: Tensor) -> bool:
    """Whether all values of a tensor are numbers, in one pass: its extremes are NaN or infinite where one of them is.

    It takes a fifth of the time of copying the tensor (docs/log.md).
    """
    if not tensor.is_floating_point() or not tensor.numel() or name.endswith(MASKS):
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _not_finite(name: str, place: str, stored: Tensor) -> LoadFailed:
    count = int((~torch.isfinite(stored.float())).sum())
    if count:
        return LoadFailed(
            f"The tensor “{name}” in “{place}” contains {count} values that are not numbers (NaN or infinite).",
            code="corrupt_file",
            next_step="Copy or download the file again, or choose another model.",
        )
    return LoadFailed(
        f"The tensor “{name}” in “{place}” contains values that are too large for the precision.",
        code="corrupt_file",
        field="precision",
        next_step="Choose 32-bit.",
    )


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
            kind = _own_class(path, config)
        else:
            raise ValueError("it is not a causal language model")
        model, info = kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options
        )  # fmt: skip
    except WHAT_LIBRARIES_RAISE as error:
        raise _cannot_be_used(config, error, "loaded") from None
    if info["missing_keys"] or info.get("mismatched_keys"):
        missing = sorted(str(key) for key in info["missing_keys"] or info["mismatched_keys"])
        raise LoadFailed(
            f"{len(missing)} tensors are missing from the model's files, such as “{missing[0]}”.",
            code="corrupt_file",
            next_step="Copy or download the model again.",
        )
    return model.eval()


def _rows_of_logits(model: Any, config: Any, device: str, precision: Precision) -> int:
    """Read a few tokens once, and return how many tokens the model can answer with. Raises LoadFailed for a model that
    can be put together and cannot be run here."""
    ids = torch.zeros((1, 8), dtype=torch.long, device=device)
    try:
        with torch.inference_mode():
            return int(model(input_ids=ids, use_cache=False).logits.shape[-1])
    except WHAT_LIBRARIES_RAISE as error:
        found = _cannot_be_used(config, error, "run")
        if precision in ("8-bit", "4-bit") and getattr(found, "code", "") == "unsupported_architecture":
            found = LoadFailed(
                f"The model cannot read a text in {precision}, as it is where a model uses the weights of some layers "
                f"directly: {_first_line(error)}",
                code="unsupported_architecture",
                field="precision",
                next_step="Choose 16-bit or 32-bit.",
            )
        raise found from None


WHAT_LIBRARIES_RAISE = (
    StrictDataclassError, ImportError, ValueError, LookupError, RuntimeError, TypeError, AttributeError,
    ArithmeticError, AssertionError,
)  # fmt: skip
"""What transformers and a model's own code raise for a model that they cannot put together or run."""


def _cannot_be_used(config: Any, error: Exception, verb: str) -> Exception:
    """Why an architecture cannot be used, as an error for a person; what is told otherwise is returned as it is."""
    if isinstance(error, torch.OutOfMemoryError) or re.search(r"memory|CUDA error|CUBLAS|MPS backend", str(error)):
        return error
    if isinstance(error, ImportError):
        return _library_missing(error)
    return LoadFailed(
        f"The architecture “{config.model_type}” could not be {verb}: {_first_line(error)}",
        code="unsupported_architecture",
        next_step="Update transformers if the architecture is new, or choose a causal language model that it knows.",
    )


def _own_class(path: Path, config: Any) -> Any:
    """The class of a model that brings its own code, which runs now. Raises ValueError where it brings none."""
    named = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if not named:
        raise ValueError("its own code has no causal language model")
    kind = get_class_from_dynamic_module(named, path, local_files_only=True)
    kind.register_for_auto_class("AutoModelForCausalLM")  # so that its code goes along when it is saved
    return add_generation_mixin_to_remote_model(kind)


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
    described = require_loadable(path, precision, request.remote_code)
    shape = shape_of(described.config, {name: list(about["shape"]) for name, about in described.tensors.items()})
    needed = estimate(shape, SessionConfig(), precision).loading
    free = psutil.virtual_memory().available
    if needed > free:
        raise LoadFailed(
            f"The model needs about {needed / 1e9:.1f} GB in {precision}; {free / 1e9:.1f} GB are free.",
            code="out_of_memory",
            next_step="Choose a lower precision or a smaller model, or close other programs. The download is kept.",
        )
