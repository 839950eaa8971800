"""The text of a growing answer and the tokens that are told with it: joined, both are one text, wherever it stops."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import TOKENIZER_KINDS, make_tokenizer_kind
from trellis.engine.text.answer_text import AnswerText, cut_at_stop, partial_stop_length
from trellis.engine.text.vocabulary import IncrementalDetokenizer
from trellis.messages import SampledToken

pytestmark = pytest.mark.engine

ENTRY = SampledToken(text="?", bytes=(), logprob=-1.0)


@cache
def tokenizer_of(kind: str) -> Any:
    return make_tokenizer_kind(Path(mkdtemp()) / kind, kind)


def told(
    kind: str, tokens: list[int], stops: tuple[str, ...], entries: bool = True
) -> list[tuple[str, list[SampledToken]]]:
    answer = AnswerText(IncrementalDetokenizer(tokenizer_of(kind)), stops)
    found = []
    for token in tokens:
        answer.add(token, ENTRY if entries else None)
        if answer.stopped:
            break
        text, drawn = answer.take(ended=False)
        found.append((text, list(drawn)))
    answer.end()
    text, drawn = answer.take(ended=True)
    return [*found, (text, list(drawn))]


def first_stop(kind: str, tokens: list[int], stops: tuple[str, ...]) -> str:
    """The text up to the stop string that is whole with the fewest tokens."""
    for count in range(len(tokens) + 1):
        text, stopped = cut_at_stop(IncrementalDetokenizer(tokenizer_of(kind)).decode(tokens[:count]), stops)
        if stopped:
            return text
    reader = IncrementalDetokenizer(tokenizer_of(kind))
    return cut_at_stop(reader.decode(tokens) + reader.flush(), stops)[0]


TEXTS = st.text("ab 🌱é東", max_size=20)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@settings(max_examples=60)
@given(text=TEXTS, stops=st.lists(st.text("ab 🌱東", min_size=1, max_size=3), max_size=3).map(tuple))
def test_the_tokens_told_are_the_text_told_up_to_the_first_stop(kind: str, text: str, stops: tuple[str, ...]) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = told(kind, tokens, stops)
    for piece, drawn in found:
        assert "".join(entry.text for entry in drawn) == piece, "each piece is that of its own tokens"
        assert b"".join(bytes(entry.bytes) for entry in drawn).decode() == piece
    expected = first_stop(kind, tokens, stops)
    assert "".join(piece for piece, _ in found) == expected
    assert "".join(piece for piece, _ in told(kind, tokens, stops, entries=False)) == expected


@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma"])
@settings(max_examples=60)
@given(tokens=st.lists(st.integers(0, 399), max_size=12))
def test_half_a_character_at_the_end_is_told_once(kind: str, tokens: list[int]) -> None:
    tokens = [token for token in tokens if token < len(tokenizer_of(kind))]
    reader = IncrementalDetokenizer(tokenizer_of(kind))
    whole = reader.decode(tokens) + reader.flush()
    found = told(kind, tokens, ("\ufffd\ufffd",))
    text = "".join(piece for piece, _ in found)
    drawn = [entry for _, entries in found for entry in entries]
    assert text == first_stop(kind, tokens, ("\ufffd\ufffd",))
    assert "".join(entry.text for entry in drawn) == text
    if "\ufffd\ufffd" not in whole:
        assert b"".join(bytes(entry.bytes) for entry in drawn).decode("utf-8", "replace") == text


def test_the_end_and_marks_are_not_told() -> None:
    tokenizer = tokenizer_of("byte-level")
    tokens = tokenizer("The sea", add_special_tokens=False)["input_ids"]
    found = told("byte-level", [*tokens, *tokenizer("<|user|>", add_special_tokens=False)["input_ids"]], ())
    assert "".join(entry.text for _, entries in found for entry in entries) == "The sea"


def test_a_token_is_cut_where_the_text_is() -> None:
    tokenizer = tokenizer_of("gemma")
    (token,) = (at for text, at in tokenizer.get_vocab().items() if text == "▁the")
    found = told("gemma", [token], ("he",))
    assert found == [(" t", [ENTRY.model_copy(update={"text": " t", "bytes": tuple(b" t")})])]


@given(st.text("ab", min_size=1, max_size=30), st.lists(st.text("ab", min_size=1, max_size=200), max_size=16))
def test_what_is_held_back_is_the_longest_beginning_of_a_stop(text: str, stops: list[str]) -> None:
    longest = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    assert partial_stop_length(text, stops) == longest


@given(
    pieces=st.lists(st.text("ab#", max_size=4), max_size=12),
    stops=st.lists(st.text("ab#", min_size=1, max_size=3), max_size=3).map(tuple),
)
def test_what_is_told_is_the_text_up_to_the_first_stop(pieces: list[str], stops: tuple[str, ...]) -> None:
    told, held, stopped = "", "", False
    for piece in pieces:
        text, stopped = cut_at_stop(held + piece, stops)
        keep = 0 if stopped else partial_stop_length(text, stops)
        told, held = told + text[: len(text) - keep], text[len(text) - keep :]
        if stopped:
            break
    whole = "".join(pieces)
    assert told + ("" if stopped else held) == cut_at_stop(whole, stops)[0] or stopped
    if stopped:
        assert all(stop not in told for stop in stops)
        assert whole.startswith(told)
    else:
        assert all(stop not in whole for stop in stops)
