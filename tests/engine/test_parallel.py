"""Two halves of a piece of work: at once where hands are free, the same either way."""

from __future__ import annotations

import threading

import pytest

from trellis.engine.parallel import CorePool


def test_two_halves_are_done_at_once_where_two_hands_are_free() -> None:
    meeting = threading.Barrier(2, timeout=10)  # neither half ends before the other has begun
    assert CorePool(2).run_both(lambda: meeting.wait() >= 0 and "first", lambda: meeting.wait() >= 0 and "second") == (
        "first", "second",
    )  # fmt: skip


@pytest.mark.parametrize("hands", [1, 2])
def test_where_no_hand_is_free_they_are_done_one_after_the_other(hands: int) -> None:
    crew, log = CorePool(hands), []

    def inner() -> None:  # while this is done, another hand at most is taken
        here = threading.get_ident()
        crew.run_both(
            lambda: log.append(threading.get_ident() == here), lambda: log.append(threading.get_ident() == here)
        )

    crew.run_both(inner, lambda: None) if hands == 1 else crew.run_both(lambda: None, inner)
    assert log == [True, True]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_raised_when_nothing_goes_on_behind_it_and_hands_are_given_back(failing: int) -> None:
    crew, done = CorePool(2), threading.Event()

    def fails() -> None:
        raise ValueError("half of it")

    def ends() -> None:
        done.set()

    works = [ends, ends]
    works[failing] = fails
    with pytest.raises(ValueError, match="half of it"):
        crew.run_both(*works)
    assert done.is_set()
    meeting = threading.Barrier(2, timeout=10)
    crew.run_both(meeting.wait, meeting.wait)
