"""One message of a room, as stored and as published."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ...text_rules import fold_text
from ..jobs import timestamp


@dataclass(eq=False)
class Message:
    """One message. `group` is shared by answers that were requested together."""

    id: str
    room: str
    parent: str | None
    role: str
    text: str
    model: str | None = None
    label: str = ""
    group: str | None = None
    state: str = "done"
    finish: str | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    files: list[dict[str, Any]] = field(default_factory=list)
    rating: int = 0
    request: str | None = None
    created: float = field(default_factory=time.time)
    html: str | None = None
    """The complete blocks as HTML; None until requested."""
    rendered_length: int = 0
    """Characters of the text that `html` covers."""

    def to_row(self) -> dict[str, Any]:
        columns = ("id", "room", "parent", "role", "text", "model", "group", "state", "finish", "usage", "error",
        "files",
                "rating", "request", "created")  # fmt: skip
        return {name: getattr(self, name) for name in columns} | {"folded": fold_text(self.text)}

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id, "parent": self.parent, "role": self.role, "text": self.text, "model": self.model,
            "label": self.label, "group": self.group, "state": self.state, "finish": self.finish, "usage": self.usage,
            "error": self.error, "files": self.files, "rating": self.rating, "request": self.request,
            "created": timestamp(self.created),
        }  # fmt: skip


def message_from_row(row: dict[str, Any]) -> Message:
    return Message(**{name: value for name, value in row.items() if name != "folded"})
