"""Whether a choice fits its offer, and which options are equal."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import Invalid
from ...messages import Choice, Option, Ranking, Written


def equal_options(options: Sequence[Option]) -> list[tuple[int, ...]]:
    """Return for each option the indexes of all with the same text and the same ending, itself included."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, option in enumerate(options):
        groups.setdefault((option.text, option.finish), []).append(index)
    return [tuple(groups[option.text, option.finish]) for option in options]


def with_equal_options(choice: Choice, options: Sequence[Option]) -> Choice:
    """The choice with every option that is equal to one it names, so that no method learns to avoid an answer that was
    chosen. An answer that was written word for word like an option that ended by itself is a choice of that option."""
    equal_indexes = equal_options(options)
    match choice:
        case int():
            return equal_indexes[choice] if len(equal_indexes[choice]) > 1 else choice
        case Ranking():
            return Ranking(ranking=_add_equal_indexes(choice.ranking, equal_indexes))
        case tuple():
            return _add_equal_indexes(choice, equal_indexes)
        case Written():
            matching_indexes = [index for index, option in enumerate(options)
                    if option.text == choice.written and option.finish == "stop"]  # fmt: skip
            return with_equal_options(matching_indexes[0], options) if matching_indexes else choice
        case _:
            return choice


def _add_equal_indexes(named: Sequence[int], equal: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the named indexes, each followed by the equal ones that are not named."""
    expanded: list[int] = []
    for index in named:
        expanded += [index, *(each for each in equal[index] if each not in named and each not in expanded)]
    return tuple(expanded)


def require_valid_choice(choice: Choice, size: int) -> None:
    """Raise Invalid for a choice that does not fit an offer with this number of options."""
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
                f"choice: must be from 0 to {size - 1}, got {index}.",
                field="choice",
                next_step=f"Send an index from 0 to {size - 1}.",
            )
    if len(set(indexes)) != len(indexes):
        raise Invalid(
            f"choice: {list(indexes)} has an answer twice.", field="choice", next_step="Send each index once."
        )
