"""Publish and subscribe with replay: each topic is a ring of events with growing ids.

A reader has a place in the ring and no queue of its own, so a slow one costs nothing: when its place has
left the ring it is given a snapshot instead. It does not know what the events mean.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

RING = 1024

LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""What some readers of event streams take for the end of a line, though the standard does not."""


@dataclass(frozen=True)
class HubEvent:
    """`id` names the event for a resume; a snapshot carries the id of the last event that it includes."""

    id: str
    name: str
    data: dict[str, Any]

    @cached_property
    def json(self) -> str:
        """The data as compact JSON, made once for all readers."""
        text = json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))
        for mark, escaped in LINE_ENDS.items():
            text = text.replace(mark, escaped)
        return text


Listen = Callable[[HubEvent | None], None]
"""Told of each event as it is published, and of None when there will be no more. It must not wait."""

Snapshot = Callable[[], tuple[str, dict[str, Any]]]


@dataclass
class Topic:
    """One ring. Its ids carry a mark of its own, so that an id from before a restart, or from a topic that was
    let go, is never taken for one of these."""

    mark: str = field(default_factory=lambda: secrets.token_hex(4))
    number: int = 0
    ring: deque[HubEvent] = field(default_factory=lambda: deque(maxlen=RING))
    waiting: set[asyncio.Future[None]] = field(default_factory=set)
    listening: dict[object, Listen] = field(default_factory=dict)
    closed: bool = False


class Hub:
    """The topics of this process."""

    def __init__(self) -> None:
        self._topics: dict[str, Topic] = {}
        self.closing = False

    def publish(self, topic: str, name: str, data: dict[str, Any]) -> str:
        """Add an event. Returns its id. Never waits."""
        place = self._topics.setdefault(topic, Topic())
        place.number += 1
        event = HubEvent(f"{place.mark}-{place.number}", name, data)
        place.ring.append(event)
        self._wake(place)
        for listen in list(place.listening.values()):
            listen(event)
        return event.id

    def last(self, topic: str) -> str:
        """The id of the newest event of a topic."""
        place = self._topics.setdefault(topic, Topic())
        return f"{place.mark}-{place.number}"

    def listen(self, topic: str, listen: Listen) -> Callable[[], None]:
        """Be told of every event of a topic at once, until the function that is returned is called."""
        place, key = self._topics.setdefault(topic, Topic()), object()
        place.listening[key] = listen

        def leave() -> None:
            place.listening.pop(key, None)

        return leave

    def number(self, topic: str) -> int:
        """How many events a topic has had."""
        place = self._topics.get(topic)
        return place.number if place else 0

    def name(self, topic: str, number: int) -> str:
        """The id of an event by its number."""
        return f"{self._topics.setdefault(topic, Topic()).mark}-{number}"

    async def subscribe(self, topic: str, after: str | None, snapshot: Snapshot) -> AsyncGenerator[HubEvent, None]:
        """Events after an id, without end until the topic or the hub closes.

        Without an id, or with one that is too old or from elsewhere, a snapshot comes first.
        """
        place = self._topics.setdefault(topic, Topic())
        at = self._number(place, after)
        while True:
            oldest = place.ring[0].id if place.ring else None
            if at is None or (oldest is not None and at < int(oldest.split("-")[1]) - 1):
                at = place.number
                name, data = snapshot()
                yield HubEvent(f"{place.mark}-{at}", name, data)
                continue
            if at < place.number:
                behind = place.number - at
                for event in [place.ring[-back] for back in range(behind, 0, -1)]:
                    at = int(event.id.split("-")[1])
                    yield event
                continue
            if place.closed or self.closing:
                return
            await self._wait(place)

    def end(self, topic: str) -> None:
        """The topic says nothing more: its readers are let go when they have read all. It is then forgotten."""
        place = self._topics.pop(topic, None)
        if place:
            place.closed = True
            self._wake(place)
            _say_no_more(place)

    def close(self) -> None:
        """Let all readers go."""
        self.closing = True
        for place in self._topics.values():
            self._wake(place)
            _say_no_more(place)

    def _number(self, place: Topic, after: str | None) -> int | None:
        mark, _, number = (after or "").partition("-")
        if mark != place.mark or not number.isascii() or not number.isdigit() or len(number) > 15:
            return None
        return int(number) if int(number) <= place.number else None

    async def _wait(self, place: Topic) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place.waiting.add(future)
        try:
            await future
        finally:
            place.waiting.discard(future)

    def _wake(self, place: Topic) -> None:
        for future in place.waiting:
            if not future.done():
                future.set_result(None)
        place.waiting.clear()


def _say_no_more(place: Topic) -> None:
    for listen in list(place.listening.values()):
        listen(None)
