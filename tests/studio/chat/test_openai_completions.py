"""What OpenAI-compatible servers answer, in every shape that is in use: all is shown, and odd ends are told."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.errors import TrellisError
from trellis.studio.chat.openai_completions import (
    AnswerAssembler,
    EventStream,
    NotACompletion,
    error_message,
    parse_deltas,
)

pytestmark = pytest.mark.anyio


def event(**data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def delta(finish: str | None = None, **said: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": said, "finish_reason": finish}], error=None)


DONE = b"data: [DONE]\n\n"


async def in_pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


async def read(body: bytes, size: int = 10_000, begun: str = "") -> tuple[str, str]:
    """The text that an answer came to, and the code of the error that it ended with (or how it finished)."""
    stream, answer, text = EventStream(in_pieces(body, size)), AnswerAssembler(begun), ""
    async for data in stream:
        if (error := error_message(data)) is not None:
            return text, f"error: {error}"
        for piece in parse_deltas(data):
            text += answer.add(piece)
    text += answer.closing_text()
    try:
        answer.require_complete("model", "server", stream.is_done)
    except TrellisError as told:
        assert told.message.endswith((".", "!"))
        assert told.next_step.endswith(".")
        assert "None" not in told.message
        return text, told.code
    return text, answer.finish


THOUGHT = "<think>\nHm. So.\n</think>\n\n"
SHAPES: dict[str, tuple[bytes, str, str]] = {
    "plain": (delta(content="Hel") + delta(content="lo.") + delta("stop") + DONE, "Hello.", "stop"),
    "error is null": (event(error=None, choices=[{"delta": {"content": "A"}, "finish_reason": "stop"}]), "A", "stop"),
    "error is empty": (event(error={}, choices=[{"delta": {"content": "A"}, "finish_reason": "stop"}]), "A", "stop"),
    "content is a list": (
        delta(content=[{"type": "text", "text": "A"}, {"type": "output_text", "text": "B"}, "C"]) + delta("stop"),
        "ABC", "stop",
    ),
    "thoughts in the content": (
        delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "Hm. So."}]}])
        + delta("stop", content=[{"type": "text", "text": "A"}]),
        THOUGHT + "A", "stop",
    ),
    "a picture": (
        delta("stop", content=[{"type": "image_url", "image_url": {"url": "data:x"}}]),
        "(An image, which can't be shown here.)", "stop",
    ),
    "reasoning_content": (
        delta(reasoning_content="Hm. ") + delta(reasoning_content="So.") + delta(content="A") + delta("stop"),
        THOUGHT + "A", "stop",
    ),
    "reasoning": (delta(reasoning="Hm. So.") + delta(content="A") + delta("stop"), THOUGHT + "A", "stop"),
    "both names of one thought": (
        delta(reasoning="Hm. So.", reasoning_content="Hm. So.") + delta("stop", content="A"), THOUGHT + "A", "stop",
    ),
    "thoughts alone": (delta(reasoning_content="Hm. So.") + delta("stop") + DONE, THOUGHT, "only_thoughts"),
    "thoughts to the end": (delta(reasoning="Hm. So.") + delta("length") + DONE, THOUGHT, "only_thoughts"),
    "a refusal": (delta(refusal="I can't ") + delta(refusal="do that.") + delta("stop"), "I can't do that.",
                  "model_refused"),
    "a refusal as a part": (delta("stop", content=[{"type": "refusal", "refusal": "No."}]), "No.", "model_refused"),
    "a tool call": (
        delta(content=None, tool_calls=[{"index": 0, "function": {"name": "search", "arguments": ""}}])
        + delta("tool_calls"),
        "", "tool_call",
    ),
    "a tool call after words": (
        delta(content="Let me see.") + delta("tool_calls", tool_calls=[{"function": {"arguments": "{}"}}]),
        "Let me see.", "tool_call",
    ),
    "an old function call": (delta("function_call", function_call={"name": "search"}), "", "tool_call"),
    "a content filter": (delta(content="How to") + delta("content_filter") + DONE, "How to", "content_filter"),
    "a content filter at once": (delta("content_filter") + DONE, "", "content_filter"),
    "the last line without its break": (
        delta(content="A") + b'data: {"choices": [{"delta": {"content": "B"}, "finish_reason": "stop"}]}', "AB", "stop",
    ),
    "DONE without a break": (delta(content="A") + b"data: [DONE]", "A", ""),
    "no finish, but DONE": (delta(content="A") + DONE, "A", ""),
    "no finish, no DONE": (delta(content="A"), "A", "incomplete_answer"),
    "a finish, no DONE": (delta("stop", content="A"), "A", "stop"),
    "finish is empty meanwhile": (delta("", content="A"), "A", "incomplete_answer"),
    "nothing said": (delta("stop") + DONE, "", "empty_answer"),
    "blanks said": (delta("stop", content=" \n") + DONE, " \n", "empty_answer"),
    "CRLF": ((delta(content="A") + delta("stop") + DONE).replace(b"\n", b"\r\n"), "A", "stop"),
    "comments and other fields": (
        b": OPENROUTER PROCESSING\n\nid: 1\nretry: 5\n" + delta("stop", content="A") + b":\n\n" + DONE, "A", "stop",
    ),
    "no space, no empty lines": (
        b'data:{"choices":[{"delta":{"content":"A"}}]}\ndata:{"choices":[{"delta":{"content":"B"}}]}\ndata:[DONE]\n',
        "AB", "",
    ),
    "an event over several lines": (
        b'data: {"choices":\ndata: [{"delta": {"content": "A"},\ndata: "finish_reason": "stop"}]}\n\n', "A", "stop",
    ),
    "a byte order mark": (b"\xef\xbb\xbf" + delta("stop", content="A"), "A", "stop"),
    "an error in mid-stream": (
        delta(content="A") + event(error={"message": "out of memory", "code": 500}), "A", "error: out of memory",
    ),
    "an error event": (
        delta(content="A") + b'event: error\ndata: {"message": "out of memory"}\n\n', "A", "error: out of memory",
    ),
    "an error line": (b'error: {"code": 500, "message": "out of memory"}\n\n', "", "error: out of memory"),
    "an error that is text": (event(error="out of memory"), "", "error: out of memory"),
    "an error without a message": (event(error={"message": None, "code": "overloaded"}), "", "error: overloaded"),
    "a detail": (b'{"detail": "Not authenticated"}', "", "error: Not authenticated"),
    "an error object": (b'{"object": "error", "message": "too long", "code": 400}', "", "error: too long"),
    "all at once": (b'{"choices": [{"message": {"content": "A"}, "finish_reason": "stop"}]}', "A", "stop"),
    "all at once, with line breaks": (
        json.dumps({"choices": [{"message": {"content": "A", "reasoning": "Hm. So."}}]}, indent=2).encode(),
        THOUGHT + "A", "",
    ),
    "a text completion": (event(choices=[{"text": "A", "finish_reason": "length"}]) + DONE, "A", "length"),
    "only the first of several": (
        event(choices=[{"index": 1, "delta": {"content": "B"}}, {"index": 0, "delta": {"content": "A"}}]) + DONE, "A",
        "",
    ),
    "numbers where text should be": (delta(content=7, reasoning=5, refusal=[3]) + DONE, "", "empty_answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_an_answer_is_read_in_every_shape_and_however_it_is_cut(name: str, size: int) -> None:
    body, text, end = SHAPES[name]
    assert await read(body, size) == (text, end)


@pytest.mark.parametrize("body", [
    b"data: not json\n\n", b"data: [1, 2]\n\n", b"{", b'{"a": 1}{"b": 2}', b"data: " + b"[" * 20_000 + b"\n\n",
    b"x" * 3_000_000, b"{" + b" " * 5_000_000,
])  # fmt: skip
async def test_what_is_no_answer_is_refused(body: bytes) -> None:
    with pytest.raises(NotACompletion):
        await read(body)


async def test_a_web_page_is_no_answer() -> None:
    stream = EventStream(in_pieces(b"<html>Sign in</html>", 5))
    assert [data async for data in stream] == []
    assert not stream.is_done


async def test_a_thought_that_broke_off_goes_on_and_is_closed_once() -> None:
    more = delta(reasoning=" So.") + delta("stop", content="A")
    assert await read(more, begun="<think>\nHm.") == (" So.\n</think>\n\nA", "stop")
    assert await read(delta("stop", content=" and B"), begun="A") == (" and B", "stop")


async def test_a_tag_inside_of_a_thought_does_not_end_it() -> None:
    text, _ = await read(delta(reasoning="The tag </think> ends it.") + delta("stop", content="A"))
    assert text.count("</think>") == 1


@given(st.binary(max_size=200), st.integers(1, 50))
async def test_no_bytes_break_the_reader(noise: bytes, size: int) -> None:
    for body in (noise, b"data: " + noise, DONE[:6] + noise + b"\n\n" + DONE):
        try:
            text, _ = await read(body, size)
        except NotACompletion:
            continue
        text.encode()


HELD_UP = {
    "letter by letter": (b"data: " + b"x" * 900_000, 1),
    "one object, letter by letter": (b'{"choices": "' + b"x" * 2_000_000, 1),
    "space, letter by letter": (b" " * 2_000_000, 1),
    "an event of many lines": (b"data: [\n" + b"data: 1,\n" * 300_000, 10_000),
}


@pytest.mark.parametrize("what", HELD_UP)
async def test_an_answer_in_small_pieces_takes_no_longer_than_it_is_long(what: str) -> None:
    body, size = HELD_UP[what]
    started = time.process_time()
    with suppress(NotACompletion):
        async for _ in EventStream(in_pieces(body, size)):
            pass
    assert time.process_time() - started < 8


async def test_an_event_has_an_end() -> None:
    with pytest.raises(NotACompletion):
        await read(b"data: [\n" + b"data: 1,\n" * 3_000_000)
