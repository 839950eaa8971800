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

RING_SIZE = 1024

ESCAPED_LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
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
        for mark, escaped in ESCAPED_LINE_ENDS.items():
            text = text.replace(mark, escaped)
        return text


EventListener = Callable[[HubEvent | None], None]
"""Told of each event as it is published, and of None when there will be no more. It must not wait."""

Snapshot = Callable[[], tuple[str, dict[str, Any]]]


@dataclass
class Topic:
    """A ring of events. Its ids carry a mark of their own, so that an id from before a restart or of a dropped ring
    is never mistaken for one of these."""

    instance_id: str = field(default_factory=lambda: secrets.token_hex(4))
    last_number: int = 0
    ring: deque[HubEvent] = field(default_factory=lambda: deque(maxlen=RING_SIZE))
    waiters: set[asyncio.Future[None]] = field(default_factory=set)
    listeners: dict[object, EventListener] = field(default_factory=dict)
    is_closed: bool = False


class Hub:
    """The topics of this process."""

    def __init__(self) -> None:
        self._topics: dict[str, Topic] = {}
        self.is_closing = False

    def publish(self, topic: str, name: str, data: dict[str, Any]) -> str:
        """Add an event. Returns its id. Never waits."""
        topic_state = self._topics.setdefault(topic, Topic())
        topic_state.last_number += 1
        event = HubEvent(f"{topic_state.instance_id}-{topic_state.last_number}", name, data)
        topic_state.ring.append(event)
        self._wake_waiters(topic_state)
        for on_event in list(topic_state.listeners.values()):
            on_event(event)
        return event.id

    def last_event_id(self, topic: str) -> str:
        """The id of the newest event of a topic."""
        topic_state = self._topics.setdefault(topic, Topic())
        return f"{topic_state.instance_id}-{topic_state.last_number}"

    def add_listener(self, topic: str, on_event: EventListener) -> Callable[[], None]:
        """Call a listener with every event of a topic, until the returned function is called."""
        topic_state, key = self._topics.setdefault(topic, Topic()), object()
        topic_state.listeners[key] = on_event

        def remove_listener() -> None:
            topic_state.listeners.pop(key, None)

        return remove_listener

    def event_count(self, topic: str) -> int:
        """How many events a topic has had."""
        topic_state = self._topics.get(topic)
        return topic_state.last_number if topic_state else 0

    def event_id(self, topic: str, number: int) -> str:
        """The id of an event by its number."""
        return f"{self._topics.setdefault(topic, Topic()).instance_id}-{number}"

    async def subscribe(self, topic: str, after: str | None, snapshot: Snapshot) -> AsyncGenerator[HubEvent, None]:
        """Events after an id, without end until the topic or the hub closes.

        Without an id, or with one that is too old or from elsewhere, a snapshot comes first.
        """
        topic_state = self._topics.setdefault(topic, Topic())
        position = self._parse_event_number(topic_state, after)
        while True:
            oldest = topic_state.ring[0].id if topic_state.ring else None
            if position is None or (oldest is not None and position < int(oldest.split("-")[1]) - 1):
                position = topic_state.last_number
                name, data = snapshot()
                yield HubEvent(f"{topic_state.instance_id}-{position}", name, data)
                continue
            if position < topic_state.last_number:
                missed_count = topic_state.last_number - position
                for event in [topic_state.ring[-offset] for offset in range(missed_count, 0, -1)]:
                    position = int(event.id.split("-")[1])
                    yield event
                continue
            if topic_state.is_closed or self.is_closing:
                return
            await self._wait_for_event(topic_state)

    def close_topic(self, topic: str) -> None:
        """The topic says nothing more: its readers are let go when they have read all. It is then forgotten."""
        topic_state = self._topics.pop(topic, None)
        if topic_state:
            topic_state.is_closed = True
            self._wake_waiters(topic_state)
            _end_listeners(topic_state)

    def close(self) -> None:
        """Let all readers go."""
        self.is_closing = True
        for topic_state in self._topics.values():
            self._wake_waiters(topic_state)
            _end_listeners(topic_state)

    def _parse_event_number(self, topic_state: Topic, after: str | None) -> int | None:
        instance_id, _, number = (after or "").partition("-")
        if instance_id != topic_state.instance_id or not number.isascii() or not number.isdigit() or len(number) > 15:
            return None
        return int(number) if int(number) <= topic_state.last_number else None

    async def _wait_for_event(self, topic_state: Topic) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        topic_state.waiters.add(future)
        try:
            await future
        finally:
            topic_state.waiters.discard(future)

    def _wake_waiters(self, topic_state: Topic) -> None:
        for future in topic_state.waiters:
            if not future.done():
                future.set_result(None)
        topic_state.waiters.clear()


def _end_listeners(topic_state: Topic) -> None:
    for on_event in list(topic_state.listeners.values()):
        on_event(None)
