"""Curves with axes: round numbers, and every point where its value says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.web.pages.steering.tree_layout import axis_ticks, make_chart


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.0, 3.0, [0.0, 1.0, 2.0, 3.0]),
        (0.0, 61.0, [0.0, 20.0, 40.0, 60.0, 80.0]),
        (-0.4, 1.7, [-1.0, 0.0, 1.0, 2.0]),
        (0.0, 0.0, [0.0, 1.0]),
    ],
)
def test_ticks_are_round_and_hold_all_values(low: float, high: float, ticks: list[float]) -> None:
    assert axis_ticks(low, high) == pytest.approx(ticks)


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6))
def test_there_are_two_to_six_ticks_around_the_values(low: float, span: float) -> None:
    ticks = axis_ticks(low, low + span)
    assert 2 <= len(ticks) <= 7
    slack = 1e-6 * max(1.0, abs(low), span)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack


def test_points_stand_where_their_values_say() -> None:
    found = make_chart("Drift", "%", [(0, 0.0), (2, 1.5), (4, 3.0)])
    assert found.points == ((0, "0", 0.0, 100.0), (2, "1.5", 50.0, 50.0), (4, "3", 100.0, 0.0))
    assert [(mark.percent, mark.label) for mark in found.value_ticks][-1] == (100.0, "3")
    assert [(mark.percent, mark.label) for mark in found.step_ticks] == [(0.0, "0"), (50.0, "2"), (100.0, "4")]
    assert found.description == "Drift: 0% at step 0, 3% at step 4"


def test_a_step_stands_in_the_middle_only_where_the_middle_is_a_step() -> None:
    assert [mark.label for mark in make_chart("Loss", "", [(1, 0.5), (4, 0.25)]).step_ticks] == ["1", "4"]


def test_a_single_value_has_no_curve_and_many_are_thinned_to_the_last() -> None:
    assert (make_chart("Loss", "", [(1, 0.5)]).points, make_chart("Loss", "", []).latest) == ((), "–")
    many = make_chart("Loss", "", [(step, float(step)) for step in range(1000)])
    assert len(many.points) <= 400
    assert many.points[-1][0] == 999
