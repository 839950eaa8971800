"""Tokens as bytes and as text: joined pieces are the whole, whatever kind of tokenizer, wherever the text is cut."""

from __future__ import annotations

import gc
import weakref
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.tiny import SENTENCES, TOKENIZER_KINDS, make_tokenizer_kind
from trellis.engine.text.vocabulary import IncrementalDetokenizer, vocabulary_of

pytestmark = pytest.mark.engine

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from([
    "🌱🌱", "👩‍👩‍👧‍👦 and é", "東京 東京", "naïve café", "a  b   c", " begins with a space",
    "ends with one ", "\n\n\tx",
])  # fmt: skip
BY_BYTES = ("byte-level", "llama", "gemma")


@cache
def tokenizer_of(kind: str) -> Any:
    return make_tokenizer_kind(Path(mkdtemp()) / kind, kind)


@pytest.mark.parametrize("kind", BY_BYTES)
@settings(max_examples=60)
@given(text=TEXTS)
def test_bytes_of_tokens_joined_are_the_text(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    words = vocabulary_of(tokenizer)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    raw = b"".join(words.bytes_of(token) for token in tokens)
    assert (raw[1:] if kind == "llama" and text else raw).decode() == text


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@settings(max_examples=40)
@given(text=TEXTS, some=st.integers(1, 5))
def test_pieces_joined_are_what_the_tokenizer_decodes(kind: str, text: str, some: int) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    reader = IncrementalDetokenizer(tokenizer)
    pieces = [reader.decode(tokens[at : at + some]) for at in range(0, len(tokens), some)] + [reader.flush()]
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if kind in BY_BYTES:
        assert "".join(pieces) == text


@pytest.mark.parametrize("kind", BY_BYTES)
@settings(max_examples=40)
@given(before=st.sampled_from(SENTENCES) | TEXTS.filter(bool), text=TEXTS)
def test_a_text_that_is_continued_is_the_text_of_all_tokens(kind: str, before: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    for cut in range(1, len(tokens)):
        first, second = IncrementalDetokenizer(tokenizer), IncrementalDetokenizer(tokenizer, tokens[:cut])
        begun, more = first.decode(tokens[:cut]), second.decode(tokens[cut:]) + second.flush()
        if not first.flush():  # not in the middle of a character
            assert begun + more == before + text


@pytest.mark.parametrize("kind", ["llama", "unigram", "wordpiece"])
def test_the_space_before_a_word_is_kept_where_a_text_stands_before_it(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    before, tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("The sea", "is wide"))
    assert IncrementalDetokenizer(tokenizer, before).decode(tokens) == " is wide"
    assert IncrementalDetokenizer(tokenizer).decode(tokens) == "is wide"
    assert IncrementalDetokenizer(tokenizer, [tokenizer.eos_token_id]).decode(tokens) == "is wide", (
        "a text begins after a mark"
    )


@pytest.mark.parametrize("kind", BY_BYTES)
@given(text=TEXTS)
def test_what_a_token_would_write_changes_nothing(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    reader = IncrementalDetokenizer(tokenizer)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        reader.peek(7)
        expected = reader.peek(token)
        reader.peek(tokenizer.eos_token_id)
        assert reader.add(token) == expected


@pytest.mark.parametrize("kind", BY_BYTES)
@settings(max_examples=60)
@given(tokens=st.lists(st.integers(0, 399), max_size=12))
def test_tokens_in_any_order_are_read_the_same_in_any_pieces(kind: str, tokens: list[int]) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = [token for token in tokens if token < len(tokenizer)]
    whole, one = IncrementalDetokenizer(tokenizer), IncrementalDetokenizer(tokenizer)
    pieces = [one.add(token) for token in tokens]
    text = whole.decode(tokens) + whole.flush()
    assert "".join(piece.text for piece in pieces) + one.flush() == text
    assert b"".join(piece.raw for piece in pieces).decode("utf-8", "replace") == text


def test_an_added_token_is_written_as_it_is() -> None:
    tokenizer = make_tokenizer_kind(Path(mkdtemp()), "byte-level")
    tokenizer.add_tokens(["<tool call>", "東京タワー"])
    text = "a<tool call>東京タワー!"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) == 4
    assert IncrementalDetokenizer(tokenizer).decode(tokens) == text


def test_rows_that_no_token_belongs_to_are_found() -> None:
    tokenizer = tokenizer_of("byte-level")
    size = len(tokenizer)
    words = vocabulary_of(tokenizer)
    assert words.unused_rows(size) == []
    assert words.unused_rows(size + 3) == [size, size + 1, size + 2]
    with_hole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a")))
    assert vocabulary_of(with_hole).unused_rows(5) == [1, 2, 4]


def test_tokens_of_one_name_are_no_missing_rows() -> None:
    class Slow:  # as tokenizers that are code list the bytes that are no characters by themselves
        vocab_size = 4

        def __len__(self) -> int:
            return 5

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "\ufffd": 3, "<added>": 4}

    slow = Slow()
    assert vocabulary_of(slow).unused_rows(6) == [5]


def test_a_tokenizer_that_nobody_uses_is_let_go() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    vocabulary_of(tokenizer)
    watched = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@settings(max_examples=60)
@given(text=TEXTS, times=st.integers(1, 4))
def test_a_text_never_has_fewer_tokens_than_are_certain(kind: str, text: str, times: int) -> None:
    tokenizer = tokenizer_of(kind)
    least = vocabulary_of(tokenizer).fewest_tokens(text * times)
    assert least <= len(tokenizer(text * times, add_special_tokens=False)["input_ids"])


def test_how_long_a_text_is_at_least_is_known_for_the_common_kinds() -> None:
    for kind in BY_BYTES:
        assert vocabulary_of(tokenizer_of(kind)).fewest_tokens("The sea is wide. " * 1000) > 100
    for kind in ("unigram", "wordpiece"):  # an unknown word of any length is one token
        assert vocabulary_of(tokenizer_of(kind)).fewest_tokens("x" * 10_000) == 0


def test_a_decoder_that_is_not_known_is_asked_itself() -> None:
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    raw.decoder = decoders.CTC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert vocabulary_of(tokenizer).spelling is None
    reader = IncrementalDetokenizer(tokenizer)
    assert [reader.decode([1]), reader.decode([0])] == ["b", "a"]
