"""The transitions of a session: each is one transaction, which the state in memory then follows."""

from __future__ import annotations

import time
from typing import Any

from ...messages import Choice, Learned, Offered
from ...store import steering as rows
from ...store.store import Store
from ..throughput import tokens_per_second
from .offer import ShownOffer
from .state import SessionState
from .tree import Node, child_id_for_choice, node_json, offer_id


class Transitions:
    """Moves the head, adds nodes and shows offers; knows the accepted requests. Callers hold the state's lock."""

    def __init__(self, store: Store, state: SessionState) -> None:
        self._store = store
        self._state = state
        self._known_requests: set[str] | None = None
        """Ids of all accepted requests; None until they are read."""

    async def move_head(
        self, target: Node, offer: str | None, node_changes: dict[str, dict[str, Any]], intent: dict[str, Any]
    ) -> None:
        """Move the head and show the offer that was shown there."""
        row = await self._store.write(rows.commit_move, target.id, offer, node_changes, intent, self.failed_request)
        self.remember_request(intent)
        for node_id, changes in node_changes.items():
            self._state.tree.update(node_id, **changes)
        self._state.tree.head_id = target.id
        self._state.offer = ShownOffer.from_row(row, self._state.config.group_size) if row else None
        self._state.intent, self._state.error = None, None
        self._state.publish_head()
        if self._state.offer:
            self._state.publish_offer(self._state.offer)

    def make_child(self, parent: Node, offer: str, choice: Choice, learned: Learned | None) -> Node:
        """Return the node that a choice leads to. Without learning it has the weights of its parent."""
        return Node(
            id=child_id_for_choice(parent, offer, choice), session=self._state.id, parent=parent.id,
            step=parent.step + (learned is not None), weights=learned.weights if learned else parent.weights,
            position=parent.position + 1, answered=offer, choice=choice, metrics=learned.metrics if learned else None,
            control=None if learned else parent.control, shown=None, forward=None, created=time.time(),
        )  # fmt: skip

    def enter_node(self, node: Node, node_changes: dict[str, dict[str, Any]]) -> None:
        """Add a committed node to the state and publish it."""
        self._state.tree.add(node)
        for node_id, changes in node_changes.items():
            self._state.tree.update(node_id, **changes)
        self._state.tree.head_id = node.id
        self._state.offer, self._state.intent, self._state.error = None, None, None
        self._state.publish("node_added", node_json(node, self._state.tree))
        self._state.publish_head()

    async def new_offer(self, prompt: str, intent: dict[str, Any] | None) -> None:
        """Store and show a new offer without options yet, and close the intent that asked for it."""
        head = self._state.tree.head
        number = await self._store.read(rows.count_offers, head.id)
        row = self.offer_row(head, number, prompt)
        await self._store.write(rows.commit_offer, row, intent, self.failed_request)
        self.remember_request(intent)
        self.show_offer(row)

    def offer_row(self, node: Node, number: int, prompt: str) -> dict[str, Any]:
        return {
            "id": offer_id(node, number, prompt), "session": self._state.id, "node": node.id, "number": number,
            "prompt": prompt, "options": None, "created": time.time(),
        }  # fmt: skip

    def show_offer(self, row: dict[str, Any]) -> None:
        """Show a stored offer."""
        self._state.tree.update(row["node"], shown=row["id"])
        self._state.offer = ShownOffer.from_row(row, self._state.config.group_size)
        self._state.publish_offer(self._state.offer)

    def record_speed(self, offered: Offered) -> None:
        tokens = sum(len(option.tokens) for option in offered.options)
        self._state.tokens_per_second = tokens_per_second(tokens, offered.seconds)

    def intent(self, request: str, kind: str, body: dict[str, Any], state: str) -> dict[str, Any]:
        return {"session": self._state.id, "request": request, "kind": kind, "body": body, "state": state,
                "created": time.time()}  # fmt: skip

    @property
    def failed_request(self) -> str | None:
        """Request id of an intent that failed; the next action replaces it."""
        return self._state.intent["request"] if self._state.intent else None

    async def is_known_request(self, request: str) -> bool:
        """Whether a request was accepted before, which makes it the same action."""
        if self._known_requests is None:
            self._known_requests = await self._store.read(rows.get_request_ids, self._state.id)
        return request in self._known_requests

    def remember_request(self, intent: dict[str, Any] | None) -> None:
        if intent and self._known_requests is not None:
            self._known_requests.add(intent["request"])
