"""The bytes that each token of a vocabulary writes, and incremental detokenization with the same result for any chunks.

It knows tokenizers; not models, sampling or chat templates.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, proxy

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A single byte in SentencePiece vocabularies with byte fallback."""

CONTEXT_TOKENS = 8
"""Tokens before an answer that are decoded with it if the vocabulary's bytes are unknown."""

_vocabularies: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """Return the vocabulary of a tokenizer, read once."""
    if tokenizer not in _vocabularies:
        _vocabularies[tokenizer] = Vocabulary(tokenizer)
    return _vocabularies[tokenizer]


@dataclass(frozen=True)
class Spelling:
    """How a decoder turns vocabulary entries into bytes."""

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strips_leading_space: bool = False
    """Whether a space at the beginning of a text is dropped, because the tokenizer adds one."""


class Vocabulary:
    """The entries of a tokenizer's vocabulary: byte-level BPE, SentencePiece with or without byte fallback. For other
    tokenizers the bytes of a token are unknown, and `spelling` is None."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.spelling = _find_spelling(backend) if backend is not None else None
        self._backend = backend
        self._tokenizer = proxy(tokenizer)  # a key of the weak dictionary must not be kept alive by its value
        self._bytes: dict[int, bytes] = {}
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        self._special |= {token for token, about in added.items() if getattr(about, "special", False)}

    def is_special(self, token: int) -> bool:
        """Whether a token is a marker rather than text."""
        return token in self._special

    def name(self, token: int) -> str:
        """Return the entry as it stands in the vocabulary."""
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def bytes_of(self, token: int) -> bytes:
        """Return what a token adds to a text; nothing for special tokens and rows without an entry. Only if the
        spelling is known."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = b"" if self.is_special(token) else self._spell(token)
        return found

    def unused_rows(self, rows: int) -> list[int]:
        """Return the rows of an embedding without a token: many are padded to a round number."""
        known: Collection[int] = range(len(self._tokenizer))
        with suppress(NotImplementedError, AttributeError):
            known = set(self._tokenizer.get_vocab().values())
            if self._backend is None:  # tokenizers in Python may give several tokens the same name
                known |= set(range(self._tokenizer.vocab_size))
        return [row for row in range(rows) if row not in known]

    def fewest_tokens(self, text: str) -> int:
        """Return a lower bound on the number of tokens of a text without tokenizing it; 0 if unknown.

        No token stands for more bytes than the longest entry. This holds if no byte is dropped or merged before lookup:
        byte-level BPE, or byte fallback, without normalization beyond NFC (which shortens UTF-8 by a factor of at most
        three, Unicode FAQ) and without tokens that strip spaces around them.
        """
        return len(text.encode("utf-8", "replace")) // self._max_bytes_per_token if self._max_bytes_per_token else 0

    @cached_property
    def _max_bytes_per_token(self) -> int:
        """The most bytes of text that one token stands for; 0 if unknown."""
        if self.spelling is None or self._backend is None or type(self._backend.model).__name__ != "BPE":
            return 0
        vocabulary = self._tokenizer.get_vocab()
        bytes_by_name = BYTE_LETTERS if self.spelling.byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        if not (self.spelling.byte_level or self._backend.model.byte_fallback) or set(bytes_by_name) - set(vocabulary):
            return 0
        added = self._tokenizer.added_tokens_decoder.values()
        shrink_factor = _max_shrink_factor(self._backend.normalizer)
        if (
            shrink_factor is None
            or _may_drop_text(self._backend.pre_tokenizer)
            or any(each.lstrip or each.rstrip for each in added)
        ):
            return 0
        spelled = max(len(self._spell(token)) for token in vocabulary.values())
        return shrink_factor * max(spelled, max((len(each.content.encode()) for each in added), default=0))

    def _spell(self, token: int) -> bytes:
        assert self._backend is not None
        assert self.spelling is not None
        entry = self._backend.id_to_token(token)
        if entry is None:
            return b""
        if self.spelling.byte_level:
            if all(letter in BYTE_LETTERS for letter in entry):
                return bytes(BYTE_LETTERS[letter] for letter in entry)
            return str(entry).encode()  # an added token, written literally
        for old, new in self.spelling.replacements:
            entry = entry.replace(old, new)
        if self.spelling.byte_fallback and (byte := BYTE_TOKEN.fullmatch(entry)):
            return bytes([int(byte[1], 16)])
        return str(entry).encode()


