"""Rooms as files: our JSON, Markdown, and the export format of open-webui, out and in again."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ..errors import Invalid, TrellisError
from ..texts import PROMPT_LIMIT, storable
from .answering import FIGURES
from .jobs import timestamp
from .message import Message
from .room import MOST_MESSAGES, Room, sampling_from, title_of
from .rooms import Rooms, new_room_id

FORMATS: Mapping[str, tuple[str, str]] = {
    "json": ("application/json", "json"),
    "markdown": ("text/markdown; charset=utf-8", "md"),
    "open-webui": ("application/json", "open-webui.json"),
}
"""The media type of each, and how its file's name ends."""

MARK = "trellis-room-1"
MOST_ROOMS = 200
LONGEST = 4 * PROMPT_LIMIT


def written(room: Room, format: str) -> str:
    """A room as a file."""
    if format == "markdown":
        return _markdown(room)
    found = _open_webui(room) if format == "open-webui" else _ours(room)
    return json.dumps(found, ensure_ascii=False, indent=1)


async def taken_in(rooms: Rooms, body: bytes) -> list[Room]:
    """Make rooms of a file. Raises Invalid, and then makes none."""
    made = []
    for plan in await asyncio.to_thread(_planned, body):
        known = [name for name in plan.pop("models") if await _answers(rooms, name)]
        made.append(await rooms.create(models=known, **plan))
    return made


