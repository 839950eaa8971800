"""What a choice means as numbers: chosen options, preference pairs, rewards, advantages.

Plain arithmetic on the choice; no tensors, no models.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...messages import Choice, Ranking, Written


def chosen_indices(choice: Choice, outside: int) -> list[int]:
    """Return the chosen options, best first; empty for “none of these”."""
    match choice:
        case int():
            return [choice]
        case Ranking():
            return list(choice.ranking)
        case Written():
            return [outside - 1]
        case tuple():
            return list(choice)
        case _:
            return []


def preference_pairs(choice: Choice, size: int) -> list[tuple[int, int]]:
    """Return the (better, worse) pairs a choice implies; “none of these” implies none."""
    chosen = chosen_indices(choice, size)
    if isinstance(choice, Ranking):
        rest = [index for index in range(size) if index not in chosen]
        return [(better, worse) for place, better in enumerate(chosen) for worse in [*chosen[place + 1 :], *rest]]
    return [(better, worse) for better in chosen for worse in range(size) if worse not in chosen]


def agrees_with_choice(rewards: Sequence[float], choice: Choice, answers: Sequence[Sequence[int]] = ()) -> bool:
    """Whether a model with these rewards would choose the same: the best chosen option is ahead of all the rest. It
    agrees with “none of these” if no option is ahead of the outside one, at 0. With `answers`, duplicates of a chosen
    answer do not count against it."""
    chosen = chosen_indices(choice, len(rewards))
    if isinstance(choice, Ranking):
        chosen = chosen[:1]
    if not chosen:
        return max(rewards) < 0.0
    best = max(rewards[index] for index in chosen)
    chosen_answers = [answers[index] for index in chosen] if answers else []
    rest = [
        index
        for index in range(len(rewards))
        if index not in chosen and not (answers and answers[index] in chosen_answers)
    ]
    return all(best > rewards[index] for index in rest)


def choice_scores(choice: Choice, size: int) -> list[float]:
    """Return a reward per option: 1 for chosen, 0 for the rest; a ranking falls linearly from 1 to 0."""
    chosen = chosen_indices(choice, size)
    if isinstance(choice, Ranking):
        return [1.0 - chosen.index(index) / len(chosen) if index in chosen else 0.0 for index in range(size)]
    return [1.0 if index in chosen else 0.0 for index in range(size)]


def choice_advantages(choice: Choice, size: int, scaled: bool = True) -> list[float]:
    """Return (R − mean) / std over the group (population std); −1 for all on “none of these”. Without `scaled`, R −
    mean.

    One of four chosen: +1.732 for it, −0.577 for each other.
    """
    scores = choice_scores(choice, size)
    mean = sum(scores) / size
    spread = (sum((score - mean) ** 2 for score in scores) / size) ** 0.5
    if not any(scores):
        return [-1.0] * size
    divisor = spread if scaled else 1.0
    return [(score - mean) / divisor if spread else 0.0 for score in scores]