def _make_byte_letters() -> dict[str, int]:
    """Return the letters of byte-level BPE and the bytes they stand for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_LETTERS = _make_byte_letters()


def _find_spelling(backend: Any) -> Spelling | None:
    """Return the spelling equivalent to a decoder of `tokenizers`; None if it does not work token by token."""
    if backend.decoder is None:
        return None
    about = json.loads(backend.decoder.__getstate__())
    steps = about["decoders"] if about["type"] == "Sequence" else [about]
    if [step["type"] for step in steps if step["type"] != "Fuse"] == ["ByteLevel"]:
        return Spelling(byte_level=True)
    replacements: list[tuple[str, str]] = []
    fallback = strips = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": old}:
                replacements.append((old, " "))
                strips = strips or step.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": start, "stop": 0} if start <= 1:
                strips = strips or start == 1
            case {"type": "ByteFallback"}:
                fallback = True
            case {"type": "Fuse"}:
                pass
            case _:
                return None
    return Spelling(replacements=tuple(replacements), byte_fallback=fallback, strips_leading_space=strips)


def _max_shrink_factor(normalizer: Any) -> int | None:
    """Return the factor by which a normalizer may shorten a text at most; None if unknown."""
    if normalizer is None:
        return 1
    about = json.loads(normalizer.__getstate__())
    factor = 1
    for step in about["normalizers"] if about["type"] == "Sequence" else [about]:
        match step:
            case {"type": "NFC"}:
                factor *= 3
            case {"type": "Prepend"} | {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case _:
                return None
    return factor


def _may_drop_text(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer may drop parts of a text."""
    if pre_tokenizer is None:
        return False
    about = json.loads(pre_tokenizer.__getstate__())
    steps = about["pretokenizers"] if about["type"] == "Sequence" else [about]
    harmless = {"ByteLevel", "Digits", "Metaspace"}
    return any(step["type"] not in harmless and step.get("behavior", "Removed") == "Removed" for step in steps)


@dataclass(frozen=True)
class TextPiece:
    """What one token adds to a text. The pieces joined are the whole text, their `raw` its bytes."""

    text: str
    raw: bytes
    pending: int = 0
    """How many of its last bytes begin an incomplete character; the text comes with the token that completes it."""


class IncrementalDetokenizer:
    """Tokens to text, incrementally. Incomplete characters are held back.

    `before` are the preceding tokens: a space at the beginning is only part of the text if something precedes it.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        vocabulary = vocabulary_of(tokenizer)
        self._method = (
            _ByteDetokenizer(vocabulary, before) if vocabulary.spelling else _WindowDetokenizer(tokenizer, before)
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text these tokens add, up to the last complete character."""
        return "".join([self._method.add(token).text for token in tokens])

    def add(self, token: int) -> TextPiece:
        """Return what a token adds."""
        return self._method.add(token)

    def peek(self, token: int) -> TextPiece:
        """Return what a token would add."""
        return self._method.peek(token)

    def flush(self) -> str:
        """Return what was held back, at the end."""
        return self._method.flush()


class _ByteDetokenizer:
    """By the bytes of the vocabulary."""

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int]) -> None:
        assert vocabulary.spelling is not None
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips = vocabulary.spelling.strips_leading_space and not (before and vocabulary.bytes_of(before[-1]))

    def add(self, token: int) -> TextPiece:
        raw = self._raw(token)
        self._strips = self._strips and not self._vocabulary.bytes_of(token)
        return TextPiece(self._decoder.decode(raw), raw, len(self._decoder.getstate()[0]))

    def peek(self, token: int) -> TextPiece:
        state, raw = self._decoder.getstate(), self._raw(token)
        piece = TextPiece(self._decoder.decode(raw), raw, len(self._decoder.getstate()[0]))
        self._decoder.setstate(state)
        return piece

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def _raw(self, token: int) -> bytes:
        raw = self._vocabulary.bytes_of(token)
        return raw.removeprefix(b" ") if self._strips else raw


class _WindowDetokenizer:
    """By decoding the last tokens again with each new one, for tokenizers whose bytes are unknown."""

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(before[-CONTEXT_TOKENS:])
        self._start = 0
        self._decoded_count = len(self._tokens)

    def add(self, token: int) -> TextPiece:
        self._tokens.append(token)
        text = self._new_text()
        if text:
            self._start, self._decoded_count = self._decoded_count, len(self._tokens)
        return TextPiece(text, text.encode())

    def peek(self, token: int) -> TextPiece:
        self._tokens.append(token)
        text = self._new_text()
        self._tokens.pop()
        return TextPiece(text, text.encode())

    def flush(self) -> str:
        before, after = self._decode_window()
        self._start = self._decoded_count = len(self._tokens)
        return after[len(before) :]

    def _new_text(self) -> str:
        before, after = self._decode_window()
        return "" if len(after) <= len(before) or after.endswith("\ufffd") else after[len(before) :]

    def _decode_window(self) -> tuple[str, str]:
        window = self._tokens[self._start :]
        return self._decode(window[: self._decoded_count - self._start]), self._decode(window)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
