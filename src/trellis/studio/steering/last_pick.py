"""Report what the last choice did, and whether the model degrades, from the metrics along a branch. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...messages import Metrics
from .tree import Node, Retraining

FIRST_STEPS = 3
"""So many choices at the start of a branch show how the model wrote before it was steered."""

LAST_STEPS = 3
MAX_FLUENCY_LOSS = 0.75
"""Nats per token below the first answers at which a model is reported as less fluent."""

MIN_VARIETY_RATIO = 0.5
"""Fraction of the first answers' variety below which answers are reported as too similar."""


@dataclass(frozen=True)
class LastPickReport:
    """The last choice's probability before and after training, and changes against the first answers of the branch:
    fluency in nats per token, variety as a fraction; None while there is nothing to compare. The model would make
    `agreed` of the last `agreed_of` choices too. `warnings` are sentences."""

    share_before: float
    share_after: float
    is_refusal: bool
    is_retraining: bool
    agreed: int | None
    agreed_of: int | None
    fluency: float | None
    variety: float | None
    warnings: list[str]

    @property
    def little(self) -> bool:
        """Whether the probability hardly changed."""
        return 0.95 * self.share_before < self.share_after < 1.05 * self.share_before


def last_pick_report(path: Sequence[Node]) -> LastPickReport | None:
    """Return the report on the last choice of a path; None where nothing was learned."""
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
            "answers are becoming less fluent. Undo a few steps, or start a new session with a lower learning rate."
        )
    if variety is not None and variety < MIN_VARIETY_RATIO:
        warnings.append(
            "answers are becoming too similar. If you don't want that, undo a few steps, or skip prompts where you "
            "like every answer."
        )
    choice = learned[-1].choice
    return LastPickReport(
        last_metrics.share_before, last_metrics.share_after, choice == "none", isinstance(choice, Retraining),
        last_metrics.agreed, last_metrics.agreed_of,
        fluency, variety, warnings,
    )  # fmt: skip


def _change_along_branch(
    learned: Sequence[Node], get_metric: Callable[[Metrics], float | None], compare: Callable[[float, float], float]
) -> float | None:
    """The mean of the last figures against the mean of the first ones; None while these are the same steps."""
    metric_values = [value for node in learned if node.metrics and (value := get_metric(node.metrics)) is not None]
    if len(metric_values) <= FIRST_STEPS:
        return None
    first, last = metric_values[:FIRST_STEPS], metric_values[FIRST_STEPS:][-LAST_STEPS:]
    return compare(sum(last) / len(last), sum(first) / len(first))
