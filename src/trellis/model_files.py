"""Read what describes a model folder: configurations, headers, the vocabulary's size. No weights are read.

It reads within bounds, trusts nothing, and imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import mmap
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import LoadFailed, shorten
from .safetensors_files import READ_ERRORS, read_header

WEIGHT_INDEX = "model.safetensors.index.json"

CONFIG_LIMIT = 16_000_000
INDEX_LIMIT = 64_000_000
HEADER_LIMIT = 32_000_000
TOKENIZER_LIMIT = 256_000_000
"""Bytes of a file that are parsed at most; the largest that are published have a tenth of it."""

EMBEDDING_SUFFIXES = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
"""Endings of names of the embedding tensor, which has a row for each token."""

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """Why a model cannot be loaded, and what to do: two whole sentences. `field` is the option that it is about."""

    message: str
    next_step: str
    code: str
    field: str = "model"

    def to_error(self) -> LoadFailed:
        """The problem as an error. Only an option that can be chosen otherwise is named as its field."""
        own = self.field if self.field != "model" else None
        return LoadFailed(self.message, code=self.code, next_step=self.next_step, field=own)

    def full_text(self) -> str:
        return f"{self.message} {self.next_step}"


@dataclass(frozen=True)
class ModelFiles:
    """A model folder as its small files and headers describe it. `tensors` holds each tensor's entry in the header of
    its file (dtype, shape); `read_problems` are those of files that could not be read, in order."""

    path: Path
    config: Config = field(default_factory=dict)
    tokenizer_config: Config = field(default_factory=dict)
    file_names: frozenset[str] = frozenset()
    weight_paths: tuple[Path, ...] = ()
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    read_problems: tuple[Problem, ...] = ()

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type") or "")

    @property
    def architecture(self) -> str:
        listed = self.config.get("architectures")
        return str(listed[0]) if isinstance(listed, list) and listed else ""

    @property
    def text_config(self) -> Config:
        inner = self.config.get("text_config")
        return {**self.config, **inner} if isinstance(inner, dict) else self.config

    @property
    def embedding(self) -> tuple[str, list[int]] | None:
        """Return name and shape (rows, hidden) of the input embedding; None if unknown."""
        for name, about in self.tensors.items():
            shape = about.get("shape", [])
            of_text = not any(other in name for other in ("vision", "visual", "audio"))
            if (
                name.endswith(EMBEDDING_SUFFIXES)
                and of_text
                and len(shape) == 2
                and about.get("dtype") in _FLOAT_DTYPES
            ):
                return name, shape
        return None

    @property
    def embedding_rows(self) -> int | None:
        """For how many tokens the model has a row in its embedding."""
        if found := self.embedding:
            return found[1][0]
        size = self.text_config.get("vocab_size")
        return size if isinstance(size, int) and not isinstance(size, bool) else None

    @property
    def max_positions(self) -> int | None:
        """The context length in tokens, if the configuration has it."""
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
            found = self.text_config.get(name)
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
        return None

    @property
    def quantization(self) -> Config | None:
        """The folder's quantization_config, or what an older GPTQ or AWQ folder says in a file of its own."""
        found = self.config.get("quantization_config") or self.text_config.get("quantization_config")
        return found if isinstance(found, dict) else None

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The tokens of tokenizer.json, where it is there and can be read."""
        with suppress(*READ_ERRORS):
            return read_vocabulary(self.path / "tokenizer.json")
        return None


_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def weight_files(path: Path) -> list[Path]:
    """Return the weight files: those in the index, or the single file, or all. Raise one of READ_ERRORS."""
    index = path / WEIGHT_INDEX
    if index.is_file():
        named = read_json(index, INDEX_LIMIT)["weight_map"].values()
        return [path / name for name in sorted(set(named)) if "/" not in name]
    single = path / "model.safetensors"
    return [single] if single.is_file() else sorted(path.glob("*.safetensors"))


FolderSignature = tuple[tuple[str, int, int, bool], ...]
"""Of each entry of a folder its name, size, time of change, and whether it is a file."""


def folder_signature(path: Path) -> FolderSignature:
    """Return a value that changes with the files of a folder. Raise LoadFailed if it is missing or not readable."""
    if not path.is_dir():
        raise LoadFailed(
            f"There is no folder “{path}”.", code="not_found", next_step="Check the name or choose another model."
        )
    marks = []
    try:
        for file in sorted(path.iterdir()):
            try:
                about = file.stat()
            except PermissionError:
                raise
            except OSError:  # it went away, or is a link that leads nowhere or in a circle
                continue
            marks.append((file.name, about.st_size, about.st_ctime_ns, stat.S_ISREG(about.st_mode)))
    except PermissionError:
        raise LoadFailed(
            f"No permission to read the folder “{path}”.", code="permission_denied", next_step=GRANT_READ_ACCESS
        ) from None
    return tuple(marks)


GRANT_READ_ACCESS = "Give the studio's user read access."


def inspect_folder(path: Path) -> ModelFiles:
    """Read the description of a model folder. Raise LoadFailed if it is missing or not readable."""
    signature = folder_signature(path)
    names = frozenset(name for name, _, _, is_file in signature if is_file)
    read_problems: list[Problem] = []

    def read(name: str, limit: int) -> dict[str, Any]:
        if name not in names:
            return {}
        try:
            found = read_json(path / name, limit)
            if not isinstance(found, dict):
                raise ValueError("it holds no JSON object")
            return found
        except READ_ERRORS as error:
            read_problems.append(damaged_file_problem(path / name, error))
            return {}

    config = read("config.json", CONFIG_LIMIT)
    tokenizer_config = read("tokenizer_config.json", CONFIG_LIMIT)
    weights: list[Path] = []
    try:
        weights = weight_files(path)
    except READ_ERRORS as error:
        read_problems.append(damaged_file_problem(path / WEIGHT_INDEX, error))
    tensors: dict[str, Mapping[str, Any]] = {}
    for file in weights:
        if file.name not in names:
            continue
        try:
            tensors |= _read_complete_header(file)
        except READ_ERRORS as error:
            read_problems.append(damaged_file_problem(file, error))
    if not read_problems and WEIGHT_INDEX in names and all(file.name in names for file in weights):
        read_problems += _tensors_missing_from_files(path, tensors)
    return ModelFiles(path, config, tokenizer_config, names, tuple(weights), tensors, tuple(read_problems))


# ── Files ──────────────────────────────────────────────────────────────────────────────────────────────


def _read_complete_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return the header of a safetensors file of the right length. Raise one of READ_ERRORS."""
    header = read_header(file, HEADER_LIMIT)
    ends = [int(about["data_offsets"][1]) for about in header.values()]
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if file.stat().st_size < 8 + length + max(ends, default=0):
        raise ValueError("it ends before its last tensor")
    for about in header.values():
        if not isinstance(about["dtype"], str):
            raise ValueError("a type is not one")
        shape = about["shape"]
        if not isinstance(shape, list) or not all(isinstance(side, int) and 0 <= side < 2**40 for side in shape):
            raise ValueError("a shape is not one")
    return header


