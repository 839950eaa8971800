"""Parse responses of OpenAI-compatible servers: server-sent events or one JSON object, in the shapes in use.

Bytes come in, pieces of an answer go out. It does not know addresses, keys or rooms.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import TrellisError, shorten
from ...markdown_blocks import THINK_CLOSE, THINK_OPEN

MAX_LINE_BYTES, MAX_BODY_BYTES = 1_000_000, 4_000_000
"""The limits of one line, and of one response that does not stream."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of reasoning text. Some servers send the same text under two of them."""

PICTURE_PART_TYPES = frozenset({"image", "image_url", "output_image"})


class NotACompletion(Exception):
    """The response is not one of the OpenAI API."""


@dataclass
class CompletionDelta:
    """One piece of an answer; any of its parts may be set."""

    text: str = ""
    thought: str = ""
    refusal: str = ""
    tool: str | None = None
    """The tool that the model calls; empty until its name arrives."""
    finish: str | None = None


class EventStream:
    """The JSON objects of a response, one for each event. `is_done`: the server has sent its end mark."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._data: list[bytes] = []
        self._size = 0
        self._event_name = b""
        self.is_done = False

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """Raise NotACompletion for a response that is unreadable or too long."""
        rest, total, started = bytearray(), 0, False
        async for chunk in self._chunks:
            total += len(chunk)
            rest += chunk
            if not started:
                rest = rest.lstrip(b" \t\r\n\xef\xbb\xbf")
                started = bool(rest)
                if rest.startswith(b"{"):  # not a stream, whatever its header says
                    yield await self._read_object(rest)
                    return
                chunk = bytes(rest)
            lines: list[bytes] = []
            if b"\n" in chunk:  # a line may arrive byte by byte: split only once it is complete
                *lines, last = bytes(rest).split(b"\n")
                rest = bytearray(last)
            if len(rest) > MAX_LINE_BYTES or total > 20 * MAX_BODY_BYTES:
                raise NotACompletion
            for line in lines:
                for event in self._parse_line(line.rstrip(b"\r")):
                    yield event
                if self.is_done:
                    return
        for line in (bytes(rest).rstrip(b"\r"), b""):  # the last event may lack its line break
            for event in self._parse_line(line):
                yield event

    async def _read_object(self, body: bytearray) -> dict[str, Any]:
        async for chunk in self._chunks:
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise NotACompletion
        self.is_done = True
        return _parse_object(body.decode("utf-8-sig", "replace").encode())

    def _parse_line(self, line: bytes) -> Iterator[dict[str, Any]]:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            yield from self._flush()
        elif name == b"event":
            self._event_name = value.strip()
        elif name == b"error":  # older llama.cpp servers
            yield {"error": _parse_object(value)}
        elif name == b"data":
            if value.strip() == b"[DONE]":
                yield from self._flush()
                self.is_done = True
            elif value.strip():
                if len(self._data) == 1 and _parse_json(self._data[0]) is not None:  # no empty line between two events
                    yield from self._flush()
                self._data.append(value)
                self._size += len(value)
                if self._size > MAX_BODY_BYTES:
                    raise NotACompletion
        # Comments (an empty name) and other fields are ignored.

    def _flush(self) -> Iterator[dict[str, Any]]:
        data, name = b"\n".join(self._data), self._event_name
        self._data, self._size, self._event_name = [], 0, b""
        if data:
            found = _parse_object(data)
            yield {"error": found} if name == b"error" and "error" not in found else found


def _parse_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _parse_object(data: bytes) -> dict[str, Any]:
    found = _parse_json(data)
    if not isinstance(found, dict):
        raise NotACompletion
    return found


def error_message(data: dict[str, Any]) -> str | None:
    """Return the error message in an object; None where there is no error."""
    error = data.get("error")
    if not error and "choices" not in data:
        error = data.get("detail") or (data.get("message") if data.get("object") == "error" else None)
    if not error:
        return None
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or error.get("code") or json.dumps(error)
        return str(message)
    return str(error)


def parse_deltas(data: dict[str, Any]) -> Iterator[CompletionDelta]:
    """Yield the pieces of the first answer in an object, streamed or whole."""
    choices = data.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict) and choice.get("index") in (None, 0):
            yield _parse_choice(choice)


def _parse_choice(choice: dict[str, Any]) -> CompletionDelta:
    content = next((choice[name] for name in ("delta", "message") if isinstance(choice.get(name), dict)), choice)
    finish = choice.get("finish_reason")
    delta = CompletionDelta(finish=finish if isinstance(finish, str) and finish else None)
    for part in _content_parts(content.get("content", content.get("text"))):
        kind = part.get("type")
        if kind in ("thinking", "reasoning"):
            delta.thought += _join_text(part.get("thinking", part.get("text")))
        elif kind == "refusal":
            delta.refusal += _join_text(part.get("refusal"))
        elif kind in PICTURE_PART_TYPES:
            delta.text += "(An image, which can't be shown here.)"
        else:
            delta.text += _join_text(part.get("text"))
    delta.thought += next(filter(None, (_join_text(content.get(name)) for name in REASONING_KEYS)), "")
    delta.refusal += _join_text(content.get("refusal"))
    calls = content.get("tool_calls") or (
        [{"function": content["function_call"]}] if content.get("function_call") else []
    )
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        tool_name = function.get("name") if isinstance(function, dict) else None
        delta.tool = delta.tool or (tool_name if isinstance(tool_name, str) else "")
    return delta


def _content_parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"text": content}]
    parts = content if isinstance(content, list) else []
    return [{"text": part} if isinstance(part, str) else part for part in parts if isinstance(part, str | dict)]


def _join_text(value: Any) -> str:
    """Return the text of a string, or of a list of parts."""
    if isinstance(value, list):
        return "".join(_join_text(part.get("text") if isinstance(part, dict) else part) for part in value)
    return value if isinstance(value, str) else ""


class AnswerAssembler:
    """Assembles one answer from its pieces: thoughts in front between tags, then the text."""

    def __init__(self, prefix: str = "") -> None:
        """`prefix` is the text that the answer continues."""
        thought, closed, spoken = prefix.lstrip().partition(THINK_CLOSE)
        self._has_thought = thought.startswith(THINK_OPEN)
        self._is_in_thought = self._has_thought and not closed
        self._has_text = bool(spoken.strip() if self._has_thought else prefix.strip())
        self._is_refused = False
        self._tool: str | None = None
        self._pending_surrogate = ""
        self.length = 0
        """Characters received."""
        self.finish = ""

    def add(self, delta: CompletionDelta) -> str:
        """Add a piece, and return the text that the answer grows by."""
        self.finish = delta.finish or self.finish
        if delta.tool is not None:
            self._tool = self._tool or delta.tool
        text = ""
        if delta.thought:
            if not self._is_in_thought and not self._has_text:
                text, self._is_in_thought = f"{THINK_OPEN}\n", True
            text += delta.thought.replace(THINK_CLOSE, "")
            self._has_thought = True
        if new_text := delta.text + delta.refusal:
            text += self._close_thought() + new_text
            self._has_text = self._has_text or bool(new_text.strip())
            self._is_refused = self._is_refused or bool(delta.refusal.strip())
        return self._clean_text(text)

    @property
    def is_tool_call(self) -> bool:
        return self._tool is not None

    def closing_text(self) -> str:
        """Return the text that ends the answer: the closing tag of an open thought."""
        return self._close_thought()

    def _close_thought(self) -> str:
        if not self._is_in_thought:
            return ""
        self._is_in_thought = False
        return f"\n{THINK_CLOSE}\n\n"

    def _clean_text(self, new_text: str) -> str:
        """Remove NULs and join split surrogate pairs: half a character waits for its other half."""
        text, self._pending_surrogate = self._pending_surrogate + new_text.replace("\x00", ""), ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._pending_surrogate = text[:-1], text[-1]
        self.length += len(text)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def require_complete(self, model: str, server: str, is_done: bool) -> None:
        """Raise TrellisError for an answer that did not end regularly. Its text so far is kept."""
        who_answers = f"“{shorten(model)}” at “{shorten(server)}”"
        if self.finish == "content_filter":
            raise TrellisError(
                f"The content filter of the server “{shorten(server)}” stopped this answer.", code="content_filter",
                next_step="Rephrase your message, or choose another model.",
            )  # fmt: skip
        if self._is_refused:
            raise TrellisError(
                f"{who_answers} refused to answer.", code="model_refused",
                next_step="Rephrase your message, or choose another model.",
            )  # fmt: skip
        if self._tool is not None or self.finish in ("tool_calls", "function_call"):
            called = f"the tool “{shorten(self._tool)}”" if self._tool else "a tool"
            raise TrellisError(
                f"{who_answers} tried to call {called}, but chat has no tools.", code="tool_call",
                next_step="Rephrase your message, or turn tools off on that server.",
            )  # fmt: skip
        if not self.finish and not is_done:
            raise TrellisError(
                f"The server “{shorten(server)}” closed the connection before the answer was complete.",
                code="incomplete_answer", next_step="Continue the answer, or regenerate it.",
            )  # fmt: skip
        if self._has_text:
            return
        if self._has_thought:
            is_length_limit = self.finish == "length"
            raise TrellisError(
                f"{who_answers} reached the token limit while still thinking." if is_length_limit
                else f"{who_answers} stopped after thinking, without an answer.",
                code="only_thoughts",
                next_step="Raise “Max new tokens” in the settings of this chat, then regenerate." if is_length_limit
                else "Regenerate, or choose another model.",
            )  # fmt: skip
        raise TrellisError(
            f"{who_answers} returned an empty answer.", code="empty_answer",
            next_step="Regenerate. If it happens again, check that server's log.",
        )  # fmt: skip
