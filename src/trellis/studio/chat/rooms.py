"""All rooms: create, open, search, delete. Open rooms stay in memory for a while."""

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
from ...text_rules import fold_text, search_spellings
from ..hub import EventListener, Hub, HubEvent
from ..jobs import timestamp
from .attachments import Attachments
from .message import Message, message_from_row
from .room import Room
from .room_state import parse_sampling
from .targets import ChatTargets

log = logging.getLogger(__name__)

IDLE_SECONDS = 600.0
MAX_LISTED_ROOMS = 200
DEFAULT_TITLE = "New chat"
MAX_OPTIONS = 8


class Rooms:
    """The rooms of the studio. Every room is in the store; the open ones are in memory too.

    Rooms have no owner: everyone whom `web/access.py` lets in sees all of them."""

    def __init__(self, store: Store, hub: Hub, targets: ChatTargets, attachments: Attachments) -> None:
        self._store, self._hub, self.targets, self._attachments = store, hub, targets, attachments
        self._rooms: dict[str, Room] = {}
        self._open_lock = asyncio.Lock()
        self._create_lock = asyncio.Lock()

    async def open(self) -> None:
        """Mark answers that a crash cut off as interrupted."""
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
        """Create a room, once for each request. Raise NotFound for an unknown model, or Invalid."""
        async with self._create_lock:  # concurrent requests of the same id make one room
            if request and (known_id := await self._store.read(rows.room_by_request, request)):
                return await self.room(known_id)
            row = await self._new_row(title, models, system, sampling, request, head, room_id)
            await self._store.write(rows.add_room, row, [message.to_row() for message in messages])
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
        """Raise NotFound for an unknown model, or Invalid."""
        names = [(await self.targets.find(name)).name for name in models]
        parse_sampling(sampling or {})
        now = time.time()
        return {
            "id": room_id or new_room_id(), "request": request, "title": title or DEFAULT_TITLE,
            "folded": fold_text(title), "named": int(bool(title)), "system": system, "models": names or ["demo"],
            "sampling": sampling or {}, "head": head, "archived": 0, "created": now, "updated": now,
        }  # fmt: skip

    async def room(self, room_id: str) -> Room:
        """Return a room by id. Raise NotFound."""
        if open_room := self._rooms.get(room_id):
            open_room.last_used = time.monotonic()
            return open_room
        async with self._open_lock:
            if room_id in self._rooms:
                return self._rooms[room_id]
            await self._close_idle_rooms()
            room_rows = await self._store.read(rows.get_room, room_id)
            if room_rows is None:
                raise NotFound(f"There is no chat “{shorten(room_id)}”.", next_step="The chat page lists all chats.")
            row, messages = room_rows
            room = Room(
                self._store,
                self._hub,
                self.targets,
                self._attachments,
                row,
                [message_from_row(each) for each in messages],
            )
            self._rooms[room_id] = room
            return room

    async def search(
        self, query: str = "", archived: bool = False, max_rooms: int = MAX_LISTED_ROOMS
    ) -> list[dict[str, Any]]:
        """Return rooms that contain all words of a query, last used first, each with the text around its first
        match."""
        words = [search_spellings(word) for word in query.split()[:10]]
        room_rows = await self._store.read(rows.list_rooms, words, archived, max_rooms)
        hits = await asyncio.to_thread(lambda: [snippet_around(row["hit"], query.split()[0]) if row.get("hit") else None
                                                for row in room_rows])  # fmt: skip
        return [
            {
                "id": row["id"], "title": row["title"], "models": row["models"], "archived": bool(row["archived"]),
                "created": timestamp(row["created"]), "updated": timestamp(row["updated"]),
                "growing": row["id"] in self._rooms and bool(self._rooms[row["id"]].as_json()["growing"]),
                "found": hit,
            }
            for row, hit in zip(room_rows, hits, strict=True)
        ]  # fmt: skip

    async def delete(self, room_id: str) -> None:
        """Delete a room with its messages and files. Raise NotFound."""
        room = await self.room(room_id)
        await room.close("deleted")
        files = await self._store.read(rows.get_files, room_id)
        try:
            await self._store.write(rows.delete_room, room_id)
        finally:
            self._rooms.pop(room_id, None)  # if deleting failed, the room is read again
        for file in files:
            await self._attachments.discard(file["id"])

    def events(self, room: Room, after: int) -> AsyncGenerator[HubEvent, None]:
        """Yield the events of a room after an event number; first a `snapshot` where that number is too old."""
        return self._hub.subscribe(
            room.topic, room.hub_event_id(after), lambda: ("snapshot", {"seq": room.last_event_number})
        )

    def add_listener(self, room: Room, on_event: EventListener) -> Callable[[], None]:
        """Call `on_event` for every event at once, until the returned function is called."""
        return self._hub.add_listener(room.topic, on_event)

    @contextmanager
    def watch(self, room: Room) -> Iterator[None]:
        """Keep a room in memory within the block."""
        room.watchers += 1
        try:
            yield
        finally:
            room.watchers -= 1
            room.last_used = time.monotonic()

    def choice_from_answer(self, room: Room, message_id: str) -> tuple[str, tuple[Option, ...], Choice]:
        """Return the prompt, options and choice that the ratings of an answer amount to: the answer against its
        siblings, a refusal of an answer rated bad, or a single good answer as a written one. Raise Conflict where
        there is nothing to learn."""
        answer = room.message(message_id)
        if answer.role != "assistant" or answer.parent is None or not answer.text.strip():
            raise Conflict("Only answers can be used for training.", code="no_choice", next_step="Choose an answer.")
        prompt_message = room.message(answer.parent)
        if prompt_message.parent is not None or room.system or prompt_message.files:
            raise Conflict(
                "Only answers to a chat's first message, without system prompt or files, can be used for training.",
                code="not_a_prompt", next_step="Ask in a new chat.",
            )  # fmt: skip
        if answer.state == "growing":
            raise Conflict("This answer is still being generated.", code="not_now", next_step="Wait until it is done.")
        other_answers = [
            each for each in room.children(prompt_message.id) if each.text.strip() and each.text != answer.text
        ]
        other_answers = [each for each in other_answers if each.state != "growing"]
        if answer.rating < 0:
            return prompt_message.text, (_option_from_message(answer),), "none"
        if not other_answers and answer.rating == 0:
            raise Conflict(
                "There is nothing to compare this answer with.", code="no_choice",
                next_step="Rate it or regenerate first.",
            )  # fmt: skip
        if not other_answers:
            return prompt_message.text, (), Written(written=answer.text)
        return prompt_message.text, tuple(map(_option_from_message, [answer, *other_answers][:MAX_OPTIONS])), 0

    async def list_prompts(self) -> list[dict[str, Any]]:
        """Return the prompt library."""
        return [{"id": row["id"], "name": row["name"], "text": row["text"]} for row in
                await self._store.read(rows.list_prompts)]  # fmt: skip

    async def save_prompt(self, name: str, text: str) -> None:
        row = {"id": f"p{secrets.token_hex(8)}", "name": name, "text": text, "created": time.time()}
        await self._store.write(rows.save_prompt, row)

    async def delete_prompt(self, prompt_id: str) -> None:
        await self._store.write(rows.delete_prompt, prompt_id)

    async def _close_idle_rooms(self) -> None:
        now = time.monotonic()
        for room in list(self._rooms.values()):
            if room.is_idle and now - room.last_used > IDLE_SECONDS:
                del self._rooms[room.id]
                await room.close()


def _option_from_message(message: Message) -> Option:
    is_complete = message.state == "done" and message.finish != "length"
    return Option(text=message.text, tokens=(), finish="stop" if is_complete else "length")


def new_room_id() -> str:
    return f"r{secrets.token_hex(8)}"


def snippet_around(text: str, word: str, width: int = 120) -> str:
    """Return the text around the first match of a word, whatever its case and Unicode form."""
    position = max(fold_text(text).find(fold_text(word)), 0)
    # folding may change the length: map the position back to the original text
    position = bisect_left(range(len(text)), position, key=lambda end: len(fold_text(text[:end])))
    start = max(0, position - width // 3)
    return ("…" if start else "") + " ".join(text[start : start + width].split())
