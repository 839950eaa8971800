"""Server-sent events from the hub, resumable by `Last-Event-ID` or `?after=` (WHATWG HTML, section 9.2).

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
SSE_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def resume_point(
    after: Annotated[str | None, Query(max_length=64, description="Go on after this event id.")] = None,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> str | None:
    """Return the event to resume after. The header of a reconnecting browser is newer than its URL."""
    return last_event_id or after


def event_stream(events: AsyncIterator[HubEvent]) -> StreamingResponse:
    """Stream events, with a comment when there are none for a while, so that no proxy closes the connection."""
    return StreamingResponse(_sse_frames(events), media_type="text/event-stream", headers=SSE_HEADERS)


async def _sse_frames(events: AsyncIterator[HubEvent]) -> AsyncIterator[bytes]:
    yield b"retry: 1000\n\n"
    next_event: asyncio.Future[HubEvent] | None = None
    try:
        while True:
            next_event = next_event or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({next_event}, timeout=KEEP_ALIVE_SECONDS)
            if not done:
                yield b": still here\n\n"
                continue
            try:
                event = next_event.result()
            except StopAsyncIteration:
                return
            next_event = None
            yield f"id: {event.id}\nevent: {event.name}\ndata: {event.json}\n\n".encode()
    finally:
        if next_event:
            next_event.cancel()