def _planned(body: bytes) -> list[dict[str, Any]]:
    """What the rooms of a file are to be. Raises Invalid."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _unreadable("it is not UTF-8 text") from None
    if text.lstrip()[:1] in ("{", "["):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise _unreadable("it is not whole JSON") from None
        chats = data if isinstance(data, list) else [data]
        if len(chats) > MOST_ROOMS:
            raise _unreadable(f"it has {len(chats)} rooms, {MOST_ROOMS} are the most")
        return [_from_ours(each) if _is_ours(each) else _from_open_webui(each) for each in chats]
    return [_from_markdown(text)]


async def _answers(rooms: Rooms, name: str) -> bool:
    try:
        await rooms.speakers.find(name)
    except TrellisError:
        return False
    return True


def _unreadable(why: str) -> Invalid:
    return Invalid(
        f"This is not a room that can be read: {why}.", field="file", code="unreadable",
        next_step="Choose what Trellis or open-webui has exported, or Markdown with “## User” and “## Assistant”.",
    )  # fmt: skip


# ── Our own ────────────────────────────────────────────────────────────────────────────────────────


def _ours(room: Room) -> dict[str, Any]:
    return {
        "format": MARK, "title": room.title, "system": room.system, "models": room.models, "sampling": room.sampling,
        "head": room.head, "created": timestamp(room.created),
        "messages": [message.as_json() for message in list(room.messages.values())],
    }  # fmt: skip


def _is_ours(data: Any) -> bool:
    return isinstance(data, dict) and data.get("format") == MARK


def _from_ours(data: dict[str, Any]) -> dict[str, Any]:
    said = [
        {
            "id": each.get("id"), "parent": each.get("parent"), "role": each.get("role"), "text": each.get("text"),
            "model": each.get("model"), "rating": each.get("rating"), "usage": each.get("usage"),
            "finish": each.get("finish"), "created": _time(each.get("created")), "group": each.get("group"),
        }
        for each in _list_of(data.get("messages"))
    ]  # fmt: skip
    sampling: dict[str, Any] = data["sampling"] if isinstance(data.get("sampling"), dict) else {}
    sampling = sampling_from(sampling).model_dump(include=set(sampling))
    return _plan(_text(data.get("title")), _text(data.get("system")), _names(data.get("models")), said,
                 data.get("head"), sampling)  # fmt: skip


# ── open-webui ─────────────────────────────────────────────────────────────────────────────────────


def _open_webui(room: Room) -> list[dict[str, Any]]:
    def told(message: Message) -> dict[str, Any]:
        about: dict[str, Any] = {
            "id": message.id,
            "parentId": message.parent,
            "childrenIds": [each.id for each in room.children(message.id)],
            "role": message.role,
            "content": message.text,
            "timestamp": int(message.created),
        }
        return about | (
            {"model": message.model, "done": True} if message.role == "assistant" else {"models": room.models}
        )

    chat = {
        "title": room.title, "models": room.models, "system": room.system,
        "history": {"messages": {each.id: told(each) for each in list(room.messages.values())}, "currentId": room.head},
        "messages": [told(each) for each in room.path(room.head)],
        "timestamp": int(room.created * 1000),
    }  # fmt: skip
    return [{
        "id": room.id, "user_id": "", "title": room.title, "chat": chat, "created_at": int(room.created),
        "updated_at": int(room.updated), "archived": room.archived, "pinned": False, "meta": {},
    }]  # fmt: skip


def _from_open_webui(data: Any) -> dict[str, Any]:
    chat = data.get("chat", data) if isinstance(data, dict) else None
    history = chat.get("history") if isinstance(chat, dict) else None
    found = history.get("messages") if isinstance(history, dict) else None
    if not isinstance(chat, dict) or not isinstance(history, dict) or not isinstance(found, dict):
        raise _unreadable("it is neither our JSON nor a chat of open-webui")
    said = [
        {
            "id": each.get("id"), "parent": each.get("parentId"), "role": each.get("role"), "text": each.get("content"),
            "model": each.get("model"), "created": _time(each.get("timestamp")),
        }
        for each in found.values()
        if isinstance(each, dict)
    ]  # fmt: skip
    title = _text(chat.get("title") or data.get("title"))
    return _plan(title, _text(chat.get("system")), _names(chat.get("models")), said, history.get("currentId"), {})


# ── Markdown ───────────────────────────────────────────────────────────────────────────────────────

HEADING = re.compile(r"^## (User|Assistant)(?: \((.*)\))?[ \t]*$", re.MULTILINE)


def _markdown(room: Room) -> str:
    """The branch that is looked at. A heading of ours inside a message is set one deeper, so that it stays inside."""
    parts = [f"# {room.title}\n"]
    if room.system:
        parts.append(f"> {room.system}".replace("\n", "\n> ") + "\n")
    for message in room.path(room.head):
        who = "User" if message.role == "user" else "Assistant" + (f" ({message.model})" if message.model else "")
        names = "".join(f"*{each['name']}*\n\n" for each in message.files)
        text = HEADING.sub(lambda found: f"#{found[0]}", message.text)
        parts.append(f"## {who}\n\n{names}{text}\n")
    return "\n".join(parts)


def _from_markdown(text: str) -> dict[str, Any]:
    found = list(HEADING.finditer(text))
    if not found:
        raise _unreadable("it has no heading “## User”")
    said: list[dict[str, Any]] = []
    for place, heading in enumerate(found):
        end = found[place + 1].start() if place + 1 < len(found) else len(text)
        said.append({
            "id": str(place), "parent": str(place - 1) if place else None, "role": heading[1].lower(),
            "text": text[heading.end() : end].strip(), "model": heading[2], "created": None,
        })  # fmt: skip
    before = text[: found[0].start()].strip().splitlines()
    title = before[0].lstrip("# ") if before and before[0].startswith("# ") else ""
    system = "\n".join(line.removeprefix("> ").removeprefix(">") for line in before if line.startswith(">"))
    return _plan(title, system, [each["model"] for each in said if each["model"]], said, str(len(said) - 1), {})


# ── What all of them become ────────────────────────────────────────────────────────────────────────


def _plan(
    title: str, system: str, models: list[str], said: list[dict[str, Any]], head: Any, sampling: Any
) -> dict[str, Any]:
    """What to make a room of: every message with a new id, under its parent; what cannot be is said. Raises Invalid."""
    if len(said) > MOST_MESSAGES:
        raise _unreadable(f"it has {len(said)} messages, {MOST_MESSAGES} are the most")
    room_id = new_room_id()
    ids = {each["id"]: f"m{secrets.token_hex(8)}" for each in said if isinstance(each["id"], str)}
    if len(ids) < len(said):
        raise _unreadable("two of its messages have the same id, or one has none")
    groups: dict[str, str] = {}
    now = time.time()
    messages: list[Message] = []
    for place, each in enumerate(said):
        if each["role"] not in ("user", "assistant") or each["id"] not in ids:
            raise _unreadable(f"message {place + 1} is from neither “user” nor “assistant”")
        group, rating = each.get("group"), each.get("rating")
        message = Message(
            id=ids[each["id"]],
            room=room_id,
            parent=_among(ids, each["parent"]),
            role=each["role"],
            text=_text(each["text"]),
            model=_text(each["model"])[:300] or None,
            group=groups.setdefault(group, f"g{secrets.token_hex(8)}") if isinstance(group, str) else None,
            finish=_text(each.get("finish"))[:20] or None,
            usage=_figures(each.get("usage")),
            rating=rating if rating in (-1, 1) and not isinstance(rating, bool) else 0,
            created=each["created"] or now + place * 1e-3,
        )
        if messages:  # in the order in which the file has them
            message.created = max(message.created, messages[-1].created + 1e-4)
        messages.append(message)
    _require_a_tree(messages)
    first = next((message.text for message in messages if message.role == "user"), "")
    return {
        "title": title.strip()[:200] or title_of(first), "system": system[:20_000], "models": models[:1],
        "messages": messages, "head": _among(ids, head) or (messages[-1].id if messages else None),
        "room_id": room_id, "sampling": sampling,
    }  # fmt: skip


def _require_a_tree(messages: list[Message]) -> None:
    """Raises Invalid where messages come after each other in a circle."""
    parents = {message.id: message.parent for message in messages}
    safe: set[str] = set()
    for message in messages:
        seen: set[str] = set()
        at: str | None = message.id
        while at is not None and at not in safe:
            if at in seen:
                raise _unreadable("its messages come after each other in a circle")
            seen.add(at)
            at = parents[at]
        safe |= seen


def _among(ids: dict[str, str], name: Any) -> str | None:
    return ids.get(name) if isinstance(name, str) else None


def _figures(usage: Any) -> dict[str, Any] | None:
    """What was measured of an answer: figures and nothing else."""
    if not isinstance(usage, dict):
        return None

    def figure(value: Any) -> Any:
        is_one = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12
        return value if is_one else None

    return {name: figure(usage.get(name)) for name in FIGURES}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    if len(value) > LONGEST:
        raise _unreadable(f"a message has {len(value)} characters, {LONGEST} are the most")
    try:
        return storable(value)
    except ValueError as error:
        raise _unreadable(f"its text {error}") from None


def _names(value: Any) -> list[str]:
    return [_text(each)[:300] for each in value[:20] if isinstance(each, str)] if isinstance(value, list) else []


def _list_of(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _time(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e11:
        return float(value)
    try:
        found = datetime.fromisoformat(value).timestamp() if isinstance(value, str) else 0.0
    except (ValueError, OverflowError):
        return None
    return found if 0 < found < 1e11 else None
