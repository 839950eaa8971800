"""The socket of a room: what people do comes in, what happens goes out, and a reader that falls behind catches up.

A reader has a place in the room's events and no queue of its own, so that one who stops reading costs nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from contextlib import aclosing, suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, WebSocket
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.websockets import WebSocketDisconnect

from ..errors import Invalid, Refused, TrellisError, shorten, unknown
from ..params import invalid_fields
from ..studio.chat.room import MOST_MODELS, Room
from ..studio.hub import HubEvent
from ..studio.studio import Studio
from ..text_rules import PROMPT_LIMIT, storable
from .broadcast import PUSH, Frames, Push
from .rate_limits import Expense

log = logging.getLogger(__name__)
router = APIRouter()

BURST, EACH_SECOND = 40, 8.0
"""Commands that one connection may send at once, and how many more each second."""

REFUSALS = 200
"""A connection that goes on after so many refusals is closed."""

WORKED_ON = 8
"""Commands of one connection that may be worked on at once."""

MOST_KEYS = 60
"""Names in one command, and in what it holds."""

Id = Annotated[str, Field(max_length=100)]
Said = Annotated[str, Field(max_length=PROMPT_LIMIT), AfterValidator(storable)]


ModelNames = (
    Annotated[str, Field(max_length=300)]
    | Annotated[list[Annotated[str, Field(max_length=300)]], Field(max_length=MOST_MODELS, fail_fast=True)]
    | None
)


class Command(BaseModel):
    """What a client sends. `request` names the action, so that sending it twice does it once."""

    model_config = ConfigDict(extra="forbid")
    request: str = Field(default_factory=lambda: secrets.token_hex(12), min_length=4, max_length=100)


class Send(Command):
    type: Literal["send"]
    text: Said
    attachments: list[Id] = Field([], max_length=20, fail_fast=True)
    parent: Id | None = None
    model: ModelNames = None
    sampling: dict[str, Any] | None = None


class Stop(Command):
    type: Literal["stop"]
    message: Id | None = None


class Edit(Command):
    type: Literal["edit"]
    message: Id
    text: Said


class Regenerate(Command):
    type: Literal["regenerate"]
    message: Id
    model: Annotated[str, Field(max_length=300)] | None = None


class GoOn(Command):
    type: Literal["go_on"]
    message: Id


class Choose(Command):
    type: Literal["choose"]
    message: Id


class Rate(Command):
    type: Literal["rate"]
    message: Id
    rating: int


class Sync(Command):
    type: Literal["sync"]
    after: int = Field(ge=0, le=2**53)


class Ping(Command):
    type: Literal["ping"]


COMMAND: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        Send | Stop | Edit | Regenerate | GoOn | Choose | Rate | Sync | Ping, Field(discriminator="type")
    ]
)  # fmt: skip

TYPES = "send, stop, edit, regenerate, go_on, choose, rate, sync, ping"


@router.websocket("/ws/chat/{room}")
async def chat(socket: WebSocket, room: str, after: Annotated[int | None, Query(ge=0, le=2**53)] = None) -> None:
    """Follow a room, from an event's number on, and take part in it. Host, origin and login were checked before
    anything came here."""
    studio: Studio = socket.app.state.studio
    try:
        found = await studio.rooms.room(room)
    except TrellisError as error:
        await socket.accept()
        await socket.send_text(json.dumps({"type": "error", "seq": 0, "error": error.as_json()}))
        await socket.close(4404, error.code)
        return
    await socket.accept()
    await Line(socket, studio, found).run(after)


class Line:
    """One connection to a room."""

    def __init__(self, socket: WebSocket, studio: Studio, room: Room) -> None:
        self._socket, self._studio, self._room = socket, studio, room
        self._expense: Expense = socket.app.state.expense
        self._client = socket.client.host if socket.client else "unknown"
        self._left, self._refilled = float(BURST), time.monotonic()
        self._refused = 0
        self._works: set[asyncio.Task[None]] = set()
        self._order = asyncio.Lock()
        self._telling: asyncio.Task[None] | None = None
        self._push: Push | None = socket.scope.get("extensions", {}).get(PUSH)
        self._frames: Frames = socket.app.state.frames
        self._told = 0
        """The last event that was told."""
        self._behind = asyncio.Event()
        self._over = False

    async def run(self, after: int | None) -> None:
        last = self._room.last
        with self._studio.rooms.watching(self._room):
            try:
                await self._say("connected", room=self._room.as_json(), last=last)
                self._tell_after(last if after is None else after)
                await self._listen()
            except WebSocketDisconnect:
                pass
            finally:
                for task in [*self._works, *([self._telling] if self._telling else [])]:
                    task.cancel()

    async def _listen(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            try:
                self._count()
                command = _read(message.get("text"))
            except TrellisError as error:
                await self._say("error", error=error.as_json(), **_named(message.get("text")))
                if self._refused > REFUSALS:
                    await self._socket.close(1008, "too_many_requests")
                    return
                continue
            if isinstance(command, Ping):
                await self._say("pong")
            elif isinstance(command, Sync):
                self._tell_after(command.after)
            else:
                while len(self._works) >= WORKED_ON:
                    await asyncio.wait(self._works, return_when=asyncio.FIRST_COMPLETED)
                task = asyncio.create_task(self._do(command))
                self._works.add(task)
                task.add_done_callback(self._works.discard)

    async def _do(self, command: Command) -> None:
        """Do what was asked for, one after the other. It is done to its end, also when who asked is gone."""
        try:
            async with self._order:
                await asyncio.shield(asyncio.ensure_future(self._act(command)))
        except TrellisError as error:
            await self._say("error", error=error.as_json(), request=command.request)
        except Exception:
            reference = secrets.token_hex(4)
            log.exception("reference %s: a command of a room failed", reference)
            await self._say("error", error=unknown(reference).as_json(), request=command.request)

    async def _act(self, command: Command) -> None:
        room = await self._studio.rooms.room(self._room.id)
        if isinstance(command, Send | Edit | Regenerate | GoOn):
            self._expense.take(self._client)
        match command:
            case Send():
                known = room.said(command.request)
                models = [command.model] if isinstance(command.model, str) else command.model or []
                if len(models) > MOST_MODELS:
                    raise Invalid(
                        f"model: at most {MOST_MODELS} can answer at once, got {len(models)}.", field="model",
                        next_step="Choose fewer.",
                    )  # fmt: skip
                await room.send(
                    command.text, command.request, parent=command.parent, models=models, sampling=command.sampling,
                    files=command.attachments,
                )  # fmt: skip
                if known:  # it was sent before, and is told again to who asks
                    await self._say("message", message=await room.whole(known), head=room.head)
            case Stop():
                await room.stop(command.message)
            case Edit():
                await room.edit(command.message, command.text, command.request)
            case Regenerate():
                await room.regenerate(command.message, command.request, command.model)
            case GoOn():
                await room.go_on(command.message)
            case Choose():
                await room.choose(command.message)
            case Rate():
                await room.rate(command.message, command.rating)

    def _count(self) -> None:
        """Raises Refused when this connection has sent too much."""
        now = time.monotonic()
        self._left = min(BURST, self._left + (now - self._refilled) * EACH_SECOND)
        self._refilled = now
        if self._left < 1:
            self._refused += 1
            raise Refused(
                "Too many commands at once over this connection.", code="too_many_requests", next_step="Wait a second."
            )
        self._left -= 1

    def _tell_after(self, seq: int) -> None:
        if self._telling:
            self._telling.cancel()
        self._telling = asyncio.create_task(self._tell(seq))

    async def _tell(self, after: int) -> None:
        """Send what happens after an event, for as long as the room is there: what has happened one after the other, at
        the reader's own pace; then what happens as it happens, until the reader falls behind."""
        self._told = after
        try:
            while True:
                if not await self._tell_what_was() or not await self._tell_live():
                    break
            await self._socket.close(1012 if self._studio.hub.closing else 1000)
        except (WebSocketDisconnect, RuntimeError):
            pass  # it is gone, which whoever listens to it sees
        except Exception:
            log.exception("the events of a room could not be told")
            with suppress(WebSocketDisconnect, RuntimeError):
                await self._socket.close(1011)

    async def _tell_what_was(self) -> bool:
        """Send events at the reader's pace until all have been told. Whether there may be more of them."""
        async with aclosing(self._studio.rooms.events(self._room, self._told)) as events:
            async for event in events:
                if event.name == "snapshot":
                    await self._catch_up()
                else:
                    await self._socket.send_text(event.json)
                    self._told = event.data["seq"]
                if self._push and self._told == self._room.last:
                    return True
        return False

    async def _tell_live(self) -> bool:
        """Write events straight to the socket as they happen, until one cannot be written at once. Whether there may be
        more of them."""
        self._behind.clear()
        self._over = False
        leave = self._studio.rooms.listen(self._room, self._take)
        try:
            await self._behind.wait()
        finally:
            leave()
        return not self._over

    def _take(self, event: HubEvent | None) -> None:
        if event is None:
            self._over = True
            self._behind.set()
        elif self._behind.is_set():
            return
        elif self._push is None or not self._push(self._frames.of(event)):
            self._behind.set()
        else:
            self._told = event.data["seq"]

    async def _catch_up(self) -> None:
        """All messages as they are, for who has missed more than is kept."""
        found, seq = await self._room.view(list(self._room.messages.values()))
        for message in found:
            told = {"type": "message", "seq": seq, "message": message, "head": self._room.head}
            await self._socket.send_text(json.dumps(told, ensure_ascii=False))
        self._told = seq

    async def _say(self, kind: str, **data: Any) -> None:
        told = {"type": kind, "seq": self._room.last, **data}
        await self._socket.send_text(json.dumps(told, ensure_ascii=False))


