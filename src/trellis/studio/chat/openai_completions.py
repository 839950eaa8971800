"""Read what OpenAI-compatible servers answer: server-sent events or one JSON object, in the many shapes in use.

It does not know addresses, keys or rooms; bytes come in, pieces of an answer go out.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import TrellisError, shorten
from ...markdown_blocks import THINK, THOUGHT

LINE, WHOLE = 1_000_000, 4_000_000
"""Bytes of one line, and of one answer that does not stream, that are read."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Where servers put what a model thinks before it answers. Some send two of these with the same text."""

PICTURES = frozenset({"image", "image_url", "output_image"})


class NotACompletion(Exception):
    """What came is not an answer of the OpenAI API."""


@dataclass
class Piece:
    """One piece of an answer, in any combination of its parts."""

    text: str = ""
    thought: str = ""
    refusal: str = ""
    tool: str | None = None
    """The name of a tool that the model wants called; empty while its name has not come."""
    finish: str | None = None


class Stream:
    """The JSON objects of a response, one for each event. `ended` says whether the server announced the end."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._data: list[bytes] = []
        self._size = 0
        self._name = b""
        self.ended = False

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """Raises NotACompletion for what cannot be read, or is too long."""
        rest, total, started = bytearray(), 0, False
        async for piece in self._pieces:
            total += len(piece)
            rest += piece
            if not started:
                rest = rest.lstrip(b" \t\r\n\xef\xbb\xbf")
                started = bool(rest)
                if rest.startswith(b"{"):  # it does not stream, whatever its header says
                    yield await self._object(rest)
                    return
                piece = bytes(rest)
            lines: list[bytes] = []
            if b"\n" in piece:  # a line may come letter by letter
                *lines, last = bytes(rest).split(b"\n")
                rest = bytearray(last)
            if len(rest) > LINE or total > 20 * WHOLE:
                raise NotACompletion
            for line in lines:
                for found in self._take(line.rstrip(b"\r")):
                    yield found
                if self.ended:
                    return
        for line in (bytes(rest).rstrip(b"\r"), b""):  # the last event may lack its line break
            for found in self._take(line):
                yield found

    async def _object(self, body: bytearray) -> dict[str, Any]:
        async for piece in self._pieces:
            body += piece
            if len(body) > WHOLE:
                raise NotACompletion
        self.ended = True
        return _object(body.decode("utf-8-sig", "replace").encode())

    def _take(self, line: bytes) -> Iterator[dict[str, Any]]:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            yield from self._flush()
        elif name == b"event":
            self._name = value.strip()
        elif name == b"error":  # older llama.cpp servers
            yield {"error": _object(value)}
        elif name == b"data":
            if value.strip() == b"[DONE]":
                yield from self._flush()
                self.ended = True
            elif value.strip():
                if len(self._data) == 1 and _parsed(self._data[0]) is not None:  # no empty line between two events
                    yield from self._flush()
                self._data.append(value)
                self._size += len(value)
                if self._size > WHOLE:
                    raise NotACompletion
        # Comments (an empty name) and other fields say nothing.

    def _flush(self) -> Iterator[dict[str, Any]]:
        data, name = b"\n".join(self._data), self._name
        self._data, self._size, self._name = [], 0, b""
        if data:
            found = _object(data)
            yield {"error": found} if name == b"error" and "error" not in found else found


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _object(data: bytes) -> dict[str, Any]:
    found = _parsed(data)
    if not isinstance(found, dict):
        raise NotACompletion
    return found


def error_of(data: dict[str, Any]) -> str | None:
    """What an object says that went wrong; None where it says nothing of the kind."""
    error = data.get("error")
    if not error and "choices" not in data:
        error = data.get("detail") or (data.get("message") if data.get("object") == "error" else None)
    if not error:
        return None
    if isinstance(error, dict):
        said = error.get("message") or error.get("detail") or error.get("code") or json.dumps(error)
        return str(said)
    return str(error)


def pieces_of(data: dict[str, Any]) -> Iterator[Piece]:
    """The pieces of the first answer in an object, streamed or whole."""
    choices = data.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict) and choice.get("index") in (None, 0):
            yield _piece(choice)


def _piece(choice: dict[str, Any]) -> Piece:
    said = next((choice[name] for name in ("delta", "message") if isinstance(choice.get(name), dict)), choice)
    finish = choice.get("finish_reason")
    piece = Piece(finish=finish if isinstance(finish, str) and finish else None)
    for part in _parts(said.get("content", said.get("text"))):
        kind = part.get("type")
        if kind in ("thinking", "reasoning"):
            piece.thought += _joined(part.get("thinking", part.get("text")))
        elif kind == "refusal":
            piece.refusal += _joined(part.get("refusal"))
        elif kind in PICTURES:
            piece.text += "(An image, which can't be shown here.)"
        else:
            piece.text += _joined(part.get("text"))
    piece.thought += next(filter(None, (_joined(said.get(name)) for name in REASONING)), "")
    piece.refusal += _joined(said.get("refusal"))
    calls = said.get("tool_calls") or ([{"function": said["function_call"]}] if said.get("function_call") else [])
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        named = function.get("name") if isinstance(function, dict) else None
        piece.tool = piece.tool or (named if isinstance(named, str) else "")
    return piece


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"text": content}]
    parts = content if isinstance(content, list) else []
    return [{"text": part} if isinstance(part, str) else part for part in parts if isinstance(part, str | dict)]


def _joined(value: Any) -> str:
    """The text of a value: a string, or a list of parts."""
    if isinstance(value, list):
        return "".join(_joined(part.get("text") if isinstance(part, dict) else part) for part in value)
    return value if isinstance(value, str) else ""


class Answer:
    """One answer as it comes: its text, what was thought before it in front, and how it ended."""

    def __init__(self, begun: str = "") -> None:
        """`begun` is the text that the answer goes on with."""
        thought, closed, spoken = begun.lstrip().partition(THOUGHT)
        self._thought = thought.startswith(THINK)
        self._thinks = self._thought and not closed
        self._spoken = bool(spoken.strip() if self._thought else begun.strip())
        self._refused = False
        self._tool: str | None = None
        self._half = ""
        self.length = 0
        """Characters that came."""
        self.finish = ""

    def take(self, piece: Piece) -> str:
        """The text that the answer grows by. Thoughts stand between tags, as models write them themselves."""
        self.finish = piece.finish or self.finish
        if piece.tool is not None:
            self._tool = self._tool or piece.tool
        text = ""
        if piece.thought:
            if not self._thinks and not self._spoken:
                text, self._thinks = f"{THINK}\n", True
            text += piece.thought.replace(THOUGHT, "")
            self._thought = True
        if spoken := piece.text + piece.refusal:
            text += self._end_of_thought() + spoken
            self._spoken = self._spoken or bool(spoken.strip())
            self._refused = self._refused or bool(piece.refusal.strip())
        return self._whole(text)

    @property
    def wants_tool(self) -> bool:
        return self._tool is not None

    def rest(self) -> str:
        """What is left to add when nothing more comes."""
        return self._end_of_thought()

    def _end_of_thought(self) -> str:
        if not self._thinks:
            return ""
        self._thinks = False
        return f"\n{THOUGHT}\n\n"

    def _whole(self, piece: str) -> str:
        """Text without what no text may hold. Half a character waits for its other half."""
        text, self._half = self._half + piece.replace("\x00", ""), ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        self.length += len(text)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def require_good_end(self, model: str, server: str, ended: bool) -> None:
        """Raise TrellisError for an answer that did not end as an answer does: what came of it stays."""
        who = f"“{shorten(model)}” at “{shorten(server)}”"
        if self.finish == "content_filter":
            raise TrellisError(
                f"The content filter of the server “{shorten(server)}” stopped this answer.", code="content_filter",
                next_step="Rephrase your message, or choose another model.",
            )  # fmt: skip
        if self._refused:
            raise TrellisError(
                f"{who} refused to answer.", code="model_refused",
                next_step="Rephrase your message, or choose another model.",
            )  # fmt: skip
        if self._tool is not None or self.finish in ("tool_calls", "function_call"):
            called = f"the tool “{shorten(self._tool)}”" if self._tool else "a tool"
            raise TrellisError(
                f"{who} tried to call {called}, but chat has no tools.", code="tool_call",
                next_step="Rephrase your message, or turn tools off on that server.",
            )  # fmt: skip
        if not self.finish and not ended:
            raise TrellisError(
                f"The server “{shorten(server)}” closed the connection before the answer was complete.",
                code="incomplete_answer", next_step="Continue the answer, or regenerate it.",
            )  # fmt: skip
        if self._spoken:
            return
        if self._thought:
            longest = self.finish == "length"
            raise TrellisError(
                f"{who} reached the token limit while still thinking." if longest
                else f"{who} stopped after thinking, without an answer.",
                code="only_thoughts",
                next_step="Raise “Max new tokens” in the settings of this chat, then regenerate." if longest
                else "Regenerate, or choose another model.",
            )  # fmt: skip
        raise TrellisError(
            f"{who} returned an empty answer.", code="empty_answer",
            next_step="Regenerate. If it happens again, check that server's log.",
        )  # fmt: skip
