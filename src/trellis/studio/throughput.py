"""How fast tokens come, where enough of them were measured to say so."""

from __future__ import annotations

MIN_TOKENS = 4
MIN_SECONDS = 0.02
"""What comes in less arrived at once, as from a server that does not stream: its time says nothing of its speed."""


def tokens_per_second(tokens: int, seconds: float) -> float | None:
    """Return tokens per second; None for too few tokens or seconds to tell."""
    if tokens < MIN_TOKENS or seconds < MIN_SECONDS:
        return None
    return round(tokens / seconds, 1)
