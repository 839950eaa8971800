"""Rows of keys for the OpenAI API: hashes, never keys. Plain functions of a connection; values in and out."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from .tables import keys

Row = dict[str, Any]


def add_key(connection: Connection, key: Row) -> None:
    connection.execute(insert(keys).values(key))


def list_keys(connection: Connection) -> list[Row]:
    query = select(keys.c.id, keys.c.name, keys.c.start, keys.c.created, keys.c.used).order_by(keys.c.created)
    return [dict(row) for row in connection.execute(query).mappings()]


def key_by_hash(connection: Connection, digest: str) -> Row | None:
    row = connection.execute(select(keys).where(keys.c.hash == digest)).mappings().first()
    return dict(row) if row else None


def use_key(connection: Connection, key_id: str, now: float) -> None:
    connection.execute(update(keys).where(keys.c.id == key_id).values(used=now))


def delete_key(connection: Connection, key_id: str) -> bool:
    return connection.execute(delete(keys).where(keys.c.id == key_id)).rowcount > 0
