"""What may be chosen next, the likeliest first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trellis.messages import Option
from trellis.studio.steering.likely_choices import likely


def options(*sure: float) -> list[Option]:
    return [
        Option(text=f"answer {number}", tokens=(1, 2), finish="stop", logprob=2 * each)
        for number, each in enumerate(sure)
    ]


def test_options_come_first_in_the_order_of_how_sure_the_model_is() -> None:
    assert likely([], options(-1.0, -0.2, -3.0, -0.5)) == [1, 3, 0, 2, "none", "skip"]


def test_who_refuses_or_skips_a_lot_is_expected_to_do_so_again() -> None:
    assert likely(["none", "none", 1], options(-1.0, -2.0))[0] == "none"
    assert likely(["skip"] * 4 + [0], options(-1.0, -2.0))[0] == "skip"
    assert likely([0] * 9 + ["none"], options(-1.0, -2.0))[:2] == [0, 1]


@given(st.lists(st.sampled_from([0, 1, "none", "skip", None]), max_size=30), st.lists(st.floats(-9, 0), max_size=8))
def test_every_single_choice_is_among_them_once(said: list[object], sure: list[float]) -> None:
    found = likely(said, options(*sure))  # type: ignore[arg-type]
    assert sorted(found, key=str) == sorted([*range(len(sure)), "none", "skip"], key=str)
