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

from ...errors import Conflict, EngineDied, EngineStopped, Invalid, NotFound, TrellisError, shorten, unknown
from ...markdown import text_to_html
from ...messages import Chat, Turn, derived_seed
from ...params import Sampling, invalid_from
from ...store import rooms as rows
from ...store.store import Store
from ...text_rules import PROMPT_LIMIT, folded
from ..hub import Hub
from ..jobs import timestamp
from .answer import INLINE, Answering
from .attachments import PICTURE, Attachments
from .message import Message
from .target import Speaker
from .targets import Speakers

log = logging.getLogger(__name__)

TITLE = 60
MOST_MODELS = 4
MOST_MESSAGES = 20_000

FINAL = frozenset({
    "content_filter", "model_refused", "tool_call", "only_thoughts", "option_refused", "prompt_too_long", "cannot_see",
    "wrong_key", "private_address", "forbidden_address", "model_not_found", "not_found",
})  # fmt: skip
"""Errors after which an answer cannot go on: the same would happen again."""

CHAT = Sampling(max_new_tokens=1024)
"""How answers are drawn in a room where nobody has said otherwise."""


class Room:
    """A conversation, which is a tree: who edits or asks again starts a branch. The head is the last message of the
    branch that is looked at."""

    def __init__(
        self,
        store: Store,
        hub: Hub,
        speakers: Speakers,
        attachments: Attachments,
        row: dict[str, Any],
        messages: Sequence[Message],
    ) -> None:
        self._store, self._hub, self._speakers, self._attachments = store, hub, speakers, attachments
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
            self._take(message)
        self._answers: dict[str, asyncio.Task[None]] = {}
        self._growing: dict[str, Answering] = {}
        self._stopping: set[str] = set()
        self._settling: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        self._labels: dict[str, str] = {}
        self._first = int(time.time() * 1000)
        """Numbers of events begin here, so that they grow over restarts too."""
        self.watched = 0
        self.used = time.monotonic()
        self.closed = False

    # ── What people see ────────────────────────────────────────────────────────────────────────────

    @property
    def topic(self) -> str:
        return f"rooms/{self.id}"

    @property
    def last(self) -> int:
        """The number of the newest event."""
        return self._first + self._hub.number(self.topic)

    def place(self, after: int) -> str | None:
        """The hub's name for an event's number; None for one that is from before this room was opened."""
        return self._hub.name(self.topic, after - self._first) if after >= self._first else None

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id, "title": self.title, "system": self.system, "models": self.models,
            "sampling": self.sampling, "head": self.head, "archived": self.archived, "growing": list(self._answers),
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
        found: list[Message] = []
        while head is not None:
            found.append(self.messages[head])
            head = found[-1].parent
        return found[::-1]

    def children(self, message_id: str | None) -> list[Message]:
        return self._children.get(message_id, [])

    def _take(self, message: Message) -> None:
        self.messages[message.id] = message
        self._children.setdefault(message.parent, []).append(message)

    async def whole(self, message: Message) -> dict[str, Any]:
        """A message as events tell it: `html` holds its first `shown` characters."""
        await self._draw([message])
        return self._told(message)

    async def view(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], int]:
        """Some messages as they are at one moment, and the number of the last event before it."""
        await self._draw(messages)
        return [self._told(message) for message in messages], self.last

    async def _draw(self, messages: Sequence[Message]) -> None:
        """Have the text of whole answers as HTML, made once. What people write is shown as they typed it, and of an
        answer that grows the blocks are made by who makes it grow."""
        wanted = [each for each in messages if each.html is None and each.role == "assistant"]
        wanted = [each for each in wanted if each.id not in self._growing]
        texts = [each.text for each in wanted]
        if sum(map(len, texts)) <= INLINE:
            drawn = list(map(text_to_html, texts))
        else:
            drawn = await asyncio.to_thread(lambda: list(map(text_to_html, texts)))
        for message, text, html in zip(wanted, texts, drawn, strict=True):
            if message.html is None and message.id not in self._growing:
                message.html, message.shown = html, len(text)
        for message in messages:
            if message.model and not message.label:
                message.label = await self._label(message.model)

    def _told(self, message: Message) -> dict[str, Any]:
        if growing := self._growing.get(message.id):
            growing.gather()
        return message.as_json() | {"html": message.html or "", "shown": message.shown}

    async def _label(self, model: str) -> str:
        if model not in self._labels:
            self._labels[model] = await self._speakers.label(model)
        return self._labels[model]

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
            if known := self.said(request):
                return known
            self._require_open()
            given = await self._files(files)
            _require_short(text)
            if not text.strip() and not given:
                raise Invalid("text: is empty.", field="text", next_step="Write something, or add a file.")
            before = self._parent(parent)
            if sampling:
                sampling_from(sampling)
            message = Message(_new("m"), self.id, before, "user", text, files=given, request=request)
            return await self._say(message, models, sampling)

    async def edit(self, message_id: str, text: str, request: str) -> Message:
        """Say something else in place of a message: another branch, which is answered by whom the room has chosen. An
        answer that is edited stays as it is written."""
        async with self._lock:
            if known := self.said(request):
                return known
            self._require_open()
            old = self.message(message_id)
            _require_short(text)
            if not text.strip():
                raise Invalid("text: is empty.", field="text", next_step="Write something.")
            if old.role == "user":
                message = Message(_new("m"), self.id, old.parent, "user", text, files=old.files, request=request)
                return await self._say(message, (), None)
            message = Message(
                _new("m"), self.id, old.parent, "assistant", text, old.model, finish="edited", request=request
            )
            await self._add([message], message.id)
            return message

    async def regenerate(self, message_id: str, request: str, model: str | None = None) -> Message:
        """Have a message answered once more, beside the answer that there is."""
        async with self._lock:
            if known := self.said(request):
                return known
            self._require_open()
            old = self.message(message_id)
            asked = old if old.role == "user" else self.message(old.parent or "")
            chosen = (await self._who_answers(model, old)).exactly
            if any(file["kind"] == PICTURE for file in asked.files):
                await self._speakers.require_seeing([chosen])
            answer = Message(
                _new("m"), self.id, asked.id, "assistant", "", chosen, state="growing", request=request
            )  # fmt: skip
            await self._add([answer], answer.id)
            await self._begin(answer)
            return answer

    async def go_on(self, message_id: str) -> None:
        """Have an answer that broke off, was stopped or was cut go on where it ended."""
        async with self._lock:
            message = self.message(message_id)
            if message.role != "assistant" or message.id in self._answers:
                raise Conflict(
                    "Only answers can be continued." if message.role != "assistant"
                    else "This answer is still being generated.",
                    code="not_now", next_step="Wait until it is done.",
                )  # fmt: skip
            self._require_open()
            await self._store.write(rows.change_message, message.id, {"state": "growing", "error": None})
            message.state, message.error, message.finish = "growing", None, None
            message.html, message.shown = None, 0
            await self._begin(message)
            self.publish("message", message=await self.whole(message), head=self.head)

    async def _who_answers(self, model: str | None, old: Message) -> Speaker:
        """Who was asked for, else who answered before, else (it is gone) whom the room has chosen. Raises NotFound."""
        if model is None and old.model:
            with suppress(NotFound):
                return await self._speakers.find(old.model)
        return await self._speakers.find(model or (self.models or ["demo"])[0])

    async def can_go_on(self, message: Message) -> bool:
        """Whether an answer broke off or was cut, and going on with it can work."""
        cut = message.state in ("interrupted", "stopped", "failed") or message.finish == "length"
        if not cut or message.role != "assistant" or message.id in self._answers:
            return False
        if message.error and message.error["code"] in FINAL:
            return False
        usage = message.usage or {}
        full = (usage.get("context_used") or 0) >= (usage.get("context_length") or float("inf"))
        if full and len(self.path(message.parent)) < 2:  # no earlier messages that could be left out
            return False
        try:
            await self._speakers.find(message.model or "")
        except TrellisError:
            return False
        return True

    async def stop(self, message_id: str | None = None) -> None:
        """Stop an answer, or all that grow. Returns when it has been written down."""
        tasks = [task for each, task in self._answers.items() if message_id in (None, each)]
        self._stopping.update(each for each in self._answers if message_id in (None, each))
        for task in tasks:
            task.cancel()
        await self._until_settled(tasks)

    async def choose(self, message_id: str) -> None:
        """Look at the branch that goes through a message, up to what was said last there."""
        async with self._lock:
            self._require_here()
            message = self.message(message_id)
            below = message
            while children := self.children(below.id):
                below = children[-1]
            self.head = below.id
            await self._store.write(rows.change_room, self.id, {"head": self.head})
            self.publish("message", message=await self.whole(message), head=self.head)

    async def rate(self, message_id: str, rating: int) -> None:
        """Call an answer good (1), bad (-1) or neither (0)."""
        async with self._lock:
            self._require_here()
            message = self.message(message_id)
            if message.role != "assistant" or rating not in (-1, 0, 1):
                raise Invalid("rating: must be -1, 0 or 1, for an answer.", field="rating", next_step="Rate an answer.")
            message.rating = rating
            await self._store.write(rows.change_message, message.id, {"rating": rating})
            self.publish("message", message=await self.whole(message), head=self.head)

    async def change(
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
            self._require_here()
            values: dict[str, Any] = {}
            if title is not None:
                values |= {"title": title, "named": 1, "folded": folded(title)}
            if system is not None:
                values["system"] = system
            if models is not None:
                values["models"] = await self._checked(models)
            if sampling is not None:
                sampling_from(sampling)
                values["sampling"] = sampling
            if archived is not None:
                values["archived"] = int(archived)
            if values:
                await self._store.write(rows.change_room, self.id, values)
                for name, value in values.items():
                    if name != "folded":
                        setattr(self, name, bool(value) if name in ("named", "archived") else value)
                self.publish("room", room=self.as_json())

    async def close(self, reason: str | None = None) -> None:
        """Break off what grows, which is written down as far as it has come."""
        async with self._lock:  # what is being said is said first
            self.closed = True
            tasks = list(self._answers.values())
            for task in tasks:
                task.cancel()
        await self._until_settled(tasks)
        if reason:
            self.publish("closed", reason=reason)
        self._hub.end(self.topic)

    async def _until_settled(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Until answers that were cancelled have been written down."""
        if tasks:
            await asyncio.wait(tasks)
        while self._settling:
            await asyncio.wait(set(self._settling))

    @property
    def idle(self) -> bool:
        return not self._answers and self.watched == 0 and not self._lock.locked()

    # ── How it is said ─────────────────────────────────────────────────────────────────────────────

    def said(self, request: str) -> Message | None:
        """What an action has said before, if it has."""
        return next((message for message in self.messages.values() if message.request == request), None)

    def _require_here(self) -> None:
        if self.closed:
            raise Conflict("This chat was closed.", code="closed", next_step="Reload the page.")

    def _require_open(self) -> None:
        self._require_here()
        if len(self.messages) >= MOST_MESSAGES:
            raise Conflict(
                f"This chat has {len(self.messages):,} messages, which is the limit.", code="room_full",
                next_step="Start a new chat.",
            )  # fmt: skip

    def _parent(self, parent: str | None) -> str | None:
        """What a new message comes after: the head, where nobody says otherwise. Raises NotFound or Conflict."""
        before = self.message(parent) if parent else self.messages.get(self.head or "")
        if before is None:
            return None
        if before.role == "user":
            raise Conflict(
                "The last message has no answer yet.",
                code="not_now",
                next_step="Generate its answer first, or edit it.",
            )
        if before.id in self._answers:
            raise Conflict(
                "The answer is still being generated.", code="not_now", next_step="Wait until it is done, or stop it."
            )  # fmt: skip
        return before.id

    async def _checked(self, models: Sequence[str]) -> list[str]:
        names = list(dict.fromkeys(models))
        if not 1 <= len(names) <= MOST_MODELS:
            raise Invalid(
                f"models: choose 1 to {MOST_MODELS}, got {len(names)}.", field="models",
                next_step="Choose fewer." if names else "Choose one.",
            )  # fmt: skip
        return [(await self._speakers.find(name)).name for name in names]

    async def file(self, file_id: str) -> dict[str, Any]:
        """A file of this room. Raises NotFound."""
        found = next((row for row in await self._store.read(rows.get_files, self.id) if row["id"] == file_id), None)
        if found is None:
            raise NotFound(
                f"There is no file “{shorten(file_id)}” in this chat.", field="file", next_step="Add it again."
            )
        return found

    async def _files(self, wanted: Sequence[str]) -> list[dict[str, Any]]:
        if not wanted:
            return []
        there = {row["id"]: row for row in await self._store.read(rows.get_files, self.id)}
        if unknown := [each for each in wanted if each not in there]:
            raise NotFound(
                f"There is no file “{shorten(unknown[0])}” in this chat.", field="files", next_step="Add it again."
            )
        return [{name: there[each][name] for name in ("id", "name", "kind", "bytes")} for each in wanted]

    async def _say(self, message: Message, models: Sequence[str], sampling: dict[str, Any] | None) -> Message:
        chosen = await self._checked(models or self.models or ["demo"])
        exactly = [(await self._speakers.find(name)).exactly for name in chosen]
        if any(file["kind"] == PICTURE for file in message.files):
            await self._speakers.require_seeing(chosen)
        group = _new("g") if len(chosen) > 1 else None
        answers = [
            Message(_new("m"), self.id, message.id, "assistant", "", each, group=group, state="growing",
                    created=time.time() + 1e-4 * (place + 1))
            for place, each in enumerate(exactly)
        ]  # fmt: skip
        changes: dict[str, Any] = {"models": chosen}
        if sampling is not None:
            changes["sampling"] = sampling
        if not self.named and message.parent is None:
            title = title_of(message.text) or (message.files[0]["name"] if message.files else "")
            changes |= {"title": title, "folded": folded(title)}
        await self._add([message, *answers], answers[0].id, changes)
        self.models, self.title = chosen, changes.get("title", self.title)
        self.sampling = changes.get("sampling", self.sampling)
        if len(changes) > 1:
            self.publish("room", room=self.as_json())
        for answer in answers:
            await self._begin(answer)
        return message

    async def _add(self, messages: Sequence[Message], head: str, changes: dict[str, Any] | None = None) -> None:
        """Write down what was said, then tell it."""
        self.updated = time.time()
        values = {"head": head, "updated": self.updated} | (changes or {})
        await self._store.write(rows.add_messages, self.id, [message.row() for message in messages], values)
        self.head = head
        for message in messages:
            self._take(message)
        for message in messages:
            if message.state == "growing":
                message.html = ""
            self.publish("message", message=await self.whole(message), head=head)

    # ── How it is answered ─────────────────────────────────────────────────────────────────────────

    async def _begin(self, message: Message) -> None:
        answering = self._growing[message.id] = Answering(self, message)
        self._answers[message.id] = asyncio.create_task(self._answer(message, answering), name=f"answer {message.id}")
        await asyncio.sleep(0)  # one that is cancelled before its first step would never say how it ended

    async def _answer(self, message: Message, answering: Answering) -> None:
        try:
            await answering.run()
        except asyncio.CancelledError:
            message.state = "stopped" if message.id in self._stopping else "interrupted"
        except (EngineDied, EngineStopped) as error:
            message.state, message.error = "interrupted", error.as_json()
        except TrellisError as error:
            message.state, message.error = "failed", error.as_json()
        except Exception:
            reference = secrets.token_hex(4)
            log.exception("reference %s: an answer failed", reference)
            message.state, message.error = "failed", unknown(reference).as_json()
        else:
            message.state = "done"
        settling = asyncio.create_task(self._settle(message, answering))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        await asyncio.shield(settling)

    async def _settle(self, message: Message, answering: Answering) -> None:
        """Write down how an answer ended, then tell it. Whatever goes wrong, it has ended."""
        try:
            await answering.finish()
            await self._store.write(rows.change_message, message.id, message.row())
        except TrellisError as error:  # a full disk: what was said is on the screens, and is said not to be kept
            message.error = error.as_json()
        except Exception as error:
            log.exception("the end of an answer could not be written down")
            message.error = TrellisError(
                f"The end of this answer couldn't be saved: {type(error).__name__}.", code="internal",
                next_step="Copy what you need, then regenerate.",
            ).as_json()  # fmt: skip
        finally:
            self._answers.pop(message.id, None)
            self._growing.pop(message.id, None)
            self._stopping.discard(message.id)
        if message.error:
            self.publish("error", message=message.id, error=message.error, state=message.state, usage=message.usage)
        elif message.state == "done":
            self.publish("done", message=message.id, finish=message.finish, usage=message.usage)
        else:
            self.publish("stopped", message=message.id, state=message.state, usage=message.usage)

    async def turns(self, message: Message, sees: bool = False) -> list[Turn]:
        """The conversation that an answer answers, with what it holds already; with its pictures for who sees."""
        said = [Turn(role="system", text=self.system)] if self.system else []
        path = self.path(message.parent)
        names = [file["id"] for each in path for file in each.files]
        files = await self._store.read(rows.texts_of_files, names) if names else {}
        for each in path:
            pictures = [file["id"] for file in each.files if file["kind"] == PICTURE] if sees else []
            shown = tuple([await self._attachments.as_data(picture) for picture in pictures])
            role: Literal["user", "assistant"] = "user" if each.role == "user" else "assistant"
            said.append(Turn(role=role, text=with_files(each, files), pictures=shown))
        if message.text:
            said.append(Turn(role="assistant", text=message.text))
        return said

    async def speak(self, message: Message, answering: Answering) -> None:
        """Have an answer made, and hand on what comes."""
        speaker = await self._speakers.find(message.model or "")
        request = Chat(
            turns=tuple(await self.turns(message, speaker.sees)), sampling=sampling_from(self.sampling),
            seed=derived_seed("chat", message.id, len(message.text)), trims=True,
        )  # fmt: skip
        async with aclosing(speaker.answer(request, self.id, answering.loading)) as events:
            async for event in events:
                await answering.take(event)

    def publish(self, kind: str, **data: Any) -> None:
        """Tell everybody who looks at the room."""
        self._hub.publish(self.topic, kind, {"type": kind, "seq": self.last + 1, **data})

    def tell(self, message: Message) -> None:
        """Tell all of a message again, because what was shown of it has changed."""
        self.publish("message", message=self._told(message), head=self.head)

    async def save(self, message: Message) -> None:
        values = {"text": message.text, "folded": folded(message.text)}
        await self._store.write(rows.change_message, message.id, values)


def _require_short(text: str) -> None:
    """Raises Invalid for more than one message may hold."""
    if len(text) > PROMPT_LIMIT:
        raise Invalid(
            f"text: the message has {len(text):,} characters; the limit is {PROMPT_LIMIT:,}.", field="text",
            code="too_long", next_step="Attach the text as a file, or send it in parts.",
        )  # fmt: skip


def with_files(message: Message, files: dict[str, str]) -> str:
    """A message as the model reads it: the text of its files (by their ids) first, each under its name."""
    parts = []
    for each in message.files:
        if each["kind"] == PICTURE:
            continue
        text = files.get(each["id"], "")
        fence = "```"
        while fence in text:
            fence += "`"
        parts.append(f"{each['name']}:\n{fence}\n{text}\n{fence}")
    return "\n\n".join([*parts, message.text] if message.text else parts)


def sampling_from(given: dict[str, Any]) -> Sampling:
    """How a room's answers are drawn. Raises Invalid."""
    try:
        return Sampling.model_validate(CHAT.model_dump() | given)
    except ValidationError as error:
        raise invalid_from(error, prefix="sampling") from None


def title_of(text: str) -> str:
    """The first words of a message."""
    line = next((line.strip("#>*-` \t") for line in text.splitlines() if line.strip("#>*-` \t")), "")
    if len(line) <= TITLE:
        return line
    return line[:TITLE].rsplit(" ", 1)[0].rstrip(",;:. ") + "…"


def _new(kind: str) -> str:
    return f"{kind}{secrets.token_hex(8)}"
