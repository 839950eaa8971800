"""How fast tokens come, where enough of them were measured to say so."""

from __future__ import annotations

LEAST_TOKENS = 4
LEAST_SECONDS = 0.02
"""What comes in less arrived at once, as from a server that does not stream: its time says nothing of its speed."""


def tokens_per_second(tokens: int, seconds: float) -> float | None:
    """The speed of so many tokens drawn in so many seconds; None for too few of either."""
    if tokens < LEAST_TOKENS or seconds < LEAST_SECONDS:
        return None
    return round(tokens / seconds, 1)
