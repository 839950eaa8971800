"""The answers in progress of one room: a task for each, which asks its chat target and stores what comes."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import aclosing
from typing import Literal

from ...errors import EngineDied, EngineStopped, TrellisError, internal_error
from ...messages import Chat, Turn, derived_seed
from ...store import rooms as rows
from ...store.store import Store
from .answer import GrowingAnswer
from .attachments import PICTURE, Attachments
from .message import Message
from .room_state import RoomState, parse_sampling
from .targets import ChatTargets

log = logging.getLogger(__name__)


class AnswerTasks:
    """Starts, stops and finishes the answers of a room. Every answer that starts ends with an event, whatever fails."""

    def __init__(self, store: Store, targets: ChatTargets, attachments: Attachments, room: RoomState) -> None:
        self._store, self._targets, self._attachments, self._room = store, targets, attachments, room
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping_ids: set[str] = set()
        self._finishing_tasks: set[asyncio.Task[None]] = set()

    async def start(self, message: Message) -> None:
        """Start to answer. The message is in the store, in state `growing`."""
        growing_answer = self._room.growing_answers[message.id] = GrowingAnswer(self._room, message)
        self._tasks[message.id] = asyncio.create_task(self._run(message, growing_answer), name=f"answer {message.id}")
        await asyncio.sleep(0)  # a task that is cancelled before its first step would never publish its end

    async def stop(self, message_id: str | None) -> None:
        """Stop one answer, or all. Returns when they are stored."""
        tasks = [task for each, task in self._tasks.items() if message_id in (None, each)]
        self._stopping_ids.update(each for each in self._tasks if message_id in (None, each))
        for task in tasks:
            task.cancel()
        await self.wait_until_stored(tasks)

    def cancel_all(self) -> list[asyncio.Task[None]]:
        """Interrupt all answers. `wait_until_stored` waits for their end."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        return tasks

    async def wait_until_stored(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Wait until cancelled answers are stored."""
        if tasks:
            await asyncio.wait(tasks)
        while self._finishing_tasks:
            await asyncio.wait(set(self._finishing_tasks))

    async def _run(self, message: Message, growing_answer: GrowingAnswer) -> None:
        try:
            await growing_answer.render_start()
            await self._generate(message, growing_answer)
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
        finishing = asyncio.create_task(self._finish(message, growing_answer))
        self._finishing_tasks.add(finishing)
        finishing.add_done_callback(self._finishing_tasks.discard)
        await asyncio.shield(finishing)

    async def _finish(self, message: Message, growing_answer: GrowingAnswer) -> None:
        """Store how an answer ended, then publish it. The answer ends even when storing fails."""
        try:
            await growing_answer.finish()
            await self._store.write(rows.update_message, message.id, message.to_row())
        except (
            TrellisError
        ) as error:  # a full disk: the text is on the screens, and the error says that it is not stored
            message.error = error.as_json()
        except Exception as error:
            log.exception("the end of an answer could not be written down")
            message.error = TrellisError(
                f"The end of this answer couldn't be saved: {type(error).__name__}.", code="internal",
                next_step="Copy what you need, then regenerate.",
            ).as_json()  # fmt: skip
        finally:
            self._tasks.pop(message.id, None)
            self._room.growing_answers.pop(message.id, None)
            self._stopping_ids.discard(message.id)
        if message.error:
            self._room.publish(
                "error", message=message.id, error=message.error, state=message.state, usage=message.usage
            )
        elif message.state == "done":
            self._room.publish("done", message=message.id, finish=message.finish, usage=message.usage)
        else:
            self._room.publish("stopped", message=message.id, state=message.state, usage=message.usage)

    async def _turns(self, message: Message, with_pictures: bool = False) -> list[Turn]:
        """Return the conversation that an answer continues, with its own text so far; pictures on request."""
        turns = [Turn(role="system", text=self._room.system)] if self._room.system else []
        path = self._room.path(message.parent)
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

    async def _generate(self, message: Message, answer: GrowingAnswer) -> None:
        """Ask the chat target, and pass its events on."""
        target = await self._targets.find(message.model or "")
        request = Chat(
            turns=tuple(await self._turns(message, target.supports_pictures)),
            sampling=parse_sampling(self._room.sampling),
            seed=derived_seed("chat", message.id, len(message.text)),
            trims=True,
        )
        async with aclosing(target.answer(request, self._room.id, answer.on_load_progress)) as events:
            async for event in events:
                await answer.handle_event(event)


def text_with_files(message: Message, file_texts: dict[str, str]) -> str:
    """Return a message as the model reads it: first the text of each file (by id) under its name."""
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
