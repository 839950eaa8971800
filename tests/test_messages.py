"""Frames and names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.messages import (  # fmt: skip
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    Delta,
    EventFrame,
    Learn,
    Lesson,
    Option,
    Prompt,
    RequestFrame,
    Status,
    derived_seed,
    encode_frame,
    frame_length,
    recipe_id,
)
from trellis.options import Learning


@given(st.integers(0, 2**40), st.dictionaries(st.integers(0, 7), st.text(), max_size=4), st.booleans())
def test_a_frame_comes_back_as_it_went(number: int, texts: dict[int, str], last: bool) -> None:
    up = EventFrame(id=number, last=last, body=Delta(texts=texts))
    data = encode_frame(up)
    assert frame_length(data[: FRAME_HEADER.size]) == len(data) - FRAME_HEADER.size
    assert EventFrame.model_validate_json(data[FRAME_HEADER.size :]) == up


def test_a_frame_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        frame_length(FRAME_HEADER.pack(MAX_FRAME_BYTES + 1))
    assert RequestFrame(id=1, body=Status()).priority == 0


def learn(**changes: object) -> Learn:
    lesson = Lesson(
        prompt=Prompt(text="x"), options=(Option(text="a", tokens=(1, 2), finish="stop"),), choice=0, temperature=1.0
    )
    return Learn(weights="w0", lesson=lesson, learning=Learning(learning_rate=1e-3), context_length=64).model_copy(
        update=changes
    )


def test_what_learning_makes_is_named_by_all_it_depends_on() -> None:
    one = learn()
    assert one.weights_id() == learn().weights_id()
    others = [learn(weights="w1"), learn(replay=(one.lesson,)), learn(learning=Learning(learning_rate=2e-3)),
              learn(lesson=one.lesson.model_copy(update={"choice": "none"}))]  # fmt: skip
    assert len({request.weights_id() for request in [one, *others]}) == 5
    assert Learn.model_validate_json(one.model_dump_json()).weights_id() == one.weights_id()


def test_names_do_not_depend_on_the_order_of_keys() -> None:
    assert recipe_id("w", {"a": 1, "b": [2]}) == recipe_id("w", {"b": [2], "a": 1})
    assert recipe_id("w", {"a": 1}) != recipe_id("n", {"a": 1})
    assert derived_seed("a", "bc") != derived_seed("ab", "c")
