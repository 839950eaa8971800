"""One answer while it grows: its text, its blocks, its figures, and how much of it is written down."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any, Protocol

from ...markdown import block_to_html, folded_thought, needs_whole, text_to_html
from ...markdown_blocks import THINK, Blocks
from ...messages import Answered, Event, Heard, Progress, Queued, Spoke
from ..throughput import tokens_per_second
from .message import Message

SAVE_SECONDS, SAVE_CHARACTERS = 2.0, 4096
"""An answer that grows is written down this often: a crash loses no more of it."""

INLINE = 500
"""A block of up to so many characters is rendered at once; a longer one, and code, in another thread."""

CODE = re.compile(r"^\s*(```|~~~)", re.MULTILINE)

FIGURES = (
    "prompt_tokens", "completion_tokens", "time_to_first_token_ms", "engine_to_first_token_ms", "tokens_per_second",
    "context_used", "context_length", "warm_tokens", "left_out",
)  # fmt: skip
"""What is measured of each answer."""


class Place(Protocol):
    """What an answer needs of the room in which it grows."""

    async def speak(self, message: Message, answering: Answering) -> None:
        """Have it made, and hand on what comes."""

    async def save(self, message: Message) -> None:
        """Write down what there is of it."""

    def publish(self, kind: str, **data: Any) -> None:
        """Tell everybody who looks at the room."""

    def tell(self, message: Message) -> None:
        """Tell all of it again, because what was shown of it has changed."""


class Answering:
    """One answer while it grows: its text, its blocks, its figures, and how much of it is written down."""

    def __init__(self, room: Place, message: Message) -> None:
        self._room, self._message = room, message
        self._blocks = Blocks()
        self._started = time.monotonic()
        self._first = self._latest = 0.0
        self._tokens = self._tokens_at_first = 0
        self._heard: Heard | None = None
        self._engine_first: float | None = None
        self._engine_speaking: float | None = None
        """Seconds from the first token to the last, by the clock of who drew them."""
        self._saved, self._saved_at = len(message.text), self._started
        self._pieces = [message.text] if message.text else []
        self._length = len(message.text)
        self._whole: list[str] = []
        """Blocks that are whole and not shown yet."""
        self._folded = 0
        """How many characters are folded as a thought that turned out to be one when it ended."""

    async def run(self) -> None:
        if self._message.text:  # it goes on: its blocks so far are made again
            self._whole += self._blocks.feed(self._message.text)
            await self._show()
        await self._room.speak(self._message, self)

    def loading(self, progress: Progress) -> None:
        self._room.publish(
            "progress",
            message=self._message.id,
            stage=progress.stage,
            fraction=progress.fraction,
            told=progress.message,
        )

    async def take(self, event: Event) -> None:
        match event:
            case Queued():
                self._progress("queued", 0.0, place=event.place)
            case Heard():
                self._heard = event
                if event.in_thought and not self._length:  # its end will come, and must have a beginning
                    await self._grow(f"{THINK}\n")
                share = event.read / max(event.prompt_tokens, 1)
                self._progress("prompt", share, left_out=event.left_out)
            case Spoke():
                now = time.monotonic()
                self._first, self._latest = self._first or now, now
                self._tokens_at_first = self._tokens_at_first or event.tokens
                self._tokens = event.tokens
                if text := event.text.replace("\x00", ""):  # which no text may hold
                    await self._grow(text)
            case Answered():
                self._message.finish = event.finish
                self._tokens = event.tokens
                self._engine_first = event.seconds_to_first
                self._engine_speaking = event.seconds - event.seconds_to_first

    async def _grow(self, text: str) -> None:
        self._room.publish("delta", message=self._message.id, text=text, at=self._length)
        self._pieces.append(text)
        self._length += len(text)
        self._whole += self._blocks.feed(text)
        await self._show()
        due = time.monotonic() - self._saved_at > SAVE_SECONDS or self._length - self._saved > SAVE_CHARACTERS
        if due:
            self.gather()
            self._saved, self._saved_at = self._length, time.monotonic()
            await self._room.save(self._message)

    async def _show(self) -> None:
        """Tell the HTML of blocks that are whole, each once. One that is broken off is made when the answer ends."""
        if self._blocks.implied > self._folded:
            await self._fold(self._blocks.implied)
        while self._whole:
            block = self._whole[0]
            quick = len(block) <= INLINE and not CODE.search(block)
            html = block_to_html(block) if quick else await asyncio.to_thread(block_to_html, block)
            self._whole.pop(0)
            self.gather()
            self._message.html = (self._message.html or "") + html
            self._message.shown += len(block)
            self._room.publish("block", message=self._message.id, html=html, shown=self._message.shown)

    async def _fold(self, characters: int) -> None:
        """Fold the beginning, which turned out to be a thought."""
        self.gather()
        end, later = self._blocks.end, []
        for piece in reversed(self._whole):
            end -= len(piece)
            if end >= characters:
                later.append(piece)
        self._message.html = await asyncio.to_thread(folded_thought, self._message.text[:characters])
        self._message.shown, self._folded, self._whole = characters, characters, later[::-1]
        self._room.tell(self._message)

    async def finish(self) -> None:
        """What is left is a block too, and all is drawn once more where that changes something. Says what it took."""
        self.gather()
        self._whole += self._blocks.rest()
        await self._show()
        self._message.html = self._message.html or ""
        if needs_whole(self._message.text):
            html = await asyncio.to_thread(text_to_html, self._message.text)
            if html != self._message.html:
                self._message.html = html
                self._room.tell(self._message)
        self._message.usage = self._usage()

    def gather(self) -> None:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        self._message.text = self._pieces[0] if self._pieces else ""

    def _progress(self, stage: str, fraction: float, **more: Any) -> None:
        self._room.publish("progress", message=self._message.id, stage=stage, fraction=fraction, **more)

    def _usage(self) -> dict[str, Any]:
        heard = self._heard
        if self._engine_speaking is not None:  # words that waited on their way arrive all at once
            spoken, speaking = self._tokens - 1, self._engine_speaking
        else:
            spoken, speaking = self._tokens - self._tokens_at_first, self._latest - self._first
        return {
            "prompt_tokens": heard.prompt_tokens if heard else None,
            "completion_tokens": self._tokens,
            "time_to_first_token_ms": round((self._first - self._started) * 1000, 1) if self._first else None,
            "engine_to_first_token_ms": round(self._engine_first * 1000, 1) if self._engine_first else None,
            "tokens_per_second": tokens_per_second(spoken, speaking),
            "context_used": heard.prompt_tokens + self._tokens if heard and heard.prompt_tokens else None,
            "context_length": heard.context_length if heard and heard.context_length else None,
            "warm_tokens": heard.warm if heard else None,
            "left_out": heard.left_out if heard else None,
        }
