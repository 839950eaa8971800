"""Rows of sessions, nodes, offers and intents. Plain functions of a connection; values in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, String, cast, delete, func, insert, select, update

from .tables import intents, nodes, offers, sessions

Row = dict[str, Any]


def add_session(connection: Connection, session: Row, root: Row) -> None:
    connection.execute(insert(sessions).values(session))
    connection.execute(insert(nodes).values(root))


def session_by_request(connection: Connection, request: str) -> str | None:
    return connection.execute(select(sessions.c.id).where(sessions.c.request == request)).scalar()


def get_session(connection: Connection, session_id: str) -> tuple[Row, list[Row], Row | None, Row | None] | None:
    """A session with its nodes, the offer on its screen, and its open intent."""
    row = connection.execute(select(sessions).where(sessions.c.id == session_id)).mappings().first()
    if row is None:
        return None
    node_rows = connection.execute(
        select(nodes).where(nodes.c.session == session_id).order_by(nodes.c.created, nodes.c.step)
    )
    offer = _first_row(connection, select(offers).where(offers.c.id == row["offer"]))
    intent = _first_row(connection, select(intents).where(intents.c.session == session_id, intents.c.state == "open"))
    return dict(row), [dict(node) for node in node_rows.mappings()], offer, intent


def list_sessions(connection: Connection) -> list[Row]:
    """All sessions, the one that was last used first, each with its head's step."""
    query = (
        select(sessions, nodes.c.step)
        .join(nodes, nodes.c.id == sessions.c.head, isouter=True)
        .order_by(sessions.c.updated.desc())
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def sessions_with_open_intents(connection: Connection) -> list[str]:
    query = select(intents.c.session).where(intents.c.state == "open").distinct()
    return list(connection.execute(query).scalars())


def rename_session(connection: Connection, session_id: str, name: str, now: float) -> None:
    connection.execute(update(sessions).where(sessions.c.id == session_id).values(name=name, updated=now))


def delete_session(connection: Connection, session_id: str) -> None:
    # Let go of each other first: SQLite follows a chain of a thousand parents at most.
    connection.execute(update(nodes).where(nodes.c.session == session_id).values(parent=None))
    connection.execute(delete(sessions).where(sessions.c.id == session_id))


def all_weights(connection: Connection) -> set[str]:
    """Every weights id that some node names."""
    return set(connection.execute(select(nodes.c.weights).distinct()).scalars())


def set_weights(connection: Connection, node_id: str, weights: str) -> None:
    connection.execute(update(nodes).where(nodes.c.id == node_id).values(weights=weights))


def weights_in_other_sessions(connection: Connection, session_id: str, weights: Sequence[str]) -> set[str]:
    """Which of these weights some other session names."""
    found: set[str] = set()
    for start in range(0, len(weights), 500):
        part = weights[start : start + 500]
        query = select(nodes.c.weights).where(nodes.c.weights.in_(part), nodes.c.session != session_id).distinct()
        found.update(connection.execute(query).scalars())
    return found


def is_log_used(connection: Connection, log: str) -> bool:
    """Whether some node was fitted to this log of choices."""
    query = select(nodes.c.id).where(cast(nodes.c.choice, String).contains(log, autoescape=True)).limit(1)
    return connection.execute(query).first() is not None


def set_prepared_prompts(connection: Connection, session_id: str, prepared: str) -> None:
    connection.execute(update(sessions).where(sessions.c.id == session_id).values(prompts=prepared))


def are_prompts_used(connection: Connection, prepared: str) -> bool:
    return connection.execute(select(sessions.c.id).where(sessions.c.prompts == prepared)).first() is not None


def set_node_name(connection: Connection, node_id: str, name: str | None) -> None:
    connection.execute(update(nodes).where(nodes.c.id == node_id).values(name=name))


def set_metrics(connection: Connection, node_id: str, metrics: Row) -> None:
    connection.execute(update(nodes).where(nodes.c.id == node_id).values(metrics=metrics))


def set_control(connection: Connection, node_id: str, answer: str) -> None:
    connection.execute(update(nodes).where(nodes.c.id == node_id).values(control=answer))


def add_offer(connection: Connection, offer: Row) -> None:
    """A new offer, on the screen from now on."""
    connection.execute(insert(offers).values(offer))
    connection.execute(update(nodes).where(nodes.c.id == offer["node"]).values(shown=offer["id"]))
    connection.execute(update(sessions).where(sessions.c.id == offer["session"]).values(offer=offer["id"]))


def count_offers(connection: Connection, node_id: str) -> int:
    return connection.execute(select(func.count()).where(offers.c.node == node_id)).scalar_one()


def set_options(connection: Connection, offer_id: str, options: Sequence[Row]) -> None:
    connection.execute(update(offers).where(offers.c.id == offer_id).values(options=list(options)))


def get_offer(connection: Connection, offer_id: str) -> Row | None:
    return _first_row(connection, select(offers).where(offers.c.id == offer_id))


def get_offers(connection: Connection, offer_ids: Sequence[str]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for start in range(0, len(offer_ids), 500):
        query = select(offers).where(offers.c.id.in_(offer_ids[start : start + 500]))
        found |= {row["id"]: dict(row) for row in connection.execute(query).mappings()}
    return found


def get_request_ids(connection: Connection, session_id: str) -> set[str]:
    """Return the ids of all requests that a session accepted."""
    return set(connection.execute(select(intents.c.request).where(intents.c.session == session_id)).scalars())


def add_intent(connection: Connection, intent: Row) -> None:
    connection.execute(insert(intents).values(intent))


def close_intent(connection: Connection, session_id: str, request: str, state: str) -> None:
    where = (intents.c.session == session_id) & (intents.c.request == request)
    connection.execute(update(intents).where(where).values(state=state))


def move_head(
    connection: Connection, session_id: str, head: str, offer: str | None, node_changes: dict[str, Row], now: float
) -> None:
    """Move the head and the current offer, and change nodes on the way."""
    connection.execute(update(sessions).where(sessions.c.id == session_id).values(head=head, offer=offer, updated=now))
    for node_id, changes in node_changes.items():
        connection.execute(update(nodes).where(nodes.c.id == node_id).values(changes))


def add_node(connection: Connection, node: Row) -> None:
    connection.execute(insert(nodes).values(node))


# What one action changes, in one transaction. `failed_request` is an intent that failed, and that this action replaces.


def replace_intent(connection: Connection, intent: Row, failed_request: str | None) -> None:
    if failed_request:
        close_intent(connection, intent["session"], failed_request, "abandoned")
    add_intent(connection, intent)


def commit_move(
    connection: Connection,
    head: str,
    offer: str | None,
    node_changes: dict[str, Row],
    intent: Row,
    failed_request: str | None,
) -> Row | None:
    """Move the head to an existing node. Return the offer that is then shown."""
    replace_intent(connection, intent, failed_request)
    move_head(connection, intent["session"], head, offer, node_changes, intent["created"])
    return get_offer(connection, offer) if offer else None


def commit_offer(connection: Connection, offer: Row, intent: Row | None, failed_request: str | None) -> None:
    """Put a new offer on the screen, and note who asked for it."""
    if intent:
        replace_intent(connection, intent, failed_request)
    add_offer(connection, offer)


def commit_node(
    connection: Connection,
    node: Row,
    node_changes: dict[str, Row],
    intent: Row,
    failed_request: str | None,
    offer: Row | None = None,
) -> None:
    """Add a node and move the head to it, with its first offer if there is one."""
    add_node(connection, node)
    if intent["state"] == "open":
        close_intent(connection, intent["session"], intent["request"], "done")
    else:
        replace_intent(connection, intent, failed_request)
    move_head(connection, intent["session"], node["id"], None, node_changes, node["created"])
    if offer:
        add_offer(connection, offer)


def _first_row(connection: Connection, query: Any) -> Row | None:
    row: RowMapping | None = connection.execute(query).mappings().first()
    return dict(row) if row else None
