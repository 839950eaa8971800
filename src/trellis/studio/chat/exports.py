"""Rooms as files to take away: our JSON, Markdown, and the export format of open-webui."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..jobs import timestamp
from .formats import HEADING, MARK
from .message import Message
from .room import Room

FORMATS: Mapping[str, tuple[str, str]] = {
    "json": ("application/json", "json"),
    "markdown": ("text/markdown; charset=utf-8", "md"),
    "open-webui": ("application/json", "open-webui.json"),
}
"""The media type of each, and how its file's name ends."""


def written(room: Room, format: str) -> str:
    """A room as a file."""
    if format == "markdown":
        return _markdown(room)
    found = _open_webui(room) if format == "open-webui" else _ours(room)
    return json.dumps(found, ensure_ascii=False, indent=1)


def _ours(room: Room) -> dict[str, Any]:
    return {
        "format": MARK, "title": room.title, "system": room.system, "models": room.models, "sampling": room.sampling,
        "head": room.head, "created": timestamp(room.created),
        "messages": [message.as_json() for message in list(room.messages.values())],
    }  # fmt: skip


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
