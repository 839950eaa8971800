"""Server-sent events off the hub, resumable by `Last-Event-ID` or `?after=`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Header, Query
from fastapi.sse import ServerSentEvent

from ..studio.hub import HubEvent


def resume_point(
    after: Annotated[str | None, Query(max_length=64, description="Go on after this event id.")] = None,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> str | None:
    """The event after which a stream goes on. A browser that reconnects knows better than the address it opened."""
    return last_event_id or after


async def sse(events: AsyncIterator[HubEvent]) -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent(retry=1000, comment="trellis")
    async for event in events:
        raw = json.dumps(event.data, ensure_ascii=False, separators=(",", ":"))
        yield ServerSentEvent(raw_data=raw, event=event.name, id=event.id)
