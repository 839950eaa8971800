"""Rows of blind comparisons. Plain functions of a connection; values in and out."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, insert, select, update

from .tables import rounds, trials

Row = dict[str, Any]


def add_trial(connection: Connection, trial: Row) -> None:
    connection.execute(insert(trials).values(trial))


def trial_by_request(connection: Connection, request: str) -> str | None:
    return connection.execute(select(trials.c.id).where(trials.c.request == request)).scalar()


def get_trial(connection: Connection, trial_id: str) -> Row | None:
    row = connection.execute(select(trials).where(trials.c.id == trial_id)).mappings().first()
    return dict(row) if row else None


def list_trials(connection: Connection, session_id: str) -> list[Row]:
    query = select(trials).where(trials.c.session == session_id).order_by(trials.c.created.desc())
    return [dict(row) for row in connection.execute(query).mappings()]


def get_rounds(connection: Connection, trial_id: str) -> list[Row]:
    query = select(rounds).where(rounds.c.trial == trial_id).order_by(rounds.c.number)
    return [dict(row) for row in connection.execute(query).mappings()]


def add_round(connection: Connection, row: Row, last: bool) -> None:
    """A round; when it is the last one and needs no judging because nothing else does either, the trial is done."""
    connection.execute(insert(rounds).values(row))
    open_one = select(rounds.c.number).where(rounds.c.trial == row["trial"], rounds.c.verdict.is_(None)).limit(1)
    if last and connection.execute(open_one).first() is None:
        end_trial(connection, row["trial"])


def judge(connection: Connection, trial_id: str, number: int, verdict: str, last: bool) -> None:
    where = (rounds.c.trial == trial_id) & (rounds.c.number == number)
    connection.execute(update(rounds).where(where).values(verdict=verdict))
    if last:
        end_trial(connection, trial_id)


def end_trial(connection: Connection, trial_id: str) -> None:
    connection.execute(update(trials).where(trials.c.id == trial_id).values(state="done"))
