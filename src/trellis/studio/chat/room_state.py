"""The state of an open room: its settings, its tree of messages, and both as JSON and events.

It does not know who answers, or what people may do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from ...errors import NotFound, TrellisError, shorten
from ...markdown import text_to_html
from ...options import Sampling, invalid_from
from ...store import rooms as rows
from ...store.store import Store
from ...text_rules import fold_text
from ..hub import Hub
from ..jobs import timestamp
from .answer import INLINE_RENDER_LIMIT, GrowingAnswer
from .message import Message
from .targets import ChatTargets

DEFAULT_SAMPLING = Sampling(max_new_tokens=1024)
"""The sampling of a room that sets none."""

UNRESUMABLE_ERRORS = frozenset({
    "content_filter", "model_refused", "tool_call", "only_thoughts", "option_refused", "prompt_too_long", "cannot_see",
    "wrong_key", "private_address", "forbidden_address", "model_not_found", "not_found",
})  # fmt: skip
"""Errors after which an answer cannot be continued: they would happen again."""


class RoomState:
    """A conversation, which is a tree of messages: editing and regenerating start branches. `head` is the last message
    of the selected branch."""

    def __init__(
        self, store: Store, hub: Hub, targets: ChatTargets, row: dict[str, Any], messages: Sequence[Message]
    ) -> None:
        self._store, self._hub, self._targets = store, hub, targets
        self.id: str = row["id"]
        self.title: str = row["title"]
        self.named: bool = bool(row["named"])
        self.system: str = row["system"]
        self.models: list[str] = row["models"]
        self.sampling: dict[str, Any] = row["sampling"]
        self.head: str | None = row["head"]
        self.archived: bool = bool(row["archived"])
        self.created: float = row["created"]
        self.updated: float = row["updated"]
        self.messages: dict[str, Message] = {}
        self.growing_answers: dict[str, GrowingAnswer] = {}
        """Answers in progress, by the id of their message."""
        self._children: dict[str | None, list[Message]] = {}
        for message in messages:
            self.add_to_tree(message)
        self._target_labels: dict[str, str] = {}
        self._first_event_number = int(time.time() * 1000)
        """The number of the first event: event numbers grow across restarts too."""

    @property
    def topic(self) -> str:
        return f"rooms/{self.id}"

    @property
    def last_event_number(self) -> int:
        """The number of the newest event."""
        return self._first_event_number + self._hub.event_count(self.topic)

    def hub_event_id(self, after: int) -> str | None:
        """Return the hub's id of an event; None for one from before this room was opened."""
        return (
            self._hub.event_id(self.topic, after - self._first_event_number)
            if after >= self._first_event_number
            else None
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id, "title": self.title, "system": self.system, "models": self.models,
            "sampling": self.sampling, "head": self.head, "archived": self.archived,
            "growing": list(self.growing_answers),
            "created": timestamp(self.created), "updated": timestamp(self.updated),
        }  # fmt: skip

    def message(self, message_id: str) -> Message:
        """Raise NotFound."""
        if message_id not in self.messages:
            raise NotFound(
                f"There is no message “{shorten(message_id)}” in this chat.", field="message",
                next_step="Reload the page to see the current messages.",
            )  # fmt: skip
        return self.messages[message_id]

    def path(self, head: str | None) -> list[Message]:
        """Return the messages from the root to `head`."""
        branch: list[Message] = []
        while head is not None:
            branch.append(self.messages[head])
            head = branch[-1].parent
        return branch[::-1]

    def children(self, message_id: str | None) -> list[Message]:
        return self._children.get(message_id, [])

    def message_by_request(self, request: str) -> Message | None:
        """Return the message that a request has added before, if any."""
        return next((message for message in self.messages.values() if message.request == request), None)

    async def can_continue(self, message: Message) -> bool:
        """Return whether an answer is incomplete and continuing it can succeed."""
        is_cut_short = message.state in ("interrupted", "stopped", "failed") or message.finish == "length"
        if not is_cut_short or message.role != "assistant" or message.id in self.growing_answers:
            return False
        if message.error and message.error["code"] in UNRESUMABLE_ERRORS:
            return False
        usage = message.usage or {}
        is_context_full = (usage.get("context_used") or 0) >= (usage.get("context_length") or float("inf"))
        if is_context_full and len(self.path(message.parent)) < 2:  # no earlier messages to leave out
            return False
        try:
            await self._targets.find(message.model or "")
        except TrellisError:
            return False
        return True

    def add_to_tree(self, message: Message) -> None:
        self.messages[message.id] = message
        self._children.setdefault(message.parent, []).append(message)

    async def rendered_message(self, message: Message) -> dict[str, Any]:
        """Return a message as events carry it: `html` renders its first `shown` characters."""
        await self._render([message])
        return self._message_json(message)

    async def rendered_messages(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], int]:
        """Return some messages at one moment, and the number of the last event before it."""
        await self._render(messages)
        return [self._message_json(message) for message in messages], self.last_event_number

    async def _render(self, messages: Sequence[Message]) -> None:
        """Render finished answers to HTML, once. User messages are shown as typed; a growing answer renders its own
        blocks."""
        unrendered = [each for each in messages if each.html is None and each.role == "assistant"]
        unrendered = [each for each in unrendered if each.id not in self.growing_answers]
        texts = [each.text for each in unrendered]
        if sum(map(len, texts)) <= INLINE_RENDER_LIMIT:
            rendered = list(map(text_to_html, texts))
        else:
            rendered = await asyncio.to_thread(lambda: list(map(text_to_html, texts)))
        for message, text, html in zip(unrendered, texts, rendered, strict=True):
            if message.html is None and message.id not in self.growing_answers:
                message.html, message.rendered_length = html, len(text)
        for message in messages:
            if message.model and not message.label:
                message.label = await self._target_label(message.model)

    def _message_json(self, message: Message) -> dict[str, Any]:
        if growing_answer := self.growing_answers.get(message.id):
            growing_answer.join_text()
        return message.as_json() | {"html": message.html or "", "shown": message.rendered_length}

    async def _target_label(self, model: str) -> str:
        if model not in self._target_labels:
            self._target_labels[model] = await self._targets.label_of(model)
        return self._target_labels[model]

    async def add_messages(self, messages: Sequence[Message], head: str, changes: dict[str, Any] | None = None) -> None:
        """Store messages and changed settings in one transaction, then publish the messages."""
        self.updated = time.time()
        values = {"head": head, "updated": self.updated} | (changes or {})
        await self._store.write(rows.add_messages, self.id, [message.to_row() for message in messages], values)
        self.head = head
        for message in messages:
            self.add_to_tree(message)
        for message in messages:
            if message.state == "growing":
                message.html = ""
            self.publish("message", message=await self.rendered_message(message), head=head)

    def publish(self, kind: str, **data: Any) -> None:
        """Publish an event to everybody in the room."""
        self._hub.publish(self.topic, kind, {"type": kind, "seq": self.last_event_number + 1, **data})

    def publish_message(self, message: Message) -> None:
        """Publish a whole message again, because what was already shown has changed."""
        self.publish("message", message=self._message_json(message), head=self.head)

    async def save_text(self, message: Message) -> None:
        values = {"text": message.text, "folded": fold_text(message.text)}
        await self._store.write(rows.update_message, message.id, values)


def parse_sampling(given: dict[str, Any]) -> Sampling:
    """Return a room's sampling, defaults included. Raise Invalid."""
    try:
        return Sampling.model_validate(DEFAULT_SAMPLING.model_dump() | given)
    except ValidationError as error:
        raise invalid_from(error, prefix="sampling") from None
