"""One engine as the web process sees it: start it, ask it, stream its events, cancel, stop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Protocol

from ..errors import EngineDied, EngineError, EngineStopped, Invalid, TrellisError, WeightsMissing
from ..messages import Cancel, Cancelled, Event, Failed, Request, RequestFrame, SetPriority
from .channel import Channel
from .exit_codes import explain_exit


class Engine(Protocol):
    """What runs behind a socket: a process, or a thread in a test."""

    @property
    def pid(self) -> int | None: ...

    def wait(self, timeout: float) -> int | None:
        """Return the exit code, or None if it has not ended in time."""

    def kill(self) -> None: ...


Spawn = Callable[[socket.socket], tuple[Engine, Path | None]]
"""Start an engine on its end of a socket. Returns it and its log."""


def _spawn_on_socket(spawn: Spawn) -> tuple[socket.socket, Engine, Path | None]:
    our_end, engine_end = socket.socketpair()
    try:
        engine, log = spawn(engine_end)
    except OSError:
        our_end.close()
        raise
    finally:
        engine_end.close()
    return our_end, engine, log


def _kill_started_engine(starting: asyncio.Future[tuple[socket.socket, Engine, Path | None]]) -> None:
    """Kill an engine whose start was cancelled."""
    if not starting.cancelled() and starting.exception() is None:
        our_end, engine, _ = starting.result()
        our_end.close()
        engine.kill()
        engine.wait(1.0)


UNLOADED = EngineStopped("The model was unloaded while it was in use.", next_step="Try again to load it.")


class Worker:
    """A running engine. When it dies, every waiting caller gets an EngineDied that says why."""

    def __init__(self, channel: Channel, engine: Engine, log: Path | None) -> None:
        self._channel = channel
        self._engine = engine
        self._log = log
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, asyncio.Queue[tuple[Event, bool] | None]] = {}
        self._requests: dict[int, Request] = {}
        self._death: EngineError | None = None
        self._stopping = False
        self._receive_task = asyncio.create_task(self._receive(), name="worker")
        self.on_death: Callable[[EngineError], None] = lambda error: None

    @classmethod
    async def start(cls, spawn: Spawn) -> Worker:
        starting = asyncio.ensure_future(asyncio.to_thread(_spawn_on_socket, spawn))
        try:
            our_end, engine, log = await asyncio.shield(starting)
        except OSError as error:
            raise EngineDied(
                f"The engine could not be started: {error}.", next_step="Run `trellis doctor` to see what is missing."
            ) from error
        except asyncio.CancelledError:
            starting.add_done_callback(_kill_started_engine)
            raise
        return cls(await Channel.over(our_end), engine, log)

    @property
    def pid(self) -> int | None:
        return self._engine.pid

    @property
    def is_busy(self) -> bool:
        """Whether a request is unanswered."""
        return bool(self._inboxes)

    @property
    def is_alive(self) -> bool:
        return self._death is None and not self._stopping

    async def ask(self, request: Request, priority: int = 0, owner: str = "") -> Event:
        """Return the last event of a request. Raises the engine's error, or EngineDied."""
        async for event in self.stream(request, priority, owner):
            last = event
        return last

    async def stream(
        self, request: Request, priority: int = 0, owner: str = "", continues_turn: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Yield all events of a request, the result last. Leaving the loop early cancels the request. Owners take
        turns; `continues_turn` marks a request that needs no new turn."""
        if self._death:
            raise await self._wait_for_death()
        number = next(self._numbers)
        inbox: asyncio.Queue[tuple[Event, bool] | None] = asyncio.Queue()
        self._inboxes[number] = inbox
        self._requests[number] = request
        is_done = False
        try:
            await self._send(
                RequestFrame(id=number, priority=priority, owner=owner, continues_turn=continues_turn, body=request)
            )
            while not is_done:
                item = await inbox.get()
                if item is None:
                    is_done = True
                    raise await self._wait_for_death()
                event, is_done = item
                if isinstance(event, Failed):
                    raise error_from(event)
                if isinstance(event, Cancelled):
                    raise EngineError("The request was cancelled.", code="cancelled", next_step="Ask again.")
                yield event
        finally:
            del self._inboxes[number], self._requests[number]
            if not is_done and self.is_alive:
                with contextlib.suppress(TrellisError):
                    await self._send(RequestFrame(id=number, body=Cancel(request=number)))

    async def set_priority(self, request: Request, priority: int = 0) -> None:
        """Change the priority of a request, identified by the object; does nothing if it has ended."""
        for number, running in self._requests.items():
            if running is request:
                await self._send(RequestFrame(id=number, body=SetPriority(request=number, priority=priority)))
                return

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """End the engine by closing its socket; kill it if it does not exit in time."""
        self._stopping = True
        await self._channel.close()
        if await asyncio.to_thread(self._engine.wait, grace_seconds) is None:
            self._engine.kill()
            await asyncio.to_thread(self._engine.wait, grace_seconds)
        await self._receive_task

    async def _send(self, frame: RequestFrame) -> None:
        try:
            await self._channel.send(frame)
        except (ConnectionError, RuntimeError):
            raise await self._wait_for_death() from None

    async def _wait_for_death(self) -> EngineError:
        """Return why the engine died, once `on_death` has been called, so that a retry does not get it again."""
        await asyncio.shield(self._receive_task)
        return self._death or explain_exit(None, self._log)

    async def _receive(self) -> None:
        while (frame := await self._channel.receive()) is not None:
            if inbox := self._inboxes.get(frame.id):
                inbox.put_nowait((frame.body, frame.last))
        code = await asyncio.to_thread(self._engine.wait, 1.0)
        self._death = UNLOADED if self._stopping else explain_exit(code, self._log)
        for inbox in self._inboxes.values():
            inbox.put_nowait(None)
        if not self._stopping:
            await self._channel.close()
            await asyncio.to_thread(self._engine.kill)
            await asyncio.to_thread(self._engine.wait, 1.0)
            self.on_death(self._death)


def error_from(failed: Failed) -> TrellisError:
    """Convert an engine's error event to the exception type that callers handle."""
    if failed.code == WeightsMissing.code:
        return WeightsMissing(str(failed.details.get("weights", "")))
    if failed.field is not None:
        return Invalid(failed.message, next_step=failed.next_step, field=failed.field, code=failed.code)
    return EngineError(
        failed.message, next_step=failed.next_step, code=failed.code, field=failed.field, details=failed.details
    )
