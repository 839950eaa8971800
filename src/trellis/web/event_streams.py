"""Server-sent events off the hub, resumable by `Last-Event-ID` or `?after=` (WHATWG HTML, section 9.2).

Our own few lines rather than FastAPI's: see docs/decisions/0002-event-streams.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Header, Query
from starlette.responses import StreamingResponse

from ..studio.hub import HubEvent

KEEP_ALIVE_SECONDS = 15.0
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def resume_point(
    after: Annotated[str | None, Query(max_length=64, description="Go on after this event id.")] = None,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> str | None:
    """The event after which a stream goes on. A browser that reconnects knows better than the address it opened."""
    return last_event_id or after


def event_stream(events: AsyncIterator[HubEvent]) -> StreamingResponse:
    """Events as they come, a comment when there are none for a while, so that nobody between closes the line."""
    return StreamingResponse(_frames(events), media_type="text/event-stream", headers=HEADERS)


async def _frames(events: AsyncIterator[HubEvent]) -> AsyncIterator[bytes]:
    yield b"retry: 1000\n\n"
    coming: asyncio.Future[HubEvent] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE_SECONDS)
            if not done:
                yield b": still here\n\n"
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield f"id: {event.id}\nevent: {event.name}\ndata: {event.json}\n\n".encode()
    finally:
        if coming:
            coming.cancel()
