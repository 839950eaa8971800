"""Report what the last choice did, and whether the model degrades, from the metrics along a branch. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...messages import Metrics
from .tree import Fitted, Node

FIRST = 3
"""So many choices at the start of a branch show how the model wrote before it was steered."""

LAST = 3
FLUENCY_LOST = 0.75
"""Nats per token below the first answers at which a model is reported as less fluent."""

VARIETY_LEFT = 0.5
"""Fraction of the first answers' variety below which answers are reported as too similar."""


@dataclass(frozen=True)
class Report:
    """The last choice's probability before and after training, and changes against the first answers of the branch:
    fluency in nats per token, variety as a fraction; None while there is nothing to compare. The model would make
    `agreed` of the last `agreed_of` choices too. `warnings` are sentences."""

    before: float
    after: float
    refused: bool
    fitted: bool
    agreed: int | None
    agreed_of: int | None
    fluency: float | None
    variety: float | None
    warnings: list[str]

    @property
    def little(self) -> bool:
        """Whether the probability hardly changed."""
        return 0.95 * self.before < self.after < 1.05 * self.before


def report_of(path: Sequence[Node]) -> Report | None:
    """Return the report on the last choice of a path; None where nothing was learned."""
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
            "answers are becoming less fluent. Undo a few steps, or start a new session with a lower learning rate."
        )
    if variety is not None and variety < VARIETY_LEFT:
        warnings.append(
            "answers are becoming too similar. If you don't want that, undo a few steps, or skip prompts where you "
            "like every answer."
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
