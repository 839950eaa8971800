"""Whether what a person said of an offer fits it."""

from __future__ import annotations

from ..errors import Invalid
from ..messages import Choice, Ranking, Written


def require_fits(choice: Choice, size: int) -> None:
    """Raises Invalid for a choice that does not fit an offer of so many options."""
    match choice:
        case int():
            indexes: tuple[int, ...] = (choice,)
        case Ranking():
            indexes = choice.ranking
        case tuple():
            indexes = choice
        case Written() if not choice.written.strip():
            raise Invalid("choice.written: is empty.", field="choice.written", next_step="Write an answer.")
        case _:
            return
    for index in indexes:
        if not 0 <= index < size:
            raise Invalid(
                f"choice: {index} is not an option; there are {size}, counted from 0.",
                field="choice",
                next_step=f"Send an index from 0 to {size - 1}.",
            )
    if len(set(indexes)) != len(indexes):
        raise Invalid(
            f"choice: {list(indexes)} names an option twice.",
            field="choice",
            next_step="Name each option once.",
        )
