"""Rows of blind comparisons. Plain functions of a connection; values in and out."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, insert, select, update

from .tables import rounds, trials

Row = dict[str, Any]


def add_trial(connection: Connection, trial: Row) -> None:
    connection.execute(insert(trials).values(trial))


def trial_by_request(connection: Connection, request: str) -> Row | None:
    row = connection.execute(select(trials).where(trials.c.request == request)).mappings().first()
    return dict(row) if row else None


def get_trial(connection: Connection, trial_id: str) -> Row | None:
    row = connection.execute(select(trials).where(trials.c.id == trial_id)).mappings().first()
    return dict(row) if row else None


def list_trials(connection: Connection, session_id: str) -> list[Row]:
    query = select(trials).where(trials.c.session == session_id).order_by(trials.c.created.desc())
    return [dict(row) for row in connection.execute(query).mappings()]


def get_rounds(connection: Connection, trial_id: str) -> list[Row]:
    query = select(rounds).where(rounds.c.trial == trial_id).order_by(rounds.c.number)
    return [dict(row) for row in connection.execute(query).mappings()]


def add_round(connection: Connection, row: Row) -> None:
    """Add a generated round, and end the trial if nothing is left to judge. A round of a trial that has ended or is
    deleted is dropped, so that a published result never changes."""
    trial = get_trial(connection, row["trial"])
    if trial is None or trial["state"] != "open":
        return
    connection.execute(insert(rounds).values(row))
    _end_if_all_judged(connection, row["trial"])


def record_verdict(connection: Connection, trial_id: str, number: int, verdict: str) -> bool:
    """Write a verdict down, if this is the first round without one and the trial is open. Whether it was."""
    trial_rounds = get_rounds(connection, trial_id)
    current = next((each["number"] for each in trial_rounds if each["verdict"] is None), None)
    trial = get_trial(connection, trial_id)
    if trial is None or trial["state"] != "open" or current != number:
        return False
    _set_verdict(connection, trial_id, number, verdict)
    _end_if_all_judged(connection, trial_id)
    return True


def undo_verdict(connection: Connection, trial_id: str) -> bool:
    """Forget the last verdict that a person gave, if the trial is open and there is one. Whether there was."""
    trial = get_trial(connection, trial_id)
    judged_numbers = [
        each["number"] for each in get_rounds(connection, trial_id) if each["verdict"] not in (None, "same")
    ]
    if trial is None or trial["state"] != "open" or not judged_numbers:
        return False
    _set_verdict(connection, trial_id, judged_numbers[-1], None)
    return True


def end_trial(connection: Connection, trial_id: str) -> None:
    connection.execute(update(trials).where(trials.c.id == trial_id).values(state="done"))


def _set_verdict(connection: Connection, trial_id: str, number: int, verdict: str | None) -> None:
    where = (rounds.c.trial == trial_id) & (rounds.c.number == number)
    connection.execute(update(rounds).where(where).values(verdict=verdict))


def _end_if_all_judged(connection: Connection, trial_id: str) -> None:
    trial, trial_rounds = get_trial(connection, trial_id), get_rounds(connection, trial_id)
    if trial and len(trial_rounds) >= trial["planned"] and all(each["verdict"] for each in trial_rounds):
        end_trial(connection, trial_id)
