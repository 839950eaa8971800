"""Frames and names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.messages import (  # fmt: skip
    HEADER,
    MAX_FRAME,
    Delta,
    Down,
    Learn,
    Lesson,
    Option,
    Prompt,
    Status,
    Up,
    derived_seed,
    frame,
    frame_length,
    recipe_id,
)
from trellis.params import Learning


@given(st.integers(0, 2**40), st.dictionaries(st.integers(0, 7), st.text(), max_size=4), st.booleans())
def test_a_frame_comes_back_as_it_went(number: int, texts: dict[int, str], last: bool) -> None:
    up = Up(id=number, last=last, body=Delta(texts=texts))
    data = frame(up)
    assert frame_length(data[: HEADER.size]) == len(data) - HEADER.size
    assert Up.model_validate_json(data[HEADER.size :]) == up


def test_a_frame_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        frame_length(HEADER.pack(MAX_FRAME + 1))
    assert Down(id=1, body=Status()).priority == 0


def learn(**changes: object) -> Learn:
    lesson = Lesson(
        prompt=Prompt(text="x"), options=(Option(text="a", tokens=(1, 2), finish="stop"),), choice=0, temperature=1.0
    )
    return Learn(weights="w0", lesson=lesson, learning=Learning(learning_rate=1e-3), context_length=64).model_copy(
        update=changes
    )


def test_what_learning_makes_is_named_by_all_it_depends_on() -> None:
    one = learn()
    assert one.makes() == learn().makes()
    others = [learn(weights="w1"), learn(replay=(one.lesson,)), learn(learning=Learning(learning_rate=2e-3)),
              learn(lesson=one.lesson.model_copy(update={"choice": "none"}))]  # fmt: skip
    assert len({request.makes() for request in [one, *others]}) == 5
    assert Learn.model_validate_json(one.model_dump_json()).makes() == one.makes()


def test_names_do_not_depend_on_the_order_of_keys() -> None:
    assert recipe_id("w", {"a": 1, "b": [2]}) == recipe_id("w", {"b": [2], "a": 1})
    assert recipe_id("w", {"a": 1}) != recipe_id("n", {"a": 1})
    assert derived_seed("a", "bc") != derived_seed("ab", "c")
