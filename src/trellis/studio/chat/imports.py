"""Rooms from files: every conversation that can be read becomes a room; what cannot, or not whole, is told by name."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ...errors import Invalid, TrellisError, shorten
from ...text_rules import PROMPT_LIMIT, storable
from .answer import FIGURES
from .formats import ROLES, Conversation, Said, Unreadable, content_of, conversation_from, conversations_in
from .message import Message
from .room import MOST_MESSAGES, Room, sampling_from, title_of
from .rooms import Rooms, new_room_id

MOST_ROOMS = 2000
LONGEST = 4 * PROMPT_LIMIT
MOST_SYSTEM = 20_000


@dataclass
class Imported:
    """The rooms that were made; a sentence for each conversation that was left out, and for what of others was."""

    rooms: list[Room] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"rooms": [room.as_json() for room in self.rooms], "left_out": self.left_out, "notes": self.notes}


@dataclass
class Plan:
    """What a room is to be."""

    room: dict[str, Any]
    models: list[str]
    notes: list[str]


async def import_rooms(rooms: Rooms, body: bytes) -> Imported:
    """Make rooms of a file. Raises Invalid where none can be made."""
    imported = Imported()
    plans, imported.left_out = await asyncio.to_thread(plans_of, body)
    known: dict[str, bool] = {}
    for plan in plans:
        for name in plan.models:
            if name not in known:
                known[name] = await _answers(rooms, name)
        imported.rooms.append(await rooms.create(models=[name for name in plan.models if known[name]], **plan.room))
        imported.notes += plan.notes
    return imported


def plans_of(body: bytes) -> tuple[list[Plan], list[str]]:
    """What the rooms of a file are to be, and why others cannot be. Raises Invalid where there is none."""
    try:
        found = conversations_in(body)
        if len(found) > MOST_ROOMS:
            raise Unreadable(f"it has {len(found)} conversations; the limit is {MOST_ROOMS}")
    except Unreadable as error:
        raise _refusal(str(error)) from None
    plans, left_out = [], []
    for name, data in found:
        try:
            plans.append(plan_of(conversation_from(data)))
        except Unreadable as error:
            left_out.append(f"“{shorten(name)}”: {error}." if name else f"{error}.")
        except Invalid as error:
            left_out.append(f"“{shorten(name)}”: {error.message}")
    if not plans:
        more = f" (and {len(left_out) - 1} others)" if len(left_out) > 1 else ""
        raise _refusal(left_out[0].rstrip(".") + more if left_out else "it contains no conversation")
    return plans, left_out


async def _answers(rooms: Rooms, name: str) -> bool:
    try:
        await rooms.speakers.find(name)
    except TrellisError:
        return False
    return True


def _refusal(why: str) -> Invalid:
    return Invalid(
        f"No conversation could be imported from this file: {why}.", field="file", code="unreadable",
        next_step="Choose an export from Trellis, open-webui, ChatGPT, Claude or LM Studio, or Markdown with the "
        "headings “## User” and “## Assistant”.",
    )  # fmt: skip


@dataclass
class _Kept:
    """A message that becomes one of the room; `inside` is the one that it was joined to."""

    said: Said
    role: str
    text: str


def plan_of(found: Conversation) -> Plan:
    """Every message with a new id, under its parent; what cannot be kept is counted. Raises Unreadable, or Invalid for
    its settings."""
    _require_a_tree(found.messages)
    losses: Counter[str] = Counter()
    """How much of what was left out, in words."""
    places: dict[str, str | None] = {}
    """Where each message went: the id of the message that has its text now, or of its nearest one above."""
    kept: dict[str, _Kept] = {}
    system = [_text(found.system)]
    children = Counter(each.parent for each in found.messages if isinstance(each.parent, str))
    straight: dict[Any, bool] = {}
    """Whether no branch begins between a message and the one that its place is taken by."""
    for place, said in _parents_first(found.messages):
        role, text = _read(place, said, found.foreign, losses)
        above = places.get(said.parent) if isinstance(said.parent, str) else None
        places[said.id] = above
        straight[said.id] = children[said.parent] == 1 and (above == said.parent or straight.get(said.parent, False))
        if role == "system" and above is None and text.strip():
            system.append(text)
        elif role not in ("user", "assistant"):
            if text.strip():
                losses["hidden message" if role == "hidden" else f"message of the role “{shorten(role)}”"] += 1
        elif not text.strip() and found.foreign:
            continue
        elif found.foreign and above and kept[above].role == role and straight[said.id]:
            kept[above].text += f"\n\n{text}"  # it spoke twice, with something in between that was left out
        else:
            places[said.id] = said.id
            kept[said.id] = _Kept(said, role, text)
            kept[said.id].said.parent = above
    if found.foreign and not kept:
        raise Unreadable("it has no messages")
    order = [kept[each.id] for each in found.messages if each.id in kept]
    return _planned(found, order, places, "\n\n".join(dict.fromkeys(filter(None, system))), losses)


def _read(place: int, said: Said, foreign: bool, losses: Counter[str]) -> tuple[str, str]:
    """The role and the text of a message. Raises Unreadable."""
    role = ROLES.get(said.role, said.role) if isinstance(said.role, str) else None
    if role is None or (not foreign and role not in ("user", "assistant")):
        raise Unreadable(f"message {place + 1} has a role other than “user” or “assistant”")
    try:
        content = content_of(said.content)
    except Unreadable as error:
        raise Unreadable(f"message {place + 1} {error}") from None
    text = _text(content.text, f"message {place + 1}")
    if role in ("user", "assistant"):
        for kind in content.left_out:
            losses[kind if kind == "picture" else f"part of the kind “{shorten(kind)}”"] += 1
        if foreign and said.files:
            losses["file"] += len(said.files)
            text = "\n\n".join([*(f"[{shorten(name)}]" for name in said.files), *([text] if text else [])])
    return role, text


def _planned(
    found: Conversation, order: list[_Kept], places: dict[str, str | None], system: str, losses: Counter[str]
) -> Plan:
    room_id = new_room_id()
    ids = {each.said.id: f"m{secrets.token_hex(8)}" for each in order}
    groups: dict[str, str] = {}
    now = time.time()
    messages: list[Message] = []
    for place, each in enumerate(order):
        said = each.said
        message = Message(
            id=ids[said.id],
            room=room_id,
            parent=ids.get(said.parent),
            role=each.role,
            text=each.text,
            model=_text(said.model)[:300] or None,
            group=groups.setdefault(said.group, f"g{secrets.token_hex(8)}") if isinstance(said.group, str) else None,
            finish=_text(said.finish)[:20] or None,
            usage=_figures(said.usage),
            rating=said.rating if said.rating in (-1, 1) and not isinstance(said.rating, bool) else 0,
            created=said.created or now + place * 1e-3,
        )
        if messages:  # in the order in which the file has them
            message.created = max(message.created, messages[-1].created + 1e-4)
        messages.append(message)
    if len(system) > MOST_SYSTEM:
        losses["character of the system prompt"] += len(system) - MOST_SYSTEM
    first = next((message.text for message in messages if message.role == "user"), "")
    title = _text(found.title).strip()[:200] or title_of(first)
    head = places.get(found.head) if isinstance(found.head, str) else None
    sampling = sampling_from(found.sampling).model_dump(include=set(found.sampling)) if found.sampling else {}
    room = {
        "title": title, "system": system[:MOST_SYSTEM], "messages": messages, "sampling": sampling, "room_id": room_id,
        "head": ids.get(head or "") or (messages[-1].id if messages else None),
    }  # fmt: skip
    return Plan(room, _names(found.models)[:1], [_sentence(title, losses)] if losses else [])


def _sentence(title: str, losses: Counter[str]) -> str:
    counted = [f"{count} {_plural(name) if count > 1 else name}" for name, count in losses.items()]
    together = ", ".join(counted[:-1]) + " and " + counted[-1] if len(counted) > 1 else counted[0]
    return f"“{shorten(title)}”: {together} {'was' if sum(losses.values()) == 1 else 'were'} left out."


def _plural(name: str) -> str:
    first, space, rest = name.partition(" ")
    return f"{first}s{space}{rest}"


def _require_a_tree(messages: list[Said]) -> None:
    """Raises Unreadable where ids are missing or used twice, or where messages come after each other in a circle."""
    if len(messages) > MOST_MESSAGES:
        raise Unreadable(f"it has {len(messages)} messages; the limit is {MOST_MESSAGES}")
    parents = {message.id: message.parent for message in messages if isinstance(message.id, str)}
    if len(parents) < len(messages):
        raise Unreadable("two of its messages have the same id, or one has none")
    safe: set[str] = set()
    for message in messages:
        seen: set[str] = set()
        at: Any = message.id
        while isinstance(at, str) and at in parents and at not in safe:
            if at in seen:
                raise Unreadable("its messages form a cycle")
            seen.add(at)
            at = parents[at]
        safe |= seen


def _parents_first(messages: list[Said]) -> list[tuple[int, Said]]:
    """Messages of a tree with their places in the file, each after the one that it comes after."""
    by_id = {each.id: (place, each) for place, each in enumerate(messages)}
    found: dict[str, tuple[int, Said]] = {}
    for message in messages:
        branch: list[str] = []
        at: Any = message.id
        while isinstance(at, str) and at in by_id and at not in found:
            branch.append(at)
            at = by_id[at][1].parent
        found |= {name: by_id[name] for name in reversed(branch)}
    return list(found.values())


def _figures(usage: Any) -> dict[str, Any] | None:
    """What was measured of an answer: figures and nothing else."""
    if not isinstance(usage, dict):
        return None

    def figure(value: Any) -> Any:
        is_one = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12
        return value if is_one else None

    return {name: figure(usage.get(name)) for name in FIGURES}


def _text(value: Any, what: str = "its text") -> str:
    if not isinstance(value, str):
        return ""
    if len(value) > LONGEST:
        raise Unreadable(f"{what} has {len(value)} characters; the limit is {LONGEST}")
    try:
        return storable(value)
    except ValueError as error:
        raise Unreadable(f"{what} {error}") from None


def _names(value: Any) -> list[str]:
    return [_text(each)[:300] for each in value[:20] if isinstance(each, str)] if isinstance(value, list) else []
