"""Rows of servers of models elsewhere. Plain functions of a connection; values in and out."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, insert, select

from .tables import remotes

Row = dict[str, Any]


def list_remotes(connection: Connection) -> list[Row]:
    return [dict(row) for row in connection.execute(select(remotes).order_by(remotes.c.name)).mappings()]


def remote_by_name(connection: Connection, name: str) -> Row | None:
    row = connection.execute(select(remotes).where(remotes.c.name == name)).mappings().first()
    return dict(row) if row else None


def put_remote(connection: Connection, remote: Row) -> None:
    """A server, in place of the one of that name."""
    connection.execute(delete(remotes).where(remotes.c.name == remote["name"]))
    connection.execute(insert(remotes).values(remote))


def delete_remote(connection: Connection, remote_id: str) -> None:
    connection.execute(delete(remotes).where(remotes.c.id == remote_id))
