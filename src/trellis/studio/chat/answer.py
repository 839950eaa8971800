"""One answer in progress: its text, rendered blocks and usage, stored as it grows."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any, Protocol

from ...markdown import block_to_html, needs_full_render, text_to_html, thought_to_html
from ...markdown_blocks import THINK_OPEN, BlockSplitter
from ...messages import AnswerDone, Event, Progress, PromptRead, QueuePosition, TextDelta
from ..throughput import tokens_per_second
from .message import Message

SAVE_SECONDS, SAVE_CHARACTERS = 2.0, 4096
"""How often an answer in progress is stored: a crash loses no more of it."""

INLINE_RENDER_LIMIT = 500
"""Blocks of up to this many characters are rendered on the event loop; longer ones, and code, in a thread."""

CODE_FENCE = re.compile(r"^\s*(```|~~~)", re.MULTILINE)

USAGE_FIELDS = (
    "prompt_tokens", "completion_tokens", "time_to_first_token_ms", "engine_to_first_token_ms", "tokens_per_second",
    "context_used", "context_length", "warm_tokens", "left_out",
)  # fmt: skip
"""The measurements of an answer."""


class AnswerRoom(Protocol):
    """What an answer needs of its room."""

    async def save_text(self, message: Message) -> None:
        """Store the text so far."""

    def publish(self, kind: str, **data: Any) -> None:
        """Publish an event to everybody in the room."""

    def publish_message(self, message: Message) -> None:
        """Publish the whole message again, because what was already shown has changed."""


class GrowingAnswer:
    """Collects the events of one answer, publishes them, and stores the text from time to time."""

    def __init__(self, room: AnswerRoom, message: Message) -> None:
        self._room, self._message = room, message
        self._blocks = BlockSplitter()
        self._started = time.monotonic()
        self._first_token_time = self._last_token_time = 0.0
        self._tokens = self._tokens_at_first = 0
        self._prompt_info: PromptRead | None = None
        self._engine_first_token_seconds: float | None = None
        self._engine_decode_seconds: float | None = None
        """Seconds from the first token to the last, by the clock of the engine."""
        self._saved_length, self._saved_at = len(message.text), self._started
        self._text_parts = [message.text] if message.text else []
        self._length = len(message.text)
        self._pending_blocks: list[str] = []
        """Complete blocks that are not published yet."""
        self._folded_length = 0
        """Characters folded as a thought that had no opening tag: only its end shows what it was."""

    async def render_start(self) -> None:
        """Render the blocks of an answer that is continued."""
        if self._message.text:
            self._pending_blocks += self._blocks.feed(self._message.text)
            await self._publish_blocks()

    def on_load_progress(self, progress: Progress) -> None:
        self._room.publish(
            "progress",
            message=self._message.id,
            stage=progress.stage,
            fraction=progress.fraction,
            told=progress.message,
        )

    async def handle_event(self, event: Event) -> None:
        match event:
            case QueuePosition():
                self._publish_progress("queued", 0.0, place=event.place)
            case PromptRead():
                self._prompt_info = event
                if event.in_thought and not self._length:  # a closing tag will come: add the opening one
                    await self._append_text(f"{THINK_OPEN}\n")
                read_fraction = event.read / max(event.prompt_tokens, 1)
                self._publish_progress("prompt", read_fraction, left_out=event.left_out)
            case TextDelta():
                now = time.monotonic()
                self._first_token_time, self._last_token_time = self._first_token_time or now, now
                self._tokens_at_first = self._tokens_at_first or event.tokens
                self._tokens = event.tokens
                if text := event.text.replace("\x00", ""):  # the database cannot store NUL
                    await self._append_text(text)
            case AnswerDone():
                self._message.finish = event.finish
                self._tokens = event.tokens
                self._engine_first_token_seconds = event.seconds_to_first
                self._engine_decode_seconds = event.seconds - event.seconds_to_first

    async def _append_text(self, text: str) -> None:
        self._room.publish("delta", message=self._message.id, text=text, at=self._length)
        self._text_parts.append(text)
        self._length += len(text)
        self._pending_blocks += self._blocks.feed(text)
        await self._publish_blocks()
        is_save_due = (
            time.monotonic() - self._saved_at > SAVE_SECONDS or self._length - self._saved_length > SAVE_CHARACTERS
        )
        if is_save_due:
            self.join_text()
            self._saved_length, self._saved_at = self._length, time.monotonic()
            await self._room.save_text(self._message)

    async def _publish_blocks(self) -> None:
        """Publish the HTML of complete blocks, each once. Where this is cancelled, `finish` publishes the rest."""
        if self._blocks.implied_thought_length > self._folded_length:
            await self._fold_thought(self._blocks.implied_thought_length)
        while self._pending_blocks:
            block = self._pending_blocks[0]
            is_quick = len(block) <= INLINE_RENDER_LIMIT and not CODE_FENCE.search(block)
            html = block_to_html(block) if is_quick else await asyncio.to_thread(block_to_html, block)
            self._pending_blocks.pop(0)
            self.join_text()
            self._message.html = (self._message.html or "") + html
            self._message.rendered_length += len(block)
            self._room.publish("block", message=self._message.id, html=html, shown=self._message.rendered_length)

    async def _fold_thought(self, characters: int) -> None:
        """Fold the beginning, which turned out to be a thought."""
        self.join_text()
        end, later_blocks = self._blocks.consumed, []
        for piece in reversed(self._pending_blocks):
            end -= len(piece)
            if end >= characters:
                later_blocks.append(piece)
        self._message.html = await asyncio.to_thread(thought_to_html, self._message.text[:characters])
        self._message.rendered_length, self._folded_length, self._pending_blocks = (
            characters,
            characters,
            later_blocks[::-1],
        )
        self._room.publish_message(self._message)

    async def finish(self) -> None:
        """Publish the last block, render the whole text again where that changes it, and set the usage."""
        self.join_text()
        self._pending_blocks += self._blocks.flush()
        await self._publish_blocks()
        self._message.html = self._message.html or ""
        if needs_full_render(self._message.text):
            html = await asyncio.to_thread(text_to_html, self._message.text)
            if html != self._message.html:
                self._message.html = html
                self._room.publish_message(self._message)
        self._message.usage = self._usage()

    def join_text(self) -> None:
        if len(self._text_parts) > 1:
            self._text_parts = ["".join(self._text_parts)]
        self._message.text = self._text_parts[0] if self._text_parts else ""

    def _publish_progress(self, stage: str, fraction: float, **more: Any) -> None:
        self._room.publish("progress", message=self._message.id, stage=stage, fraction=fraction, **more)

    def _usage(self) -> dict[str, Any]:
        prompt_info = self._prompt_info
        if self._engine_decode_seconds is not None:  # the engine's clock: events that queued up arrive all at once
            decoded_tokens, decode_seconds = self._tokens - 1, self._engine_decode_seconds
        else:
            decoded_tokens, decode_seconds = (
                self._tokens - self._tokens_at_first,
                self._last_token_time - self._first_token_time,
            )
        return {
            "prompt_tokens": prompt_info.prompt_tokens if prompt_info else None,
            "completion_tokens": self._tokens,
            "time_to_first_token_ms": round((self._first_token_time - self._started) * 1000, 1)
            if self._first_token_time
            else None,
            "engine_to_first_token_ms": round(self._engine_first_token_seconds * 1000, 1)
            if self._engine_first_token_seconds
            else None,
            "tokens_per_second": tokens_per_second(decoded_tokens, decode_seconds),
            "context_used": prompt_info.prompt_tokens + self._tokens
            if prompt_info and prompt_info.prompt_tokens
            else None,
            "context_length": prompt_info.context_length if prompt_info and prompt_info.context_length else None,
            "warm_tokens": prompt_info.warm if prompt_info else None,
            "left_out": prompt_info.left_out if prompt_info else None,
        }
