"""What people do in a room: send, edit, regenerate, choose a branch, rate, stop, change settings.

A message is stored before anybody answers it. It does not know sockets or pages.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ...errors import Conflict, Invalid, NotFound
from ...store import rooms as rows
from ...store.store import Store
from ...text_rules import PROMPT_LIMIT, fold_text
from ..hub import Hub
from .answer_tasks import AnswerTasks
from .attachments import PICTURE, Attachments
from .message import Message
from .room_state import RoomState, parse_sampling
from .target import ChatTarget
from .targets import ChatTargets

MAX_TITLE_LENGTH = 60
MAX_MODELS = 4
MAX_MESSAGES = 20_000


class Room(RoomState):
    """The actions of a room, one at a time: each holds the lock until its messages are stored and published."""

    def __init__(
        self,
        store: Store,
        hub: Hub,
        targets: ChatTargets,
        attachments: Attachments,
        row: dict[str, Any],
        messages: Sequence[Message],
    ) -> None:
        super().__init__(store, hub, targets, row, messages)
        self._attachments = attachments
        self._answers = AnswerTasks(store, targets, attachments, self)
        self._lock = asyncio.Lock()
        self.watchers = 0
        self.last_used = time.monotonic()
        self.is_closed = False

    async def send(
        self,
        text: str,
        request: str,
        *,
        parent: str | None = None,
        models: Sequence[str] = (),
        sampling: dict[str, Any] | None = None,
        files: Sequence[str] = (),
    ) -> Message:
        """Add a user message, and start one answer for each model. The same request adds it once."""
        async with self._lock:
            if known_message := self.message_by_request(request):
                return known_message
            self._require_can_add()
            attached_files = await self._attachments.find(self.id, files, "files")
            _require_within_limit(text)
            if not text.strip() and not attached_files:
                raise Invalid("text: is empty.", field="text", next_step="Write something, or add a file.")
            parent_id = self._resolve_parent(parent)
            if sampling:
                parse_sampling(sampling)
            message = Message(_new_id("m"), self.id, parent_id, "user", text, files=attached_files, request=request)
            return await self._add_user_message(message, models, sampling)

    async def edit(self, message_id: str, text: str, request: str) -> Message:
        """Add an edited message beside the old one, as a branch. An edited user message is answered by the room's
        models; an edited answer is not."""
        async with self._lock:
            if known_message := self.message_by_request(request):
                return known_message
            self._require_can_add()
            old_message = self.message(message_id)
            _require_within_limit(text)
            if not text.strip():
                raise Invalid("text: is empty.", field="text", next_step="Write something.")
            if old_message.role == "user":
                message = Message(
                    _new_id("m"), self.id, old_message.parent, "user", text, files=old_message.files, request=request
                )
                return await self._add_user_message(message, (), None)
            message = Message(
                _new_id("m"),
                self.id,
                old_message.parent,
                "assistant",
                text,
                old_message.model,
                finish="edited",
                request=request,
            )
            await self.add_messages([message], message.id)
            return message

    async def regenerate(self, message_id: str, request: str, model: str | None = None) -> Message:
        """Start another answer beside the existing one."""
        async with self._lock:
            if known_message := self.message_by_request(request):
                return known_message
            self._require_can_add()
            old_message = self.message(message_id)
            user_message = old_message if old_message.role == "user" else self.message(old_message.parent or "")
            target_name = (await self._choose_target(model, old_message)).exact_name
            if any(file["kind"] == PICTURE for file in user_message.files):
                await self._targets.require_picture_support([target_name])
            answer = Message(
                _new_id("m"), self.id, user_message.id, "assistant", "", target_name, state="growing", request=request
            )  # fmt: skip
            await self.add_messages([answer], answer.id)
            await self._answers.start(answer)
            return answer

    async def continue_answer(self, message_id: str) -> None:
        """Continue an answer that was interrupted, stopped or truncated."""
        async with self._lock:
            message = self.message(message_id)
            if message.role != "assistant" or message.id in self.growing_answers:
                is_answer = message.role == "assistant"
                problem = "This answer is still being generated." if is_answer else "Only answers can be continued."
                raise Conflict(problem, code="not_now", next_step="Wait until it is done.")
            self._require_can_add()
            await self._store.write(rows.update_message, message.id, {"state": "growing", "error": None})
            message.state, message.error, message.finish = "growing", None, None
            message.html, message.rendered_length = None, 0
            await self._answers.start(message)
            self.publish("message", message=await self.rendered_message(message), head=self.head)

    async def _choose_target(self, model: str | None, old_message: Message) -> ChatTarget:
        """Return the requested target, else the one that answered before, else (it is gone) the room's. Raise
        NotFound."""
        if model is None and old_message.model:
            with suppress(NotFound):
                return await self._targets.find(old_message.model)
        return await self._targets.find(model or (self.models or ["demo"])[0])

    async def stop(self, message_id: str | None = None) -> None:
        """Stop an answer, or all in progress. Returns when they are stored."""
        await self._answers.stop(message_id)

    async def select_branch(self, message_id: str) -> None:
        """Select the branch through a message: the head becomes its last message, always by the newest child."""
        async with self._lock:
            self._require_not_closed()
            message = self.message(message_id)
            last_message = message
            while children := self.children(last_message.id):
                last_message = children[-1]
            self.head = last_message.id
            await self._store.write(rows.update_room, self.id, {"head": self.head})
            self.publish("message", message=await self.rendered_message(message), head=self.head)

    async def rate(self, message_id: str, rating: int) -> None:
        """Rate an answer: 1 is good, -1 bad, 0 neither."""
        async with self._lock:
            self._require_not_closed()
            message = self.message(message_id)
            if message.role != "assistant" or rating not in (-1, 0, 1):
                raise Invalid("rating: must be -1, 0 or 1, for an answer.", field="rating", next_step="Rate an answer.")
            message.rating = rating
            await self._store.write(rows.update_message, message.id, {"rating": rating})
            self.publish("message", message=await self.rendered_message(message), head=self.head)

    async def update_settings(
        self,
        *,
        title: str | None = None,
        system: str | None = None,
        models: Sequence[str] | None = None,
        sampling: dict[str, Any] | None = None,
        archived: bool | None = None,
    ) -> None:
        """Change the settings that are given. Raise Invalid or NotFound."""
        async with self._lock:
            self._require_not_closed()
            values: dict[str, Any] = {}
            if title is not None:
                values |= {"title": title, "named": 1, "folded": fold_text(title)}
            if system is not None:
                values["system"] = system
            if models is not None:
                values["models"] = await self._validate_models(models)
            if sampling is not None:
                parse_sampling(sampling)
                values["sampling"] = sampling
            if archived is not None:
                values["archived"] = int(archived)
            if values:
                await self._store.write(rows.update_room, self.id, values)
                for name, value in values.items():
                    if name != "folded":
                        setattr(self, name, bool(value) if name in ("named", "archived") else value)
                self.publish("room", room=self.as_json())

    async def close(self, reason: str | None = None) -> None:
        """Interrupt the answers in progress, store them, and end the room's events."""
        async with self._lock:  # an action that has begun is finished first
            self.is_closed = True
            tasks = self._answers.cancel_all()
        await self._answers.wait_until_stored(tasks)
        if reason:
            self.publish("closed", reason=reason)
        self._hub.close_topic(self.topic)

    @property
    def is_idle(self) -> bool:
        return not self.growing_answers and self.watchers == 0 and not self._lock.locked()

    def _require_not_closed(self) -> None:
        if self.is_closed:
            raise Conflict("This chat was closed.", code="closed", next_step="Reload the page.")

    def _require_can_add(self) -> None:
        self._require_not_closed()
        if len(self.messages) >= MAX_MESSAGES:
            raise Conflict(
                f"This chat has {len(self.messages):,} messages, which is the limit.", code="room_full",
                next_step="Start a new chat.",
            )  # fmt: skip

    def _resolve_parent(self, parent: str | None) -> str | None:
        """Return the parent of a new message; the default is the head. Raise NotFound or Conflict."""
        parent_message = self.message(parent) if parent else self.messages.get(self.head or "")
        if parent_message is None:
            return None
        if parent_message.role == "user":
            raise Conflict(
                "The last message has no answer yet.",
                code="not_now",
                next_step="Generate its answer first, or edit it.",
            )
        if parent_message.id in self.growing_answers:
            raise Conflict(
                "The answer is still being generated.", code="not_now", next_step="Wait until it is done, or stop it."
            )  # fmt: skip
        return parent_message.id

    async def _validate_models(self, models: Sequence[str]) -> list[str]:
        names = list(dict.fromkeys(models))
        if not 1 <= len(names) <= MAX_MODELS:
            raise Invalid(
                f"models: choose 1 to {MAX_MODELS}, got {len(names)}.", field="models",
                next_step="Choose fewer." if names else "Choose one.",
            )  # fmt: skip
        return [(await self._targets.find(name)).name for name in names]

    async def _add_user_message(
        self, message: Message, models: Sequence[str], sampling: dict[str, Any] | None
    ) -> Message:
        target_names = await self._validate_models(models or self.models or ["demo"])
        exact_names = [(await self._targets.find(name)).exact_name for name in target_names]
        if any(file["kind"] == PICTURE for file in message.files):
            await self._targets.require_picture_support(target_names)
        group = _new_id("g") if len(target_names) > 1 else None
        answers = [
            Message(_new_id("m"), self.id, message.id, "assistant", "", each, group=group, state="growing",
                    created=time.time() + 1e-4 * (index + 1))
            for index, each in enumerate(exact_names)
        ]  # fmt: skip
        changes: dict[str, Any] = {"models": target_names}
        if sampling is not None:
            changes["sampling"] = sampling
        if not self.named and message.parent is None:
            title = make_title(message.text) or (message.files[0]["name"] if message.files else "")
            changes |= {"title": title, "folded": fold_text(title)}
        await self.add_messages([message, *answers], answers[0].id, changes)
        self.models, self.title = target_names, changes.get("title", self.title)
        self.sampling = changes.get("sampling", self.sampling)
        if len(changes) > 1:
            self.publish("room", room=self.as_json())
        for answer in answers:
            await self._answers.start(answer)
        return message


def _require_within_limit(text: str) -> None:
    """Raise Invalid for a message that is too long."""
    if len(text) > PROMPT_LIMIT:
        raise Invalid(
            f"text: the message has {len(text):,} characters; the limit is {PROMPT_LIMIT:,}.", field="text",
            code="too_long", next_step="Attach the text as a file, or send it in parts.",
        )  # fmt: skip


def make_title(text: str) -> str:
    """Return the first words of a message."""
    line = next((line.strip("#>*-` \t") for line in text.splitlines() if line.strip("#>*-` \t")), "")
    if len(line) <= MAX_TITLE_LENGTH:
        return line
    return line[:MAX_TITLE_LENGTH].rsplit(" ", 1)[0].rstrip(",;:. ") + "…"


def _new_id(kind: str) -> str:
    return f"{kind}{secrets.token_hex(8)}"
