"""Import rooms from files: every readable conversation becomes a room; what is left out is reported."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ...errors import Invalid, TrellisError, shorten
from ...text_rules import PROMPT_LIMIT, require_storable
from .answer import USAGE_FIELDS
from .formats import (
    ROLE_ALIASES,
    Conversation,
    ImportedMessage,
    Unreadable,
    parse_content,
    parse_conversation,
    split_conversations,
)
from .message import Message
from .room import MAX_MESSAGES, Room, make_title
from .room_state import parse_sampling
from .rooms import Rooms, new_room_id

MAX_ROOMS = 2000
MAX_TEXT_CHARACTERS = 4 * PROMPT_LIMIT
MAX_SYSTEM_CHARACTERS = 20_000


@dataclass
class ImportResult:
    """The new rooms; a sentence for each conversation left out, and for each loss in the others."""

    rooms: list[Room] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"rooms": [room.as_json() for room in self.rooms], "left_out": self.left_out, "notes": self.notes}


@dataclass
class RoomPlan:
    """The arguments of a room to create."""

    room_arguments: dict[str, Any]
    models: list[str]
    notes: list[str]


async def import_rooms(rooms: Rooms, body: bytes) -> ImportResult:
    """Create rooms from a file. Raise Invalid where none can be created."""
    imported = ImportResult()
    plans, imported.left_out = await asyncio.to_thread(plan_rooms, body)
    known_models: dict[str, bool] = {}
    for plan in plans:
        for name in plan.models:
            if name not in known_models:
                known_models[name] = await _is_known_target(rooms, name)
        imported.rooms.append(
            await rooms.create(models=[name for name in plan.models if known_models[name]], **plan.room_arguments)
        )
        imported.notes += plan.notes
    return imported


def plan_rooms(body: bytes) -> tuple[list[RoomPlan], list[str]]:
    """Return the rooms of a file, and why other conversations are left out. Raise Invalid where there is none."""
    try:
        conversations = split_conversations(body)
        if len(conversations) > MAX_ROOMS:
            raise Unreadable(f"it has {len(conversations)} conversations; the limit is {MAX_ROOMS}")
    except Unreadable as error:
        raise _unreadable_file_error(str(error)) from None
    plans, left_out = [], []
    for name, data in conversations:
        try:
            plans.append(plan_room(parse_conversation(data)))
        except Unreadable as error:
            left_out.append(f"“{shorten(name)}”: {error}." if name else f"{error}.")
        except Invalid as error:
            left_out.append(f"“{shorten(name)}”: {error.message}")
    if not plans:
        more = f" (and {len(left_out) - 1} others)" if len(left_out) > 1 else ""
        raise _unreadable_file_error(left_out[0].rstrip(".") + more if left_out else "it contains no conversation")
    return plans, left_out


async def _is_known_target(rooms: Rooms, name: str) -> bool:
    try:
        await rooms.targets.find(name)
    except TrellisError:
        return False
    return True


def _unreadable_file_error(reason: str) -> Invalid:
    return Invalid(
        f"No conversation could be imported from this file: {reason}.", field="file", code="unreadable",
        next_step="Choose an export from Trellis, open-webui, ChatGPT, Claude or LM Studio, or Markdown with the "
        "headings “## User” and “## Assistant”.",
    )  # fmt: skip


@dataclass
class _KeptMessage:
    """A message of the new room. The text of later ones may be appended to it."""

    imported: ImportedMessage
    role: str
    text: str


def plan_room(conversation: Conversation) -> RoomPlan:
    """Convert a conversation, counting what cannot be kept. Raise Unreadable, or Invalid for its settings."""
    _require_tree(conversation.messages)
    losses: Counter[str] = Counter()
    """Counts of what was left out, by its name."""
    new_ids: dict[str, str | None] = {}
    """The kept message that each message became or was merged into; else the nearest kept one above it."""
    kept_messages: dict[str, _KeptMessage] = {}
    system = [_require_text(conversation.system)]
    child_counts = Counter(each.parent for each in conversation.messages if isinstance(each.parent, str))
    is_unbranched: dict[Any, bool] = {}
    """Whether the path from a message up to its kept parent has no branches."""
    for index, imported in _parents_first(conversation.messages):
        role, text = _parse_message(index, imported, conversation.is_foreign, losses)
        parent_id = new_ids.get(imported.parent) if isinstance(imported.parent, str) else None
        new_ids[imported.id] = parent_id
        is_unbranched[imported.id] = child_counts[imported.parent] == 1 and (
            parent_id == imported.parent or is_unbranched.get(imported.parent, False)
        )
        if role == "system" and parent_id is None and text.strip():
            system.append(text)
        elif role not in ("user", "assistant"):
            if text.strip():
                losses["hidden message" if role == "hidden" else f"message of the role “{shorten(role)}”"] += 1
        elif not text.strip() and conversation.is_foreign:
            continue
        elif (
            conversation.is_foreign
            and parent_id
            and kept_messages[parent_id].role == role
            and is_unbranched[imported.id]
        ):
            kept_messages[
                parent_id
            ].text += f"\n\n{text}"  # it spoke twice, with something in between that was left out
        else:
            new_ids[imported.id] = imported.id
            kept_messages[imported.id] = _KeptMessage(imported, role, text)
            kept_messages[imported.id].imported.parent = parent_id
    if conversation.is_foreign and not kept_messages:
        raise Unreadable("it has no messages")
    ordered = [kept_messages[each.id] for each in conversation.messages if each.id in kept_messages]
    return _make_plan(conversation, ordered, new_ids, "\n\n".join(dict.fromkeys(filter(None, system))), losses)


def _parse_message(index: int, imported: ImportedMessage, is_foreign: bool, losses: Counter[str]) -> tuple[str, str]:
    """Return the role and text of a message. Raise Unreadable."""
    role = ROLE_ALIASES.get(imported.role, imported.role) if isinstance(imported.role, str) else None
    if role is None or (not is_foreign and role not in ("user", "assistant")):
        raise Unreadable(f"message {index + 1} has a role other than “user” or “assistant”")
    try:
        content = parse_content(imported.content)
    except Unreadable as error:
        raise Unreadable(f"message {index + 1} {error}") from None
    text = _require_text(content.text, f"message {index + 1}")
    if role in ("user", "assistant"):
        for kind in content.left_out:
            losses[kind if kind == "picture" else f"part of the kind “{shorten(kind)}”"] += 1
        if is_foreign and imported.files:
            losses["file"] += len(imported.files)
            text = "\n\n".join([*(f"[{shorten(name)}]" for name in imported.files), *([text] if text else [])])
    return role, text


def _make_plan(
    conversation: Conversation,
    ordered: list[_KeptMessage],
    new_ids: dict[str, str | None],
    system: str,
    losses: Counter[str],
) -> RoomPlan:
    room_id = new_room_id()
    ids = {each.imported.id: f"m{secrets.token_hex(8)}" for each in ordered}
    groups: dict[str, str] = {}
    now = time.time()
    messages: list[Message] = []
    for index, each in enumerate(ordered):
        imported = each.imported
        message = Message(
            id=ids[imported.id],
            room=room_id,
            parent=ids.get(imported.parent),
            role=each.role,
            text=each.text,
            model=_require_text(imported.model)[:300] or None,
            group=groups.setdefault(imported.group, f"g{secrets.token_hex(8)}")
            if isinstance(imported.group, str)
            else None,
            finish=_require_text(imported.finish)[:20] or None,
            usage=_parse_usage(imported.usage),
            rating=imported.rating if imported.rating in (-1, 1) and not isinstance(imported.rating, bool) else 0,
            created=imported.created or now + index * 1e-3,
        )
        if messages:  # creation times must keep the order of the file
            message.created = max(message.created, messages[-1].created + 1e-4)
        messages.append(message)
    if len(system) > MAX_SYSTEM_CHARACTERS:
        losses["character of the system prompt"] += len(system) - MAX_SYSTEM_CHARACTERS
    first = next((message.text for message in messages if message.role == "user"), "")
    title = _require_text(conversation.title).strip()[:200] or make_title(first)
    head = new_ids.get(conversation.head) if isinstance(conversation.head, str) else None
    sampling = (
        parse_sampling(conversation.sampling).model_dump(include=set(conversation.sampling))
        if conversation.sampling
        else {}
    )
    room = {
        "title": title, "system": system[:MAX_SYSTEM_CHARACTERS], "messages": messages, "sampling": sampling,
        "room_id": room_id,
        "head": ids.get(head or "") or (messages[-1].id if messages else None),
    }  # fmt: skip
    return RoomPlan(room, _model_names(conversation.models)[:1], [_loss_sentence(title, losses)] if losses else [])


def _loss_sentence(title: str, losses: Counter[str]) -> str:
    counted = [f"{count} {_plural(name) if count > 1 else name}" for name, count in losses.items()]
    together = ", ".join(counted[:-1]) + " and " + counted[-1] if len(counted) > 1 else counted[0]
    return f"“{shorten(title)}”: {together} {'was' if sum(losses.values()) == 1 else 'were'} left out."


def _plural(name: str) -> str:
    first, space, rest = name.partition(" ")
    return f"{first}s{space}{rest}"


def _require_tree(messages: list[ImportedMessage]) -> None:
    """Raise Unreadable for missing or duplicate ids, and for cycles."""
    if len(messages) > MAX_MESSAGES:
        raise Unreadable(f"it has {len(messages)} messages; the limit is {MAX_MESSAGES}")
    parents = {message.id: message.parent for message in messages if isinstance(message.id, str)}
    if len(parents) < len(messages):
        raise Unreadable("two of its messages have the same id, or one has none")
    checked_ids: set[str] = set()
    for message in messages:
        seen: set[str] = set()
        current_id: Any = message.id
        while isinstance(current_id, str) and current_id in parents and current_id not in checked_ids:
            if current_id in seen:
                raise Unreadable("its messages form a cycle")
            seen.add(current_id)
            current_id = parents[current_id]
        checked_ids |= seen


def _parents_first(messages: list[ImportedMessage]) -> list[tuple[int, ImportedMessage]]:
    """Return messages with their positions in the file, each after its parent."""
    by_id = {each.id: (index, each) for index, each in enumerate(messages)}
    ordered: dict[str, tuple[int, ImportedMessage]] = {}
    for message in messages:
        branch: list[str] = []
        current_id: Any = message.id
        while isinstance(current_id, str) and current_id in by_id and current_id not in ordered:
            branch.append(current_id)
            current_id = by_id[current_id][1].parent
        ordered |= {name: by_id[name] for name in reversed(branch)}
    return list(ordered.values())


def _parse_usage(usage: Any) -> dict[str, Any] | None:
    """Keep the numbers of a usage object only."""
    if not isinstance(usage, dict):
        return None

    def parse_number(value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12
        return value if is_number else None

    return {name: parse_number(usage.get(name)) for name in USAGE_FIELDS}


def _require_text(value: Any, what: str = "its text") -> str:
    if not isinstance(value, str):
        return ""
    if len(value) > MAX_TEXT_CHARACTERS:
        raise Unreadable(f"{what} has {len(value)} characters; the limit is {MAX_TEXT_CHARACTERS}")
    try:
        return require_storable(value)
    except ValueError as error:
        raise Unreadable(f"{what} {error}") from None


def _model_names(value: Any) -> list[str]:
    return (
        [_require_text(each)[:300] for each in value[:20] if isinstance(each, str)] if isinstance(value, list) else []
    )
