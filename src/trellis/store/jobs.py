"""Rows of jobs. Plain functions of a connection; values in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from .tables import jobs

Row = dict[str, Any]


def add_job(connection: Connection, job: Row) -> None:
    connection.execute(insert(jobs).values(job))


def finish_job(connection: Connection, job_id: str, values: Row) -> None:
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))


def delete_jobs(connection: Connection, job_ids: Sequence[str]) -> None:
    connection.execute(delete(jobs).where(jobs.c.id.in_(job_ids)))


def interrupt_jobs(connection: Connection, error: Row) -> None:
    """No job is running when the studio has just started."""
    connection.execute(update(jobs).where(jobs.c.state.in_(["queued", "running"])).values(state="failed", error=error))


def get_job(connection: Connection, job_id: str) -> Row | None:
    row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().first()
    return dict(row) if row else None


def job_by_request(connection: Connection, request: str) -> Row | None:
    row = connection.execute(select(jobs).where(jobs.c.request == request)).mappings().first()
    return dict(row) if row else None


def list_jobs(connection: Connection, kinds: Sequence[str] = (), limit: int = 200) -> list[Row]:
    query = select(jobs).order_by(jobs.c.created.desc()).limit(limit)
    if kinds:
        query = query.where(jobs.c.kind.in_(kinds))
    return [dict(row) for row in connection.execute(query).mappings()]
