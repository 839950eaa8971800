"""Export rooms as files: our JSON, Markdown, and open-webui's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..jobs import timestamp
from .formats import MESSAGE_HEADING, ROOM_FORMAT
from .message import Message
from .room import Room

EXPORT_FORMATS: Mapping[str, tuple[str, str]] = {
    "json": ("application/json", "json"),
    "markdown": ("text/markdown; charset=utf-8", "md"),
    "open-webui": ("application/json", "open-webui.json"),
}
"""The media type and the file extension of each format."""


def export_room(room: Room, format: str) -> str:
    """Return a room as the text of a file."""
    if format == "markdown":
        return _room_markdown(room)
    data = _open_webui_json(room) if format == "open-webui" else _trellis_json(room)
    return json.dumps(data, ensure_ascii=False, indent=1)


def _trellis_json(room: Room) -> dict[str, Any]:
    return {
        "format": ROOM_FORMAT, "title": room.title, "system": room.system, "models": room.models,
        "sampling": room.sampling,
        "head": room.head, "created": timestamp(room.created),
        "messages": [message.as_json() for message in list(room.messages.values())],
    }  # fmt: skip


def _open_webui_json(room: Room) -> list[dict[str, Any]]:
    def message_json(message: Message) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "id": message.id,
            "parentId": message.parent,
            "childrenIds": [each.id for each in room.children(message.id)],
            "role": message.role,
            "content": message.text,
            "timestamp": int(message.created),
        }
        return entry | (
            {"model": message.model, "done": True} if message.role == "assistant" else {"models": room.models}
        )

    chat = {
        "title": room.title, "models": room.models, "system": room.system,
        "history": {"messages": {each.id: message_json(each) for each in list(room.messages.values())},
        "currentId": room.head},
        "messages": [message_json(each) for each in room.path(room.head)],
        "timestamp": int(room.created * 1000),
    }  # fmt: skip
    return [{
        "id": room.id, "user_id": "", "title": room.title, "chat": chat, "created_at": int(room.created),
        "updated_at": int(room.updated), "archived": room.archived, "pinned": False, "meta": {},
    }]  # fmt: skip


def _room_markdown(room: Room) -> str:
    """Return the selected branch. Message headings inside a message are set one level deeper, so that an import does
    not split it."""
    parts = [f"# {room.title}\n"]
    if room.system:
        parts.append(f"> {room.system}".replace("\n", "\n> ") + "\n")
    for message in room.path(room.head):
        who = "User" if message.role == "user" else "Assistant" + (f" ({message.model})" if message.model else "")
        names = "".join(f"*{each['name']}*\n\n" for each in message.files)
        text = MESSAGE_HEADING.sub(lambda found: f"#{found[0]}", message.text)
        parts.append(f"## {who}\n\n{names}{text}\n")
    return "\n".join(parts)
