"""What the tokens of a vocabulary write, as bytes, and token sequences as text that comes out the same in any pieces.

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
"""How SentencePiece vocabularies with byte fallback write a single byte."""

CONTEXT = 8
"""Tokens before an answer that are decoded with it where the bytes of the vocabulary are not known."""

_known: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a tokenizer, read once."""
    if tokenizer not in _known:
        _known[tokenizer] = Vocabulary(tokenizer)
    return _known[tokenizer]


@dataclass(frozen=True)
class Spelling:
    """How a decoder turns entries of the vocabulary into bytes."""

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strips: bool = False
    """Whether a space at the beginning of a text is dropped: the tokenizer puts one there."""


class Vocabulary:
    """The entries of one tokenizer's vocabulary: byte-level BPE, SentencePiece with or without byte fallback. What any
    other tokenizer writes is not known token by token; `spelling` is None then."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.spelling = _spelling_of(backend) if backend is not None else None
        self._backend = backend
        self._tokenizer = proxy(tokenizer)  # it is known by this one, and would never be let go
        self._bytes: dict[int, bytes] = {}
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        self._special |= {token for token, about in added.items() if getattr(about, "special", False)}

    def is_special(self, token: int) -> bool:
        """Whether a token marks something instead of writing text."""
        return token in self._special

    def name(self, token: int) -> str:
        """The entry itself, as the vocabulary has it."""
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text; nothing for special ones and for rows without an entry. Only where the spelling
        is known."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = b"" if self.is_special(token) else self._spelled(token)
        return found

    def missing(self, rows: int) -> list[int]:
        """Rows of an embedding with so many that no token belongs to: many are padded to a round number."""
        known: Collection[int] = range(len(self._tokenizer))
        with suppress(NotImplementedError, AttributeError):
            known = set(self._tokenizer.get_vocab().values())
            if self._backend is None:  # one that is code may give several tokens the same name here
                known |= set(range(self._tokenizer.vocab_size))
        return [row for row in range(rows) if row not in known]

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that a text has at least, without tokenizing it; 0 where nothing is certain.

        No token can stand for more bytes than the longest entry writes. That holds where no byte of the text is
        dropped or merged before it is looked up: byte-level BPE, or byte fallback, without normalization beyond NFC
        (which makes UTF-8 at most three times shorter, Unicode FAQ) and without tokens that swallow spaces around them.
        """
        return len(text.encode("utf-8", "replace")) // self._longest if self._longest else 0

    @cached_property
    def _longest(self) -> int:
        """Bytes of text that one token stands for at most; 0 where that is not certain."""
        if self.spelling is None or self._backend is None or type(self._backend.model).__name__ != "BPE":
            return 0
        vocabulary = self._tokenizer.get_vocab()
        bytes_by_name = BYTES if self.spelling.byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        if not (self.spelling.byte_level or self._backend.model.byte_fallback) or set(bytes_by_name) - set(vocabulary):
            return 0
        added = self._tokenizer.added_tokens_decoder.values()
        shrinks = _shrinks(self._backend.normalizer)
        if shrinks is None or _drops(self._backend.pre_tokenizer) or any(each.lstrip or each.rstrip for each in added):
            return 0
        spelled = max(len(self._spelled(token)) for token in vocabulary.values())
        return shrinks * max(spelled, max((len(each.content.encode()) for each in added), default=0))

    def _spelled(self, token: int) -> bytes:
        assert self._backend is not None
        assert self.spelling is not None
        entry = self._backend.id_to_token(token)
        if entry is None:
            return b""
        if self.spelling.byte_level:
            if all(letter in BYTES for letter in entry):
                return bytes(BYTES[letter] for letter in entry)
            return str(entry).encode()  # an added token, which is written as it is
        for old, new in self.spelling.replacements:
            entry = entry.replace(old, new)
        if self.spelling.byte_fallback and (byte := BYTE_TOKEN.fullmatch(entry)):
            return bytes([int(byte[1], 16)])
        return str(entry).encode()


