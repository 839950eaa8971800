"""All rooms: made, found, searched, taken away, brought in. One that was asked for stays in memory for a while."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...errors import Conflict, NotFound, shorten
from ...messages import Choice, Option, Written
from ...store import rooms as rows
from ...store.store import Store
from ...text_rules import folded, spellings
from ..hub import Hub, HubEvent, Listen
from ..jobs import timestamp
from .attachments import Attachments
from .message import Message, message_from
from .room import Room, sampling_from
from .targets import Speakers

log = logging.getLogger(__name__)

IDLE_SECONDS = 600.0
MOST_SHOWN = 200
UNNAMED = "New chat"
MOST_OPTIONS = 8


class Rooms:
    """Every room is in the store; an open one is here too."""

    def __init__(self, store: Store, hub: Hub, speakers: Speakers, attachments: Attachments) -> None:
        self._store, self._hub, self.speakers, self._attachments = store, hub, speakers, attachments
        self._rooms: dict[str, Room] = {}
        self._opening = asyncio.Lock()
        self._creating = asyncio.Lock()

    async def open(self) -> None:
        """Say of answers that a crash cut off that they broke off."""
        await self._store.write(rows.interrupt_messages)

    async def close(self) -> None:
        await asyncio.gather(*(room.close() for room in list(self._rooms.values())))

    async def create(
        self,
        *,
        title: str = "",
        models: Sequence[str] = (),
        system: str = "",
        sampling: dict[str, Any] | None = None,
        request: str | None = None,
        messages: Sequence[Message] = (),
        head: str | None = None,
        room_id: str | None = None,
    ) -> Room:
        """A new room; the same request makes one. Raises NotFound for a model that is not there, or Invalid."""
        async with self._creating:  # one request makes one room
            if request and (known := await self._store.read(rows.room_by_request, request)):
                return await self.room(known)
            row = await self._new_row(title, models, system, sampling, request, head, room_id)
            await self._store.write(rows.add_room, row, [message.row() for message in messages])
        return await self.room(str(row["id"]))

    async def _new_row(
        self,
        title: str,
        models: Sequence[str],
        system: str,
        sampling: dict[str, Any] | None,
        request: str | None,
        head: str | None,
        room_id: str | None,
    ) -> dict[str, Any]:
        """Raises NotFound for a model that is not there, or Invalid."""
        names = [(await self.speakers.find(name)).name for name in models]
        sampling_from(sampling or {})
        now = time.time()
        return {
            "id": room_id or new_room_id(), "request": request, "title": title or UNNAMED,
            "folded": folded(title), "named": int(bool(title)), "system": system, "models": names or ["demo"],
            "sampling": sampling or {}, "head": head, "archived": 0, "created": now, "updated": now,
        }  # fmt: skip

    async def room(self, room_id: str) -> Room:
        """A room by its id. Raises NotFound."""
        if known := self._rooms.get(room_id):
            known.used = time.monotonic()
            return known
        async with self._opening:
            if room_id in self._rooms:
                return self._rooms[room_id]
            await self._let_idle_ones_go()
            found = await self._store.read(rows.get_room, room_id)
            if found is None:
                raise NotFound(f"There is no chat “{shorten(room_id)}”.", next_step="The chat page lists all chats.")
            row, messages = found
            room = Room(
                self._store, self._hub, self.speakers, self._attachments, row, [message_from(each) for each in messages]
            )
            self._rooms[room_id] = room
            return room

    async def found(self, q: str = "", archived: bool = False, most: int = MOST_SHOWN) -> list[dict[str, Any]]:
        """Rooms in which all words of `q` occur, the last used first, each with the place where the first one does."""
        words = [spellings(word) for word in q.split()[:10]]
        found = await self._store.read(rows.list_rooms, words, archived, most)
        hits = await asyncio.to_thread(lambda: [around(row["hit"], q.split()[0]) if row.get("hit") else None
                                                for row in found])  # fmt: skip
        return [
            {
                "id": row["id"], "title": row["title"], "models": row["models"], "archived": bool(row["archived"]),
                "created": timestamp(row["created"]), "updated": timestamp(row["updated"]),
                "growing": row["id"] in self._rooms and bool(self._rooms[row["id"]].as_json()["growing"]),
                "found": hit,
            }
            for row, hit in zip(found, hits, strict=True)
        ]  # fmt: skip

    async def delete(self, room_id: str) -> None:
        """Forget a room and all that was said in it. Raises NotFound."""
        room = await self.room(room_id)
        await room.close("deleted")
        files = await self._store.read(rows.get_files, room_id)
        try:
            await self._store.write(rows.delete_room, room_id)
        finally:
            self._rooms.pop(room_id, None)  # if it could not be deleted, it is read again from the store
        for file in files:
            await self._attachments.discard(file["id"])

    def events(self, room: Room, after: int) -> AsyncGenerator[HubEvent, None]:
        """What happens in a room after an event's number. Where that is too old a `snapshot` comes first."""
        return self._hub.subscribe(room.topic, room.place(after), lambda: ("snapshot", {"seq": room.last}))

    def listen(self, room: Room, listen: Listen) -> Callable[[], None]:
        """Be told of what happens in a room at once, until the function that is returned is called."""
        return self._hub.listen(room.topic, listen)

    @contextmanager
    def watching(self, room: Room) -> Iterator[None]:
        """Within this the room stays in memory."""
        room.watched += 1
        try:
            yield
        finally:
            room.watched -= 1
            room.used = time.monotonic()

    def said_of(self, room: Room, message_id: str) -> tuple[str, tuple[Option, ...], Choice]:
        """What was said of the answers to one prompt, as a choice: an answer against those beside it; a refusal of one
        that was called bad; an answer to learn where it stands alone and was called good. Raises Conflict where that
        says nothing."""
        answer = room.message(message_id)
        if answer.role != "assistant" or answer.parent is None or not answer.text.strip():
            raise Conflict("Only answers can be used for training.", code="no_choice", next_step="Choose an answer.")
        asked = room.message(answer.parent)
        if asked.parent is not None or room.system or asked.files:
            raise Conflict(
                "Only answers to a chat's first message, without system prompt or files, can be used for training.",
                code="not_a_prompt", next_step="Ask in a new chat.",
            )  # fmt: skip
        if answer.state == "growing":
            raise Conflict("This answer is still being generated.", code="not_now", next_step="Wait until it is done.")
        others = [each for each in room.children(asked.id) if each.text.strip() and each.text != answer.text]
        others = [each for each in others if each.state != "growing"]
        if answer.rating < 0:
            return asked.text, (_option(answer),), "none"
        if not others and answer.rating == 0:
            raise Conflict(
                "There is nothing to compare this answer with.", code="no_choice",
                next_step="Rate it or regenerate first.",
            )  # fmt: skip
        if not others:
            return asked.text, (), Written(written=answer.text)
        return asked.text, tuple(map(_option, [answer, *others][:MOST_OPTIONS])), 0

    async def prompts(self) -> list[dict[str, Any]]:
        """The prompt library."""
        return [{"id": row["id"], "name": row["name"], "text": row["text"]} for row in
                await self._store.read(rows.list_prompts)]  # fmt: skip

    async def keep_prompt(self, name: str, text: str) -> None:
        row = {"id": f"p{secrets.token_hex(8)}", "name": name, "text": text, "created": time.time()}
        await self._store.write(rows.put_prompt, row)

    async def drop_prompt(self, prompt_id: str) -> None:
        await self._store.write(rows.delete_prompt, prompt_id)

    async def _let_idle_ones_go(self) -> None:
        now = time.monotonic()
        for room in list(self._rooms.values()):
            if room.idle and now - room.used > IDLE_SECONDS:
                del self._rooms[room.id]
                await room.close()


def _option(message: Message) -> Option:
    whole = message.state == "done" and message.finish != "length"
    return Option(text=message.text, tokens=(), finish="stop" if whole else "length")


def new_room_id() -> str:
    return f"r{secrets.token_hex(8)}"


def around(text: str, word: str, width: int = 120) -> str:
    """The words around the first place where a word stands, whatever its case and however its letters are composed."""
    place = max(folded(text).find(folded(word)), 0)
    # Folding may change how long the text is: the place is where as much of it has been folded.
    place = bisect_left(range(len(text)), place, key=lambda end: len(folded(text[:end])))
    start = max(0, place - width // 3)
    return ("…" if start else "") + " ".join(text[start : start + width].split())
