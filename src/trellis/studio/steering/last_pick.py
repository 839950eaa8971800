"""What the last click did, and whether the model is still well, from the figures along a branch. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...messages import Metrics
from .tree import Fitted, Node

FIRST = 3
"""The first choices of a branch say how the model spoke before it was steered."""

LAST = 3
FLUENCY_LOST = 0.75
"""Nats per token below its first answers at which a model is said to lose its language."""

VARIETY_LEFT = 0.5
"""Part of the first answers' variety below which answers are said to repeat themselves."""


@dataclass(frozen=True)
class Report:
    """Changes against the first answers of the branch: fluency in nats per token, variety as a part; None while
    there is nothing to compare. `agreed` of the last `agreed_of` choices the model would make the same. `warnings` are
    sentences."""

    before: float
    after: float
    refused: bool
    fitted: bool
    agreed: int | None
    agreed_of: int | None
    fluency: float | None
    variety: float | None
    warnings: list[str]


def report_of(path: Sequence[Node]) -> Report | None:
    """The report on the head of a path; None where nothing was learned."""
    learned = [node for node in path if node.metrics]
    if not learned:
        return None
    last = learned[-1].metrics
    assert last is not None
    fluency = _change(learned, lambda metrics: metrics.fluency, lambda now, then: now - then)
    variety = _change(learned, lambda metrics: metrics.variety, lambda now, then: now / then if then else 1.0)
    warnings = []
    if fluency is not None and fluency < -FLUENCY_LOST:
        warnings.append(
            "The model may be losing its language: its answers have become unlikely to the base model. Undo a few "
            "steps, or lower the learning rate in a new session."
        )
    if variety is not None and variety < VARIETY_LEFT:
        warnings.append(
            "The answers to one prompt have become much alike. If that is not what you want, undo a few steps, or skip "
            "where all options please you."
        )
    choice = learned[-1].choice
    return Report(
        last.share_before, last.share_after, choice == "none", isinstance(choice, Fitted), last.agreed, last.agreed_of,
        fluency, variety, warnings,
    )  # fmt: skip


def _change(
    learned: Sequence[Node],
    figure: Callable[[Metrics], float | None],
    change: Callable[[float, float], float],
) -> float | None:
    """The mean of the last figures against the mean of the first ones; None while these are the same steps."""
    found = [value for node in learned if node.metrics and (value := figure(node.metrics)) is not None]
    if len(found) <= FIRST:
        return None
    first, last = found[:FIRST], found[FIRST:][-LAST:]
    return change(sum(last) / len(last), sum(first) / len(first))