def _byte_letters() -> dict[str, int]:
    """The letters of byte-level BPE and the bytes that they stand for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_letters()


def _spelling_of(backend: Any) -> Spelling | None:
    """The spelling that a decoder of `tokenizers` amounts to; None for one that does not work token by token."""
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
    return Spelling(replacements=tuple(replacements), byte_fallback=fallback, strips=strips)


def _shrinks(normalizer: Any) -> int | None:
    """How many times shorter a normalizer may make a text at most; None where that is not known."""
    if normalizer is None:
        return 1
    about = json.loads(normalizer.__getstate__())
    found = 1
    for step in about["normalizers"] if about["type"] == "Sequence" else [about]:
        match step:
            case {"type": "NFC"}:
                found *= 3
            case {"type": "Prepend"} | {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case _:
                return None
    return found


def _drops(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer may leave out parts of a text."""
    if pre_tokenizer is None:
        return False
    about = json.loads(pre_tokenizer.__getstate__())
    steps = about["pretokenizers"] if about["type"] == "Sequence" else [about]
    keeps = {"ByteLevel", "Digits", "Metaspace"}
    return any(step["type"] not in keeps and step.get("behavior", "Removed") == "Removed" for step in steps)


@dataclass(frozen=True)
class Piece:
    """What one token adds to a text that has grown so far. Pieces joined are the whole text, `raw` its bytes."""

    text: str
    raw: bytes
    pending: int = 0
    """So many of its last bytes begin a character that is not whole yet; its text comes with the token that ends it."""


class TextReader:
    """Tokens to text, some at a time. Half a character is held back until it is whole.

    `before` are the tokens that the text goes on from: a space at its beginning is a part of it only where a text
    stands before it.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        vocabulary = vocabulary_of(tokenizer)
        self._source = _ByBytes(vocabulary, before) if vocabulary.spelling else _ByDecoding(tokenizer, before)

    def read(self, tokens: Sequence[int]) -> str:
        """The text that these tokens add, up to the last whole character."""
        return "".join([self._source.add(token).text for token in tokens])

    def piece(self, token: int) -> Piece:
        """What a token adds."""
        return self._source.add(token)

    def peek(self, token: int) -> Piece:
        """What a token would add."""
        return self._source.peek(token)

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._source.rest()


class _ByBytes:
    """By the bytes of the vocabulary."""

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int]) -> None:
        assert vocabulary.spelling is not None
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips = vocabulary.spelling.strips and not (before and vocabulary.bytes_of(before[-1]))

    def add(self, token: int) -> Piece:
        raw = self._raw(token)
        self._strips = self._strips and not self._vocabulary.bytes_of(token)
        return Piece(self._decoder.decode(raw), raw, len(self._decoder.getstate()[0]))

    def peek(self, token: int) -> Piece:
        state, raw = self._decoder.getstate(), self._raw(token)
        piece = Piece(self._decoder.decode(raw), raw, len(self._decoder.getstate()[0]))
        self._decoder.setstate(state)
        return piece

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)

    def _raw(self, token: int) -> bytes:
        raw = self._vocabulary.bytes_of(token)
        return raw.removeprefix(b" ") if self._strips else raw


class _ByDecoding:
    """By decoding the last tokens again with each new one, for tokenizers of which the bytes are not known."""

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(before[-CONTEXT:])
        self._start = 0
        self._read = len(self._tokens)

    def add(self, token: int) -> Piece:
        self._tokens.append(token)
        text = self._new()
        if text:
            self._start, self._read = self._read, len(self._tokens)
        return Piece(text, text.encode())

    def peek(self, token: int) -> Piece:
        self._tokens.append(token)
        text = self._new()
        self._tokens.pop()
        return Piece(text, text.encode())

    def rest(self) -> str:
        known, longer = self._decoded()
        self._start = self._read = len(self._tokens)
        return longer[len(known) :]

    def _new(self) -> str:
        known, longer = self._decoded()
        return "" if len(longer) <= len(known) or longer.endswith("\ufffd") else longer[len(known) :]

    def _decoded(self) -> tuple[str, str]:
        window = self._tokens[self._start :]
        return self._text(window[: self._read - self._start]), self._text(window)

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
