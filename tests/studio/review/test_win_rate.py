"""What verdicts come to: the interval against published values, and its laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.studio.review.win_rate import (
    distinct_names,
    rounds_needed,
    wilson_interval,
    win_rate_json,
    win_rate_of,
    win_rate_sentence,
)


@pytest.mark.parametrize(
    ("wins", "decided", "low", "high"),
    [  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_one(wins: int, decided: int, low: float, high: float) -> None:
    assert wilson_interval(wins, decided) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 300).flatmap(lambda decided: st.tuples(st.integers(0, decided), st.just(decided))))
def test_the_interval_holds_the_rate_and_is_the_same_seen_from_the_other_side(counts: tuple[int, int]) -> None:
    wins, decided = counts
    low, high = wilson_interval(wins, decided)
    assert 0 <= low <= wins / decided <= high <= 1
    other_low, other_high = wilson_interval(decided - wins, decided)
    assert (low, high) == (pytest.approx(1 - other_high), pytest.approx(1 - other_low))


@given(st.integers(1, 50), st.integers(2, 20))
def test_more_rounds_at_the_same_rate_say_more(wins: int, times: int) -> None:
    low, high = wilson_interval(wins, 60)
    lower, higher = wilson_interval(wins * times, 60 * times)
    assert higher - lower < high - low


def test_nothing_judged_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    result = win_rate_of(["tie", "same"])
    assert (result.rate, result.ties, result.is_conclusive) == (None, 2, False)
    assert win_rate_sentence(win_rate_json([]), "Base model", "Step 4") == "No rounds judged."
    assert win_rate_sentence(win_rate_json(["same"]), "Base model", "Step 4") == "It was a tie."
    assert win_rate_sentence(win_rate_json(["same", "tie"]), "Base model", "Step 4") == "All 2 rounds were ties."


def test_enough_is_said_and_for_whom() -> None:
    words = win_rate_sentence(win_rate_json(["right"] * 9 + ["left", "tie"]), "Base model", "Step 4")
    assert words.startswith("Step 4 won 9 of 10 decided rounds: 90%")
    assert " 1 tie." in words
    assert words.endswith("That is a clear win.")
    other = win_rate_sentence(win_rate_json(["left"] * 9 + ["right"]), "Base model", "Step 4")
    assert other.startswith("Base model won 9 of 10")
    assert words.split("interval")[1].split(")")[0] == other.split("interval")[1].split(")")[0]


def test_an_even_result_puts_nobody_ahead() -> None:
    words = win_rate_sentence(win_rate_json(["left", "right"]), "Base model", "Step 4")
    assert words == "Each won 1 of 2 decided rounds. No clear winner."


def test_two_steps_of_one_number_are_told_apart() -> None:
    def at(step: int, what: str) -> dict[str, object]:
        return {"step": step, "what": what}

    assert distinct_names(at(0, "x"), at(4, "x")) == ("Base model", "Step 4")
    assert distinct_names(at(1, "chose A"), at(1, "fitted")) == ("Step 1 (chose A)", "Step 1 (fitted)")
    one, other = distinct_names(at(1, "chose A"), at(1, "chose A"))
    assert one != other


def test_not_enough_says_how_many_more_would_be() -> None:
    result = win_rate_of(["right"] * 6 + ["left"] * 4)
    needed = rounds_needed(result)
    assert needed is not None
    low, _ = wilson_interval(round(0.6 * needed), needed)
    assert low > 0.5
    assert f"about {needed - 10} more" in win_rate_sentence(
        win_rate_json(["right"] * 6 + ["left"] * 4), "Base model", "Step 4"
    )
    assert rounds_needed(win_rate_of(["right", "left"])) is None
