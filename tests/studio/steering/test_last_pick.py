"""What the page says of a click, from the figures along a branch."""

from __future__ import annotations

from typing import Any

from trellis.messages import Choice, Metrics
from trellis.studio.steering.last_pick import last_pick_report
from trellis.studio.steering.tree import Node


def node(step: int, choice: Choice | None = 0, **figures: Any) -> Node:
    metrics = None
    if figures:
        metrics = Metrics(
            loss=1, kl=0, share_before=0.2, share_after=0.5, drift=0.01, inner_steps=4, seconds=0.1, **figures
        )
    return Node(
        id=f"n{step}", session="s", parent=None, step=step, weights="w", position=0, answered=None, choice=choice,
        metrics=metrics, control=None, shown=None, forward=None, created=0.0,
    )  # fmt: skip


def branch(*figures: tuple[float, float]) -> list[Node]:
    steps = [node(step, fluency=fluency, variety=variety) for step, (fluency, variety) in enumerate(figures, 1)]
    return [node(0, None), *steps]


def test_nothing_is_told_before_something_was_learned() -> None:
    assert last_pick_report([node(0, None), node(1, "skip")]) is None


def test_the_first_choices_have_nothing_to_be_compared_with() -> None:
    report = last_pick_report(branch((-1, 0.9), (-1, 0.9), (-1, 0.9)))
    assert report is not None
    assert (report.share_before, report.share_after, report.is_refusal) == (0.2, 0.5, False)
    assert (report.fluency, report.variety, report.warnings) == (None, None, [])


def test_a_healthy_model_gets_figures_and_no_warning() -> None:
    report = last_pick_report(branch(*[(-1, 0.9)] * 3, *[(-1.3, 0.8)] * 4))
    assert report is not None
    assert report.fluency is not None
    assert abs(report.fluency + 0.3) < 1e-9
    assert report.warnings == []


def test_a_model_that_loses_its_language_is_told_about_with_a_way_out() -> None:
    (warning,) = last_pick_report(branch(*[(-1, 0.9)] * 3, *[(-2, 0.9)] * 3)).warnings  # type: ignore[union-attr]
    assert "less fluent" in warning
    assert "Undo" in warning


def test_answers_that_are_much_alike_are_told_about() -> None:
    (warning,) = last_pick_report(branch(*[(-1, 0.9)] * 3, *[(-1, 0.4)] * 3)).warnings  # type: ignore[union-attr]
    assert "too similar" in warning


def test_steps_from_before_these_figures_were_kept_are_passed_over() -> None:
    old = [node(step, "none", fluency=None) for step in (1, 2)]
    report = last_pick_report([node(0, None), *old])
    assert report is not None
    assert report.is_refusal
    assert report.fluency is None
