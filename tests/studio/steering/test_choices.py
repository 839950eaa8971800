"""What a choice means where several options of an offer are word for word the same."""

from __future__ import annotations

import pytest

from trellis.messages import Choice, Option, Ranking, Written
from trellis.studio.steering.choices import equal_options, including_equals
from trellis.studio.steering.likely_choices import likely


def options(*texts: str) -> tuple[Option, ...]:
    """Options with these texts; a text that ends with "…" was cut off."""
    return tuple(
        Option(text=text.rstrip("…"), tokens=(1,), finish="length" if text.endswith("…") else "stop", logprob=-1.0)
        for text in texts
    )


TWICE = options("Yes.", "No.", "Yes.", "Maybe.")


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        (0, (0, 2)),
        (2, (0, 2)),
        (1, 1),
        ((1, 2), (1, 2, 0)),
        ((2, 0), (2, 0)),
        (Ranking(ranking=(2, 1)), Ranking(ranking=(2, 0, 1))),
        (Ranking(ranking=(1, 3)), Ranking(ranking=(1, 3))),
        (Written(written="Yes."), (0, 2)),
        (Written(written="No."), 1),
        (Written(written="Never."), Written(written="Never.")),
        ("none", "none"),
        ("skip", "skip"),
    ],
)
def test_a_choice_means_all_options_that_are_the_same(choice: Choice, meant: Choice) -> None:
    assert including_equals(choice, TWICE) == meant


def test_an_answer_that_was_cut_off_is_not_one_that_ended() -> None:
    offered = options("Yes", "Yes…")
    assert equal_options(offered) == [(0,), (1,)]
    assert including_equals(Written(written="Yes"), offered) == 0


def test_what_is_the_same_is_foreseen_once_and_as_it_will_be_chosen() -> None:
    assert [guess for guess in likely([], TWICE) if guess not in ("none", "skip")] == [(0, 2), 1, 3]
