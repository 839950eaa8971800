"""Rows of logins: hashes of tokens, never tokens."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select

from .tables import logins


def add_login(connection: Connection, token_hash: str, now: float) -> None:
    connection.execute(insert(logins).values(token_hash=token_hash, created=now))


def login_created(connection: Connection, token_hash: str) -> float | None:
    return connection.execute(select(logins.c.created).where(logins.c.token_hash == token_hash)).scalar()


def delete_login(connection: Connection, token_hash: str) -> None:
    connection.execute(delete(logins).where(logins.c.token_hash == token_hash))
