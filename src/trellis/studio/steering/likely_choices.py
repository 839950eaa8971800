"""What a person may choose next, the likeliest first. It does not know how a choice is worked out ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ...messages import Choice, Option
from .choices import equal_options
from .tree import Fitted

Guess = int | tuple[int, ...] | Literal["none", "skip"]
"""A choice that may come next; options that are the same are chosen together."""


def likely(said: Sequence[Choice | Fitted | None], options: Sequence[Option]) -> list[Guess]:
    """All single choices of an offer: by how often such a one was made on this branch, whose choices are `said`, then
    by how sure the model is of an option."""
    refused, skipped = said.count("none"), said.count("skip")
    chosen = len(said) - refused - skipped
    sure = sorted(range(len(options)), key=lambda at: -options[at].logprob / max(len(options[at].tokens), 1))
    equal = equal_options(options)
    ways: list[tuple[float, Guess]] = [
        ((chosen + 1) / (len(options) or 1) * (1 - 0.01 * place), equal[at] if len(equal[at]) > 1 else at)
        for place, at in enumerate(sure)
        if at == equal[at][0]
    ]
    ways += [(refused + 0.2, "none"), (skipped + 0.1, "skip")]
    return [guess for _, guess in sorted(ways, key=lambda way: -way[0])]
