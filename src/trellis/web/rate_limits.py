"""Rate limits of expensive requests: sessions, loads, exports, uploads, comparisons."""

from __future__ import annotations

from fastapi import Request
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from ..errors import Refused


class RateLimiter:
    """Counts requests of each client in a moving window of a minute."""

    def __init__(self, per_minute: int) -> None:
        self._rate = parse(f"{per_minute} per minute") if per_minute else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._per_minute = per_minute

    def hit(self, client: str) -> None:
        """Raise Refused when a client has sent too many requests."""
        if self._rate is not None and not self._limiter.hit(self._rate, "expensive", client):
            raise Refused(
                f"Too many requests: the limit is {self._per_minute} expensive actions per minute.",
                code="too_many_requests",
                next_step="Wait a minute, or raise TRELLIS_RATE_LIMIT.",
            )


async def enforce_rate_limit(request: Request) -> None:
    """Limit a route that starts long work (a dependency)."""
    limiter: RateLimiter = request.app.state.expense
    limiter.hit(request.client.host if request.client else "unknown")