def _tensors_missing_from_files(path: Path, tensors: Mapping[str, Any]) -> list[Problem]:
    with suppress(*READ_ERRORS):
        named = read_json(path / WEIGHT_INDEX, INDEX_LIMIT)["weight_map"]
        if missing := sorted(name for name in named if name not in tensors):
            return [
                Problem(
                    f"The tensor “{shorten(missing[0])}” is listed in “{WEIGHT_INDEX}” but is in none of the files.",
                    "Copy or download the model again.",
                    "corrupt_file",
                )
            ]
    return []


def damaged_file_problem(file: Path, error: BaseException) -> Problem:
    if isinstance(error, PermissionError):
        return Problem(f"No permission to read the file “{file}”.", GRANT_READ_ACCESS, "permission_denied")
    with suppress(OSError), file.open("rb") as stream:
        if stream.read(24).startswith(b"version https://git-lfs"):
            return Problem(
                f"The file “{file.name}” is a Git LFS pointer, not the file itself.",
                "Run `git lfs pull` in the folder, or download the model again.",
                "corrupt_file",
            )
    if file.name == WEIGHT_INDEX:
        return Problem(f"The file “{WEIGHT_INDEX}” can't be read.", "Copy or download it again.", "corrupt_file")
    if file.suffix == ".safetensors":
        reason = str(error) if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError) else ""
        detail = f": {reason}." if reason and "codec" not in reason else "."
        return Problem(
            f"The file “{file.name}” is not a complete safetensors file{detail}", "Copy or download the file again.",
            "corrupt_file",
        )  # fmt: skip
    return Problem(f"The file “{file.name}” is not valid JSON.", "Copy or download it again.", "corrupt_file")


