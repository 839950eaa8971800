"""The WebSocket of a room: commands in, events out, resumable.

A reader has a position in the room's events and no queue of its own, so that one who stops reading costs nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from contextlib import aclosing, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Query, WebSocket
from starlette.websockets import WebSocketDisconnect

from ..errors import Invalid, Refused, TrellisError, internal_error
from ..studio.chat import MAX_MODELS, Room
from ..studio.hub import HubEvent
from ..studio.studio import Studio
from .broadcast import WRITE_FRAME_EXTENSION, FrameCache, WriteFrame
from .chat_commands import (
    Choose,
    Command,
    Continue,
    Edit,
    Ping,
    Rate,
    Regenerate,
    Send,
    Stop,
    Sync,
    parse_command,
    request_id_field,
)
from .rate_limits import RateLimiter

log = logging.getLogger(__name__)
router = APIRouter()

BURST_COMMANDS, COMMANDS_PER_SECOND = 40, 8.0
"""The burst of commands that one connection may send, and its refill rate."""

MAX_REFUSALS = 200
"""A connection is closed after this many refusals."""

MAX_CONCURRENT_COMMANDS = 8
"""The most pending commands of one connection."""


@router.websocket("/ws/chat/{room}")
async def chat(socket: WebSocket, room: str, after: Annotated[int | None, Query(ge=0, le=2**53)] = None) -> None:
    """Follow a room from an event number on, and take part in it. AccessMiddleware has checked Host, Origin and
    login."""
    studio: Studio = socket.app.state.studio
    try:
        found = await studio.rooms.room(room)
    except TrellisError as error:
        await socket.accept()
        await socket.send_text(json.dumps({"type": "error", "seq": 0, "error": error.as_json()}))
        await socket.close(4404, error.code)
        return
    await socket.accept()
    await RoomConnection(socket, studio, found).run(after)


class RoomConnection:
    """One connection to a room."""

    def __init__(self, socket: WebSocket, studio: Studio, room: Room) -> None:
        self._socket, self._studio, self._room = socket, studio, room
        self._rate_limiter: RateLimiter = socket.app.state.expense
        self._client = socket.client.host if socket.client else "unknown"
        self._commands_left, self._refilled_at = float(BURST_COMMANDS), time.monotonic()
        self._refusals = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._command_lock = asyncio.Lock()
        self._send_task: asyncio.Task[None] | None = None
        self._write_frame: WriteFrame | None = socket.scope.get("extensions", {}).get(WRITE_FRAME_EXTENSION)
        self._frame_cache: FrameCache = socket.app.state.frames
        self._last_sent = 0
        """The number of the last event sent."""
        self._fell_behind = asyncio.Event()
        self._is_room_closed = False

    async def run(self, after: int | None) -> None:
        last = self._room.last_event_number
        with self._studio.rooms.watch(self._room):
            try:
                await self._send("connected", room=self._room.as_json(), last=last)
                self._start_sending(last if after is None else after)
                await self._receive_commands()
            except WebSocketDisconnect:
                pass
            finally:
                for task in [*self._tasks, *([self._send_task] if self._send_task else [])]:
                    task.cancel()

    async def _receive_commands(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            try:
                self._check_rate()
                command = parse_command(message.get("text"))
            except TrellisError as error:
                await self._send("error", error=error.as_json(), **request_id_field(message.get("text")))
                if self._refusals > MAX_REFUSALS:
                    await self._socket.close(1008, "too_many_requests")
                    return
                continue
            if isinstance(command, Ping):
                await self._send("pong")
            elif isinstance(command, Sync):
                self._start_sending(command.after)
            else:
                while len(self._tasks) >= MAX_CONCURRENT_COMMANDS:
                    await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
                task = asyncio.create_task(self._run_command(command))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _run_command(self, command: Command) -> None:
        """Run a command; one at a time, and to its end even when the client is gone."""
        try:
            async with self._command_lock:
                await asyncio.shield(asyncio.ensure_future(self._execute(command)))
        except TrellisError as error:
            await self._send("error", error=error.as_json(), request=command.request)
        except Exception:
            reference = secrets.token_hex(4)
            log.exception("reference %s: a command of a room failed", reference)
            await self._send("error", error=internal_error(reference).as_json(), request=command.request)

    async def _execute(self, command: Command) -> None:
        room = await self._studio.rooms.room(self._room.id)
        if isinstance(command, Send | Edit | Regenerate | Continue):
            self._rate_limiter.hit(self._client)
        match command:
            case Send():
                sent_message = room.message_by_request(command.request)
                models = [command.model] if isinstance(command.model, str) else command.model or []
                if len(models) > MAX_MODELS:
                    raise Invalid(
                        f"model: at most {MAX_MODELS} can answer at once, got {len(models)}.", field="model",
                        next_step="Choose fewer.",
                    )  # fmt: skip
                await room.send(
                    command.text, command.request, parent=command.parent, models=models, sampling=command.sampling,
                    files=command.attachments,
                )  # fmt: skip
                if sent_message:  # a repeated request: its message is sent again to this client
                    await self._send("message", message=await room.rendered_message(sent_message), head=room.head)
            case Stop():
                await room.stop(command.message)
            case Edit():
                await room.edit(command.message, command.text, command.request)
            case Regenerate():
                await room.regenerate(command.message, command.request, command.model)
            case Continue():
                await room.continue_answer(command.message)
            case Choose():
                await room.select_branch(command.message)
            case Rate():
                await room.rate(command.message, command.rating)

    def _check_rate(self) -> None:
        """Raise Refused when this connection sends too much."""
        now = time.monotonic()
        self._commands_left = min(BURST_COMMANDS, self._commands_left + (now - self._refilled_at) * COMMANDS_PER_SECOND)
        self._refilled_at = now
        if self._commands_left < 1:
            self._refusals += 1
            raise Refused(
                "Too many commands at once over this connection.", code="too_many_requests", next_step="Wait a second."
            )
        self._commands_left -= 1

    def _start_sending(self, after: int) -> None:
        if self._send_task:
            self._send_task.cancel()
        self._send_task = asyncio.create_task(self._send_events(after))

    async def _send_events(self, after: int) -> None:
        """Send the events after a number until the room closes: missed ones at the reader's pace, then live ones
        until the reader falls behind again."""
        self._last_sent = after
        try:
            while True:
                if not await self._send_backlog() or not await self._send_live():
                    break
            await self._socket.close(1012 if self._studio.hub.is_closing else 1000)
        except (WebSocketDisconnect, RuntimeError):
            pass  # disconnected, which `_receive_commands` sees too
        except Exception:
            log.exception("the events of a room could not be told")
            with suppress(WebSocketDisconnect, RuntimeError):
                await self._socket.close(1011)

    async def _send_backlog(self) -> bool:
        """Send missed events at the reader's pace. Return whether more may come."""
        async with aclosing(self._studio.rooms.events(self._room, self._last_sent)) as events:
            async for event in events:
                if event.name == "snapshot":
                    await self._send_snapshot()
                else:
                    await self._socket.send_text(event.json)
                    self._last_sent = event.data["seq"]
                if self._write_frame and self._last_sent == self._room.last_event_number:
                    return True
        return False

    async def _send_live(self) -> bool:
        """Write events straight to the socket as they happen, until one cannot be written at once. Return whether
        more may come."""
        self._fell_behind.clear()
        self._is_room_closed = False
        unsubscribe = self._studio.rooms.add_listener(self._room, self._on_event)
        try:
            await self._fell_behind.wait()
        finally:
            unsubscribe()
        return not self._is_room_closed

    def _on_event(self, event: HubEvent | None) -> None:
        if event is None:
            self._is_room_closed = True
            self._fell_behind.set()
        elif self._fell_behind.is_set():
            return
        elif self._write_frame is None or not self._write_frame(self._frame_cache.frame_for(event)):
            self._fell_behind.set()
        else:
            self._last_sent = event.data["seq"]

    async def _send_snapshot(self) -> None:
        """Send all messages, for a reader that has missed more events than are kept."""
        found, seq = await self._room.rendered_messages(list(self._room.messages.values()))
        for message in found:
            payload = {"type": "message", "seq": seq, "message": message, "head": self._room.head}
            await self._socket.send_text(json.dumps(payload, ensure_ascii=False))
        self._last_sent = seq

    async def _send(self, kind: str, **data: Any) -> None:
        payload = {"type": kind, "seq": self._room.last_event_number, **data}
        await self._socket.send_text(json.dumps(payload, ensure_ascii=False))
