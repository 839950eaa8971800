"""Results computed before anyone asks. Requests are pure, so that a later request gets the same result.

A request runs on its own; whoever needs its result follows it from its beginning, and makes it urgent. It does not know
what the requests mean.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Collection, Iterator
from contextlib import aclosing

from ...messages import Event, Request, recipe_id, recipe_of
from ...workers.worker import Worker

INTERACTIVE_PRIORITY = 0
"""Priority of requests that somebody waits for."""

FORESIGHT_PRIORITY = 3
"""Priority of foresight: after people, after metrics and control answers, after long jobs."""

MAX_RESULTS = 64
"""Number of finished results that are kept, last used first, so that another choice after an undo finds them."""


async def last_event(events: AsyncGenerator[Event, None]) -> Event:
    """Return the last event of a stream."""
    async with aclosing(events):
        async for event in events:
            result = event
    return result


def request_key(request: Request) -> str:
    """Return the key of a request: the same for the same work."""
    return recipe_id("q", [request.type, recipe_of(request)])


class ForesightRequest:
    """One request sent ahead of time, and its events so far."""

    def __init__(self, worker: Worker, owner: str, request: Request, node: str) -> None:
        self.node = node
        self.worker = worker
        self._owner = owner
        self.request = request
        self._priority = FORESIGHT_PRIORITY
        self._events: list[Event] = []
        self._new_event = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name=f"ahead {request.type}")

    @property
    def is_finished(self) -> bool:
        return self.task.done()

    @property
    def is_usable(self) -> bool:
        """Whether it has a result or may still get one."""
        return not self.task.done() or not (self.task.cancelled() or self.task.exception())

    @property
    def result(self) -> Event:
        """Return the result."""
        return self._events[-1]

    async def _run(self) -> None:
        try:
            async with aclosing(self.worker.stream(self.request, self._priority, self._owner)) as events:
                async for event in events:
                    self._events.append(event)
                    self._new_event.set()
        finally:
            self._new_event.set()

    async def follow(self) -> AsyncGenerator[Event, None]:
        """Yield the events from the first one, the result last. Raise the error of the request."""
        sent_count = 0
        while True:
            while sent_count < len(self._events):
                sent_count += 1
                yield self._events[sent_count - 1]
            if self.task.done():
                if sent_count == len(self._events):
                    await self.task
                    return
                continue
            self._new_event.clear()
            await self._new_event.wait()

    async def raise_priority(self) -> None:
        """Raise the priority, since somebody waits for it now."""
        self._priority = INTERACTIVE_PRIORITY  # also for a request that has not been sent yet
        if not self.task.done():
            await self.worker.set_priority(self.request)

    def cancel(self) -> None:
        self.task.cancel()


class Foresight:
    """The requests that one session sent ahead of time, each for the node that it would lead to."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._requests: OrderedDict[str, ForesightRequest] = OrderedDict()

    async def begin(self, worker: Worker, request: Request, node: str) -> Event:
        """Work something out unless that is done or under way. Returns the result; who leaves early leaves it
        running."""
        ahead = self._find(request)
        if ahead is None:
            key = request_key(request)
            ahead = self._requests[key] = ForesightRequest(worker, self._owner, request, node)
            while len(self._requests) > MAX_RESULTS:
                self._requests.popitem(last=False)[1].cancel()
        return await last_event(ahead.follow())

    async def claim(self, request: Request, node: str) -> ForesightRequest | None:
        """Return the request that somebody now waits for, with its priority raised, and cancel others."""
        self.cancel_except({node})
        ahead = self._find(request)
        if ahead is not None:
            await ahead.raise_priority()
        return ahead

    def finished_results(self, node: str) -> Iterator[tuple[Request, Event, Worker]]:
        """Yield the finished requests that lead to a node: request, result, engine."""
        for each in self._requests.values():
            if each.node == node and each.is_finished and each.is_usable:
                yield each.request, each.result, each.worker

    def cancel_except(self, nodes: Collection[str]) -> None:
        """Cancel running requests that lead to none of these nodes."""
        for key, each in list(self._requests.items()):
            if not each.is_finished and each.node not in nodes:
                each.cancel()
                del self._requests[key]

    def _find(self, request: Request) -> ForesightRequest | None:
        for key, each in list(self._requests.items()):
            if not each.is_usable:
                del self._requests[key]
        key = request_key(request)
        if key in self._requests:
            self._requests.move_to_end(key)
        return self._requests.get(key)

    async def close(self) -> None:
        """Cancel everything."""
        for each in self._requests.values():
            each.cancel()
        await asyncio.gather(*(each.task for each in self._requests.values()), return_exceptions=True)
        self._requests.clear()
