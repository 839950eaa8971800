"""What a person may choose next, the likeliest first. It does not know how a choice is worked out ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ...messages import Choice, Option
from .choices import equal_options
from .tree import Retraining

LikelyChoice = int | tuple[int, ...] | Literal["none", "skip"]
"""A choice that may come next; options that are the same are chosen together."""


def likely_choices(
    earlier_choices: Sequence[Choice | Retraining | None], options: Sequence[Option]
) -> list[LikelyChoice]:
    """Return all single choices of an offer: by how often the like was chosen earlier on this branch, then by the
    model's confidence in the option."""
    refusal_count, skip_count = earlier_choices.count("none"), earlier_choices.count("skip")
    chosen_count = len(earlier_choices) - refusal_count - skip_count
    by_likelihood = sorted(range(len(options)), key=lambda at: -options[at].logprob / max(len(options[at].tokens), 1))
    equal_indexes = equal_options(options)
    scored_choices: list[tuple[float, LikelyChoice]] = [
        (
            (chosen_count + 1) / (len(options) or 1) * (1 - 0.01 * rank),
            equal_indexes[index] if len(equal_indexes[index]) > 1 else index,
        )
        for rank, index in enumerate(by_likelihood)
        if index == equal_indexes[index][0]
    ]
    scored_choices += [(refusal_count + 0.2, "none"), (skip_count + 0.1, "skip")]
    return [guess for _, guess in sorted(scored_choices, key=lambda way: -way[0])]