def _named(text: str | None) -> dict[str, str]:
    """The request that a refused command names, so that who sent it knows which one it was."""
    try:
        data = json.loads(text or "")
        request = data["request"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}
    return {"request": request} if isinstance(request, str) and len(request) <= 100 and request.isascii() else {}


def _read(text: str | None) -> Command:
    """A command as it was sent. Raises Invalid, which says what is wrong with it."""
    if text is None:
        raise Invalid(
            "Only text is accepted here.", code="bad_json", next_step="Send a JSON object as text.", fields=[]
        )
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise Invalid(
            "The message is not JSON.", code="bad_json", next_step="Send a JSON object with a “type”.", fields=[]
        ) from None
    if not isinstance(data, dict) or data.get("type") not in TYPES.split(", "):
        kind = data.get("type") if isinstance(data, dict) else data
        raise Invalid(
            f"type: there is no command “{shorten(kind, 40)}”.", field="type", code="unknown_type",
            next_step=f"The commands are {TYPES}.",
        )  # fmt: skip
    for each in (data, *(value for value in data.values() if isinstance(value, dict))):
        if len(each) > MOST_KEYS:
            raise Invalid(f"{len(each)} names are too many.", field="", next_step=f"Send {MOST_KEYS} at most.")
    try:
        command: Command = COMMAND.validate_python(data)
    except ValidationError as error:
        findings = [{**finding, "loc": finding["loc"][1:]} for finding in error.errors()]
        raise invalid_fields(findings) from None
    return command
