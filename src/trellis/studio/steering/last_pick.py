"""What the last click did, and whether the model is still well, from the figures along a branch. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...messages import Metrics
from .tree import Node, Retraining

FIRST_STEPS = 3
"""The first choices of a branch say how the model spoke before it was steered."""

LAST_STEPS = 3
MAX_FLUENCY_LOSS = 0.75
"""Nats per token below its first answers at which a model is said to lose its language."""

MIN_VARIETY_RATIO = 0.5
"""Part of the first answers' variety below which answers are said to repeat themselves."""


@dataclass(frozen=True)
class LastPickReport:
    """Changes against the first answers of the branch: fluency in nats per token, variety as a part; None while
    there is nothing to compare. `agreed` of the last `agreed_of` choices the model would make the same. `warnings` are
    sentences."""

    share_before: float
    share_after: float
    is_refusal: bool
    is_retraining: bool
    agreed: int | None
    agreed_of: int | None
    fluency: float | None
    variety: float | None
    warnings: list[str]


def last_pick_report(path: Sequence[Node]) -> LastPickReport | None:
    """The report on the head of a path; None where nothing was learned."""
    learned = [node for node in path if node.metrics]
    if not learned:
        return None
    last_metrics = learned[-1].metrics
    assert last_metrics is not None
    fluency = _change_along_branch(learned, lambda metrics: metrics.fluency, lambda now, then: now - then)
    variety = _change_along_branch(
        learned, lambda metrics: metrics.variety, lambda now, then: now / then if then else 1.0
    )
    warnings = []
    if fluency is not None and fluency < -MAX_FLUENCY_LOSS:
        warnings.append(
            "The model may be losing its language: its answers have become unlikely to the base model. Undo a few "
            "steps, or lower the learning rate in a new session."
        )
    if variety is not None and variety < MIN_VARIETY_RATIO:
        warnings.append(
            "The answers to one prompt have become much alike. If that is not what you want, undo a few steps, or skip "
            "where all options please you."
        )
    choice = learned[-1].choice
    return LastPickReport(
        last_metrics.share_before, last_metrics.share_after, choice == "none", isinstance(choice, Retraining),
        last_metrics.agreed, last_metrics.agreed_of,
        fluency, variety, warnings,
    )  # fmt: skip


def _change_along_branch(
    learned: Sequence[Node],
    get_metric: Callable[[Metrics], float | None],
    compare: Callable[[float, float], float],
) -> float | None:
    """The mean of the last figures against the mean of the first ones; None while these are the same steps."""
    metric_values = [value for node in learned if node.metrics and (value := get_metric(node.metrics)) is not None]
    if len(metric_values) <= FIRST_STEPS:
        return None
    first, last = metric_values[:FIRST_STEPS], metric_values[FIRST_STEPS:][-LAST_STEPS:]
    return compare(sum(last) / len(last), sum(first) / len(first))
