"""Rows of rooms, messages, their files, and the prompt library. Plain functions of a connection; values in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, insert, or_, select, update

from .tables import files, messages, prompts, rooms

Row = dict[str, Any]


def add_room(connection: Connection, room: Row, message_rows: Sequence[Row] = ()) -> None:
    """A room, with messages that it begins with."""
    connection.execute(insert(rooms).values(room))
    if message_rows:
        connection.execute(insert(messages), list(message_rows))


def room_by_request(connection: Connection, request: str) -> str | None:
    return connection.execute(select(rooms.c.id).where(rooms.c.request == request)).scalar()


def get_room(connection: Connection, room_id: str) -> tuple[Row, list[Row]] | None:
    """A room and all its messages, in the order in which they were written."""
    row = connection.execute(select(rooms).where(rooms.c.id == room_id)).mappings().first()
    if row is None:
        return None
    query = select(messages).where(messages.c.room == room_id).order_by(messages.c.created, messages.c.id)
    return dict(row), [dict(message) for message in connection.execute(query).mappings()]


def list_rooms(connection: Connection, words: Sequence[Sequence[str]], archived: bool, max_rooms: int) -> list[Row]:
    """Return rooms in whose title or text every word occurs in one of its spellings, last used first, each with a
    message that has the first word."""
    query = select(rooms).where(rooms.c.archived == int(archived)).order_by(rooms.c.updated.desc()).limit(max_rooms)
    for word in words:
        has_message = exists().where(and_(messages.c.room == rooms.c.id, _contains_any(messages.c.folded, word)))
        query = query.where(or_(_contains_any(rooms.c.folded, word), has_message))
    room_rows = [dict(row) for row in connection.execute(query).mappings()]
    for row in room_rows if words else []:
        hit_query = (
            select(messages.c.text)
            .where(messages.c.room == row["id"], _contains_any(messages.c.folded, words[0]))
            .limit(1)
        )
        row["hit"] = connection.execute(hit_query).scalar()
    return room_rows


def _contains_any(column: Any, spellings: Sequence[str]) -> ColumnElement[bool]:
    return or_(*(column.contains(each, autoescape=True) for each in spellings))


def update_room(connection: Connection, room_id: str, values: Row) -> None:
    connection.execute(update(rooms).where(rooms.c.id == room_id).values(values))


def delete_room(connection: Connection, room_id: str) -> None:
    connection.execute(delete(rooms).where(rooms.c.id == room_id))


def add_messages(connection: Connection, room_id: str, message_rows: Sequence[Row], room_changes: Row) -> None:
    """Add messages and change their room, in one transaction."""
    connection.execute(insert(messages), list(message_rows))
    update_room(connection, room_id, room_changes)


def update_message(connection: Connection, message_id: str, values: Row) -> None:
    connection.execute(update(messages).where(messages.c.id == message_id).values(values))


def interrupt_messages(connection: Connection) -> None:
    """No answer is growing when the studio has just started."""
    connection.execute(update(messages).where(messages.c.state == "growing").values(state="interrupted"))


def add_file(connection: Connection, file: Row) -> bool:
    """Whether the room is still there."""
    if connection.execute(select(rooms.c.id).where(rooms.c.id == file["room"])).first() is None:
        return False
    connection.execute(insert(files).values(file))
    return True


def get_files(connection: Connection, room_id: str) -> list[Row]:
    """The files of a room, without their text."""
    columns = [files.c.id, files.c.room, files.c.name, files.c.kind, files.c.bytes]
    query = select(*columns).where(files.c.room == room_id).order_by(files.c.created)
    return [dict(row) for row in connection.execute(query).mappings()]


def get_file_texts(connection: Connection, file_ids: Sequence[str]) -> dict[str, str]:
    """The text of some files by their ids."""
    found: dict[str, str] = {}
    for start in range(0, len(file_ids), 500):
        query = select(files.c.id, files.c.text).where(files.c.id.in_(file_ids[start : start + 500]))
        found |= {row.id: row.text for row in connection.execute(query)}
    return found


def list_prompts(connection: Connection) -> list[Row]:
    return [dict(row) for row in connection.execute(select(prompts).order_by(prompts.c.name)).mappings()]


def save_prompt(connection: Connection, prompt: Row) -> None:
    """A prompt in the library, in place of the one of that name."""
    connection.execute(delete(prompts).where(prompts.c.name == prompt["name"]))
    connection.execute(insert(prompts).values(prompt))


def delete_prompt(connection: Connection, prompt_id: str) -> None:
    connection.execute(delete(prompts).where(prompts.c.id == prompt_id))
