"""Fluency and variety, against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.engine.text.quality_metrics import fluency_of, variety_of

ANSWERS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=5)


def test_fluency_is_the_mean_of_what_each_answer_says_per_token() -> None:
    assert fluency_of([-4.0, -3.0], [4, 1]) == pytest.approx((-1.0 - 3.0) / 2)


def test_the_same_answer_twice_has_no_variety() -> None:
    assert variety_of([[1, 2, 3], [1, 2, 3]]) == 0.0
    assert variety_of([[1, 2], [3, 4]]) == 1.0
    # pairs of the first: (start 1) (1 2) (2 3); of the second: (start 1) (1 2) (2 4): two of four are shared
    assert variety_of([[1, 2, 3], [1, 2, 4]]) == pytest.approx(0.5)
    assert variety_of([[7]]) == 1.0


@given(ANSWERS)
def test_variety_is_between_none_and_all_whatever_the_order(answers: list[list[int]]) -> None:
    variety = variety_of(answers)
    assert 0.0 <= variety <= 1.0
    assert variety_of(answers[::-1]) == pytest.approx(variety)
    if len(answers) > 1:
        assert variety_of([answers[0]] * len(answers)) == 0.0