def read_json(file: Path, limit: int) -> Any:
    """Read a JSON file. Raise one of READ_ERRORS, also for a pipe or a device, which might never end."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("it is not a file")
    with file.open("rb") as stream:
        text = stream.read(limit + 1)
    if len(text) > limit:
        raise ValueError("it is larger than any model's")
    return json.loads(text)


# ── Tokenizer ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a tokenizer: the largest of its vocabulary, and those of its added tokens by their text."""

    largest_id: int
    added_tokens: Mapping[str, int]


_VOCAB_START = re.compile(rb'"vocab"\s*+:\s*+([{\[])\s*+')
_BPE_ENTRY = re.compile(rb'"(?:[^"\\]++|\\.)*+"\s*+:\s*+(\d++)\s*+,?\s*+')
_UNIGRAM_ENTRY = re.compile(rb'\[\s*+"(?:[^"\\]++|\\.)*+"\s*+,[^\]]*+\]\s*+,?\s*+')
_ADDED_TOKENS_START = re.compile(rb'"added_tokens"\s*+:\s*+(?=\[)')


def read_vocabulary(file: Path) -> Vocabulary:
    """The ids in a tokenizer.json, read from place to place: the file may have tens of megabytes, and parsing it whole
    would hold the interpreter for half a second. Raise one of READ_ERRORS."""
    if file.stat().st_size > TOKENIZER_LIMIT:  # a search holds the interpreter from its beginning to its end
        raise ValueError("it is larger than any model's")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        begin = _VOCAB_START.search(text)
        if begin is None:
            raise ValueError("it has no vocabulary")
        place, largest, count = begin.end(), -1, -1
        pattern = _BPE_ENTRY if begin[1] == b"{" else _UNIGRAM_ENTRY
        while match := pattern.match(text, place):
            place, count = match.end(), count + 1
            largest = max(largest, int(match[1]) if pattern is _BPE_ENTRY else count)
        added: dict[str, int] = {}
        if listed := _ADDED_TOKENS_START.search(text, 0, begin.start()):
            found, _ = json.JSONDecoder().raw_decode(text[listed.end() : begin.start()].decode())
            added = {str(token["content"]): int(token["id"]) for token in found}
    return Vocabulary(largest, added)


# ── What makes two configurations the same model ───────────────────────────────────────────────────────

IGNORED_CONFIG_KEYS = frozenset({
    "transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "_commit_hash", "architectures",
    "_attn_implementation_autoset", "_attn_implementation", "_flash_attn_2_enabled", "unsloth_version",
    "unsloth_fixed", "trl_version", "peft_version", "output_attentions", "output_hidden_states", "return_dict",
})  # fmt: skip
"""Keys of a config.json that change no number of a model as Trellis loads it."""


def canonical_config(text: bytes) -> bytes:
    """A config.json without what does not matter: inert keys, the order of keys, whitespace. Text that is no JSON is
    returned as it is."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return json.dumps(_drop_ignored_keys(found), sort_keys=True, separators=(",", ":")).encode()


def _drop_ignored_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_ignored_keys(inner) for key, inner in value.items() if key not in IGNORED_CONFIG_KEYS}
    return [_drop_ignored_keys(each) for each in value] if isinstance(value, list) else value
