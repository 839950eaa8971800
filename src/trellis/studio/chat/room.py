"""One room while the studio runs: what was said in it, and the answers that are growing.

What is said is written down before anybody answers; an answer is written down as it grows. It does not know sockets
or pages.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from typing import Any, Literal

from pydantic import ValidationError

from ...errors import Conflict, EngineDied, EngineStopped, Invalid, NotFound, TrellisError, internal_error, shorten
from ...markdown import text_to_html
from ...messages import Chat, Turn, derived_seed
from ...options import Sampling, invalid_from
from ...store import rooms as rows
from ...store.store import Store
from ...text_rules import PROMPT_LIMIT, fold_text
from ..hub import Hub
from ..jobs import timestamp
from .answer import INLINE_RENDER_LIMIT, GrowingAnswer
from .attachments import PICTURE, Attachments
from .message import Message
from .target import ChatTarget
from .targets import ChatTargets

log = logging.getLogger(__name__)

MAX_TITLE_LENGTH = 60
MAX_MODELS = 4
MAX_MESSAGES = 20_000

UNRESUMABLE_ERRORS = frozenset({
    "content_filter", "model_refused", "tool_call", "only_thoughts", "option_refused", "prompt_too_long", "cannot_see",
    "wrong_key", "private_address", "forbidden_address", "model_not_found", "not_found",
})  # fmt: skip
"""Errors after which an answer cannot go on: the same would happen again."""

DEFAULT_SAMPLING = Sampling(max_new_tokens=1024)
"""How answers are drawn in a room where nobody has said otherwise."""


class Room:
    """A conversation, which is a tree: who edits or asks again starts a branch. The head is the last message of the
    branch that is looked at."""

    def __init__(
        self,
        store: Store,
        hub: Hub,
        targets: ChatTargets,
        attachments: Attachments,
        row: dict[str, Any],
        messages: Sequence[Message],
    ) -> None:
        self._store, self._hub, self._targets, self._attachments = store, hub, targets, attachments
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
        self._children: dict[str | None, list[Message]] = {}
        for message in messages:
            self._add_to_tree(message)
        self._answer_tasks: dict[str, asyncio.Task[None]] = {}
        self._growing_answers: dict[str, GrowingAnswer] = {}
        self._stopping_ids: set[str] = set()
        self._finishing_tasks: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        self._target_labels: dict[str, str] = {}
        self._first_event_number = int(time.time() * 1000)
        """Numbers of events begin here, so that they grow over restarts too."""
        self.watchers = 0
        self.last_used = time.monotonic()
        self.is_closed = False

    # ── What people see ────────────────────────────────────────────────────────────────────────────

    @property
    def topic(self) -> str:
        return f"rooms/{self.id}"

    @property
    def last_event_number(self) -> int:
        """The number of the newest event."""
        return self._first_event_number + self._hub.event_count(self.topic)

    def hub_event_id(self, after: int) -> str | None:
        """The hub's name for an event's number; None for one that is from before this room was opened."""
        return (
            self._hub.event_id(self.topic, after - self._first_event_number)
            if after >= self._first_event_number
            else None
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id, "title": self.title, "system": self.system, "models": self.models,
            "sampling": self.sampling, "head": self.head, "archived": self.archived,
            "growing": list(self._answer_tasks),
            "created": timestamp(self.created), "updated": timestamp(self.updated),
        }  # fmt: skip

    def message(self, message_id: str) -> Message:
        """Raises NotFound."""
        if message_id not in self.messages:
            raise NotFound(
                f"There is no message “{shorten(message_id)}” in this chat.", field="message",
                next_step="Reload the page to see the current messages.",
            )  # fmt: skip
        return self.messages[message_id]

    def path(self, head: str | None) -> list[Message]:
        """The branch that ends in a message."""
        branch: list[Message] = []
        while head is not None:
            branch.append(self.messages[head])
            head = branch[-1].parent
        return branch[::-1]

    def children(self, message_id: str | None) -> list[Message]:
        return self._children.get(message_id, [])

    def _add_to_tree(self, message: Message) -> None:
        self.messages[message.id] = message
        self._children.setdefault(message.parent, []).append(message)

    async def rendered_message(self, message: Message) -> dict[str, Any]:
        """A message as events tell it: `html` holds its first `shown` characters."""
        await self._render([message])
        return self._message_json(message)

    async def rendered_messages(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], int]:
        """Some messages as they are at one moment, and the number of the last event before it."""
        await self._render(messages)
        return [self._message_json(message) for message in messages], self.last_event_number

    async def _render(self, messages: Sequence[Message]) -> None:
        """Have the text of whole answers as HTML, made once. What people write is shown as they typed it, and of an
        answer that grows the blocks are made by who makes it grow."""
        unrendered = [each for each in messages if each.html is None and each.role == "assistant"]
        unrendered = [each for each in unrendered if each.id not in self._growing_answers]
        texts = [each.text for each in unrendered]
        if sum(map(len, texts)) <= INLINE_RENDER_LIMIT:
            rendered = list(map(text_to_html, texts))
        else:
            rendered = await asyncio.to_thread(lambda: list(map(text_to_html, texts)))
        for message, text, html in zip(unrendered, texts, rendered, strict=True):
            if message.html is None and message.id not in self._growing_answers:
                message.html, message.rendered_length = html, len(text)
        for message in messages:
            if message.model and not message.label:
                message.label = await self._target_label(message.model)

    def _message_json(self, message: Message) -> dict[str, Any]:
        if growing_answer := self._growing_answers.get(message.id):
            growing_answer.join_text()
        return message.as_json() | {"html": message.html or "", "shown": message.rendered_length}

    async def _target_label(self, model: str) -> str:
        if model not in self._target_labels:
            self._target_labels[model] = await self._targets.label_of(model)
        return self._target_labels[model]

    # ── What people say ────────────────────────────────────────────────────────────────────────────

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
        """Say something, and have it answered by each of some models. The same request says it once."""
        async with self._lock:
            if known_message := self.message_by_request(request):
                return known_message
            self._require_can_add()
            attached_files = await self._get_files(files)
            _require_within_limit(text)
            if not text.strip() and not attached_files:
                raise Invalid("text: is empty.", field="text", next_step="Write something, or add a file.")
            parent_id = self._resolve_parent(parent)
            if sampling:
                parse_sampling(sampling)
            message = Message(_new_id("m"), self.id, parent_id, "user", text, files=attached_files, request=request)
            return await self._add_user_message(message, models, sampling)

    async def edit(self, message_id: str, text: str, request: str) -> Message:
        """Say something else in place of a message: another branch, which is answered by whom the room has chosen. An
        answer that is edited stays as it is written."""
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
            await self._add_messages([message], message.id)
            return message

    async def regenerate(self, message_id: str, request: str, model: str | None = None) -> Message:
        """Have a message answered once more, beside the answer that there is."""
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
            await self._add_messages([answer], answer.id)
            await self._start_answer(answer)
            return answer

    async def continue_answer(self, message_id: str) -> None:
        """Have an answer that broke off, was stopped or was cut go on where it ended."""
        async with self._lock:
            message = self.message(message_id)
            if message.role != "assistant" or message.id in self._answer_tasks:
                raise Conflict(
                    "Only answers can be continued." if message.role != "assistant"
                    else "This answer is still being generated.",
                    code="not_now", next_step="Wait until it is done.",
                )  # fmt: skip
            self._require_can_add()
            await self._store.write(rows.update_message, message.id, {"state": "growing", "error": None})
            message.state, message.error, message.finish = "growing", None, None
            message.html, message.rendered_length = None, 0
            await self._start_answer(message)
            self.publish("message", message=await self.rendered_message(message), head=self.head)

    async def _choose_target(self, model: str | None, old_message: Message) -> ChatTarget:
        """Who was asked for, else who answered before, else (it is gone) whom the room has chosen. Raises NotFound."""
        if model is None and old_message.model:
            with suppress(NotFound):
                return await self._targets.find(old_message.model)
        return await self._targets.find(model or (self.models or ["demo"])[0])

    async def can_continue(self, message: Message) -> bool:
        """Whether an answer broke off or was cut, and going on with it can work."""
        is_cut_short = message.state in ("interrupted", "stopped", "failed") or message.finish == "length"
        if not is_cut_short or message.role != "assistant" or message.id in self._answer_tasks:
            return False
        if message.error and message.error["code"] in UNRESUMABLE_ERRORS:
            return False
        usage = message.usage or {}
        is_context_full = (usage.get("context_used") or 0) >= (usage.get("context_length") or float("inf"))
        if is_context_full and len(self.path(message.parent)) < 2:  # no earlier messages that could be left out
            return False
        try:
            await self._targets.find(message.model or "")
        except TrellisError:
            return False
        return True

    async def stop(self, message_id: str | None = None) -> None:
        """Stop an answer, or all that grow. Returns when it has been written down."""
        tasks = [task for each, task in self._answer_tasks.items() if message_id in (None, each)]
        self._stopping_ids.update(each for each in self._answer_tasks if message_id in (None, each))
        for task in tasks:
            task.cancel()
        await self._wait_until_finished(tasks)

    async def select_branch(self, message_id: str) -> None:
        """Look at the branch that goes through a message, up to what was said last there."""
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
        """Call an answer good (1), bad (-1) or neither (0)."""
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
        """Change what a room is called, who answers in it and how. Raises Invalid or NotFound."""
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
        """Break off what grows, which is written down as far as it has come."""
        async with self._lock:  # what is being said is said first
            self.is_closed = True
            tasks = list(self._answer_tasks.values())
            for task in tasks:
                task.cancel()
        await self._wait_until_finished(tasks)
        if reason:
            self.publish("closed", reason=reason)
        self._hub.close_topic(self.topic)

    async def _wait_until_finished(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Until answers that were cancelled have been written down."""
        if tasks:
            await asyncio.wait(tasks)
        while self._finishing_tasks:
            await asyncio.wait(set(self._finishing_tasks))

    @property
    def is_idle(self) -> bool:
        return not self._answer_tasks and self.watchers == 0 and not self._lock.locked()

    # ── How it is said ─────────────────────────────────────────────────────────────────────────────

    def message_by_request(self, request: str) -> Message | None:
        """What an action has said before, if it has."""
        return next((message for message in self.messages.values() if message.request == request), None)

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
        """What a new message comes after: the head, where nobody says otherwise. Raises NotFound or Conflict."""
        parent_message = self.message(parent) if parent else self.messages.get(self.head or "")
        if parent_message is None:
            return None
        if parent_message.role == "user":
            raise Conflict(
                "The last message has no answer yet.",
                code="not_now",
                next_step="Generate its answer first, or edit it.",
            )
        if parent_message.id in self._answer_tasks:
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

    async def get_file(self, file_id: str) -> dict[str, Any]:
        """A file of this room. Raises NotFound."""
        file_row = next((row for row in await self._store.read(rows.get_files, self.id) if row["id"] == file_id), None)
        if file_row is None:
            raise NotFound(
                f"There is no file “{shorten(file_id)}” in this chat.", field="file", next_step="Add it again."
            )
        return file_row

    async def _get_files(self, file_ids: Sequence[str]) -> list[dict[str, Any]]:
        if not file_ids:
            return []
        files_by_id = {row["id"]: row for row in await self._store.read(rows.get_files, self.id)}
        if unknown := [each for each in file_ids if each not in files_by_id]:
            raise NotFound(
                f"There is no file “{shorten(unknown[0])}” in this chat.", field="files", next_step="Add it again."
            )
        return [{name: files_by_id[each][name] for name in ("id", "name", "kind", "bytes")} for each in file_ids]

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
        await self._add_messages([message, *answers], answers[0].id, changes)
        self.models, self.title = target_names, changes.get("title", self.title)
        self.sampling = changes.get("sampling", self.sampling)
        if len(changes) > 1:
            self.publish("room", room=self.as_json())
        for answer in answers:
            await self._start_answer(answer)
        return message

    async def _add_messages(
        self, messages: Sequence[Message], head: str, changes: dict[str, Any] | None = None
    ) -> None:
        """Write down what was said, then tell it."""
        self.updated = time.time()
        values = {"head": head, "updated": self.updated} | (changes or {})
        await self._store.write(rows.add_messages, self.id, [message.to_row() for message in messages], values)
        self.head = head
        for message in messages:
            self._add_to_tree(message)
        for message in messages:
            if message.state == "growing":
                message.html = ""
            self.publish("message", message=await self.rendered_message(message), head=head)

    # ── How it is answered ─────────────────────────────────────────────────────────────────────────

    async def _start_answer(self, message: Message) -> None:
        growing_answer = self._growing_answers[message.id] = GrowingAnswer(self, message)
        self._answer_tasks[message.id] = asyncio.create_task(
            self._run_answer(message, growing_answer), name=f"answer {message.id}"
        )
        await asyncio.sleep(0)  # one that is cancelled before its first step would never say how it ended

    async def _run_answer(self, message: Message, growing_answer: GrowingAnswer) -> None:
        try:
            await growing_answer.run()
        except asyncio.CancelledError:
            message.state = "stopped" if message.id in self._stopping_ids else "interrupted"
        except (EngineDied, EngineStopped) as error:
            message.state, message.error = "interrupted", error.as_json()
        except TrellisError as error:
            message.state, message.error = "failed", error.as_json()
        except Exception:
            reference = secrets.token_hex(4)
            log.exception("reference %s: an answer failed", reference)
            message.state, message.error = "failed", internal_error(reference).as_json()
        else:
            message.state = "done"
        finishing = asyncio.create_task(self._finish_answer(message, growing_answer))
        self._finishing_tasks.add(finishing)
        finishing.add_done_callback(self._finishing_tasks.discard)
        await asyncio.shield(finishing)

    async def _finish_answer(self, message: Message, growing_answer: GrowingAnswer) -> None:
        """Write down how an answer ended, then tell it. Whatever goes wrong, it has ended."""
        try:
            await growing_answer.finish()
            await self._store.write(rows.update_message, message.id, message.to_row())
        except TrellisError as error:  # a full disk: what was said is on the screens, and is said not to be kept
            message.error = error.as_json()
        except Exception as error:
            log.exception("the end of an answer could not be written down")
            message.error = TrellisError(
                f"The end of this answer couldn't be saved: {type(error).__name__}.", code="internal",
                next_step="Copy what you need, then regenerate.",
            ).as_json()  # fmt: skip
        finally:
            self._answer_tasks.pop(message.id, None)
            self._growing_answers.pop(message.id, None)
            self._stopping_ids.discard(message.id)
        if message.error:
            self.publish("error", message=message.id, error=message.error, state=message.state, usage=message.usage)
        elif message.state == "done":
            self.publish("done", message=message.id, finish=message.finish, usage=message.usage)
        else:
            self.publish("stopped", message=message.id, state=message.state, usage=message.usage)

    async def turns(self, message: Message, with_pictures: bool = False) -> list[Turn]:
        """The conversation that an answer answers, with what it holds already; with its pictures for who sees."""
        turns = [Turn(role="system", text=self.system)] if self.system else []
        path = self.path(message.parent)
        names = [file["id"] for each in path for file in each.files]
        files = await self._store.read(rows.get_file_texts, names) if names else {}
        for each in path:
            pictures = [file["id"] for file in each.files if file["kind"] == PICTURE] if with_pictures else []
            picture_urls = tuple([await self._attachments.picture_data_url(picture) for picture in pictures])
            role: Literal["user", "assistant"] = "user" if each.role == "user" else "assistant"
            turns.append(Turn(role=role, text=text_with_files(each, files), pictures=picture_urls))
        if message.text:
            turns.append(Turn(role="assistant", text=message.text))
        return turns

    async def generate_answer(self, message: Message, answer: GrowingAnswer) -> None:
        """Have an answer made, and hand on what comes."""
        target = await self._targets.find(message.model or "")
        request = Chat(
            turns=tuple(await self.turns(message, target.supports_pictures)), sampling=parse_sampling(self.sampling),
            seed=derived_seed("chat", message.id, len(message.text)), trims=True,
        )  # fmt: skip
        async with aclosing(target.answer(request, self.id, answer.on_load_progress)) as events:
            async for event in events:
                await answer.handle_event(event)

    def publish(self, kind: str, **data: Any) -> None:
        """Tell everybody who looks at the room."""
        self._hub.publish(self.topic, kind, {"type": kind, "seq": self.last_event_number + 1, **data})

    def publish_message(self, message: Message) -> None:
        """Tell all of a message again, because what was shown of it has changed."""
        self.publish("message", message=self._message_json(message), head=self.head)

    async def save_text(self, message: Message) -> None:
        values = {"text": message.text, "folded": fold_text(message.text)}
        await self._store.write(rows.update_message, message.id, values)


