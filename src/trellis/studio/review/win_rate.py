"""The win rate of a blind test, its interval, and whether that is conclusive. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..steering import step_name

NORMAL_QUANTILE_95 = 1.959963984540054
"""The normal quantile of a 95 % interval."""


@dataclass(frozen=True)
class WinRate:
    """The result for the right node. `low` and `high` bound its win rate among decided rounds."""

    left: int
    right: int
    ties: int
    rate: float | None
    low: float
    high: float

    @property
    def is_conclusive(self) -> bool:
        """Whether the interval excludes a tie."""
        return self.low > 0.5 or self.high < 0.5


def wilson_interval(wins: int, decided: int, quantile: float = NORMAL_QUANTILE_95) -> tuple[float, float]:
    """Return the score interval of a rate (Wilson 1927), sound for few rounds and for rates of 0 and 1; (0, 1)
    without rounds."""
    if decided == 0:
        return 0.0, 1.0
    rate, quantile_squared = wins / decided, quantile**2
    middle = (rate + quantile_squared / (2 * decided)) / (1 + quantile_squared / decided)
    spread = (
        quantile
        / (1 + quantile_squared / decided)
        * math.sqrt(rate * (1 - rate) / decided + quantile_squared / (4 * decided**2))
    )  # fmt: skip
    return 0.0 if wins == 0 else middle - spread, 1.0 if wins == decided else middle + spread


def win_rate_of(verdicts: Sequence[str]) -> WinRate:
    left, right = verdicts.count("left"), verdicts.count("right")
    decided = left + right
    low, high = wilson_interval(right, decided)
    return WinRate(left, right, len(verdicts) - decided, right / decided if decided else None, low, high)


def rounds_needed(result: WinRate, max_rounds: int = 2000) -> int | None:
    """Return the decided rounds needed for a conclusive result at this rate; None where there are too many."""
    decided = result.left + result.right
    if result.rate is None or result.left == result.right:
        return None
    for count in range(decided + 1, max_rounds):
        low, high = wilson_interval(round(result.rate * count), count)
        if low > 0.5 or high < 0.5:
            return count
    return None


def win_rate_json(verdicts: Sequence[str]) -> dict[str, Any]:
    result = win_rate_of(verdicts)
    return {
        "left": result.left,
        "right": result.right,
        "ties": result.ties,
        "rate": result.rate,
        "low": result.low,
        "high": result.high,
        "enough": result.is_conclusive,
        "needed": None if result.is_conclusive else rounds_needed(result),
    }


def distinct_names(left: dict[str, Any], right: dict[str, Any]) -> tuple[str, str]:
    """Return distinct names for two nodes `{step, what, name}`."""
    one, other = (step_name(each["step"]) for each in (left, right))
    if one == other:
        one, other = (f"{step_name(each['step'])} ({each['what']})" for each in (left, right))
    return (one, other) if one != other else (f"{one}, first", f"{other}, second")


def win_rate_sentence(result: dict[str, Any], left: str, right: str) -> str:
    """Return a result in sentences. `left` and `right` name the nodes."""
    decided = result["left"] + result["right"]
    count = result["ties"]
    ties = f" {count} tie{'s' if count > 1 else ''}." if count else ""
    if not decided:
        return f"All {count} rounds were ties." if count > 1 else "It was a tie." if count else "No rounds judged."
    if result["left"] == result["right"]:
        return f"Each won {result['left']} of {decided} decided rounds.{ties} No clear winner."
    ahead = right if result["right"] >= result["left"] else left
    won = max(result["left"], result["right"])
    low, high = result["low"], result["high"]
    if result["right"] < result["left"]:
        low, high = 1 - high, 1 - low
    rate = won / decided
    summary = f"{ahead} won {won} of {decided} decided rounds: {rate:.0%} (95% interval {low:.0%} to {high:.0%}).{ties}"
    if result["enough"]:
        return f"{summary} That is a clear win."
    if result["needed"]:
        more = result["needed"] - decided
        rounds = f"about {more} more decided round{'s' if more != 1 else ''}"
        return f"{summary} No clear winner yet: at this rate it takes {rounds}."
    return f"{summary} No clear winner."