def _require_within_limit(text: str) -> None:
    """Raises Invalid for more than one message may hold."""
    if len(text) > PROMPT_LIMIT:
        raise Invalid(
            f"text: the message has {len(text):,} characters; the limit is {PROMPT_LIMIT:,}.", field="text",
            code="too_long", next_step="Attach the text as a file, or send it in parts.",
        )  # fmt: skip


def text_with_files(message: Message, file_texts: dict[str, str]) -> str:
    """A message as the model reads it: the text of its files (by their ids) first, each under its name."""
    parts = []
    for each in message.files:
        if each["kind"] == PICTURE:
            continue
        text = file_texts.get(each["id"], "")
        fence = "```"
        while fence in text:
            fence += "`"
        parts.append(f"{each['name']}:\n{fence}\n{text}\n{fence}")
    return "\n\n".join([*parts, message.text] if message.text else parts)


def parse_sampling(given: dict[str, Any]) -> Sampling:
    """How a room's answers are drawn. Raises Invalid."""
    try:
        return Sampling.model_validate(DEFAULT_SAMPLING.model_dump() | given)
    except ValidationError as error:
        raise invalid_from(error, prefix="sampling") from None


def make_title(text: str) -> str:
    """The first words of a message."""
    line = next((line.strip("#>*-` \t") for line in text.splitlines() if line.strip("#>*-` \t")), "")
    if len(line) <= MAX_TITLE_LENGTH:
        return line
    return line[:MAX_TITLE_LENGTH].rsplit(" ", 1)[0].rstrip(",;:. ") + "…"


def _new_id(kind: str) -> str:
    return f"{kind}{secrets.token_hex(8)}"
