"""Answers in the shapes of OpenAI's API: whole, or as the chunks of a stream (no I/O)."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from ..errors import EngineError, TrellisError
from ..messages import AnswerDone, Event, PromptRead, SampledToken, TextDelta
from .openai_errors import to_openai_error


class StreamedAnswer:
    """Collects the events of one answer."""

    def __init__(self) -> None:
        self.text_parts: list[str] = []
        self.sampled: list[SampledToken] = []
        self.finish_reason = "stop"
        self.completion_tokens = self.prompt_tokens = self.cached_tokens = 0

    @property
    def text(self) -> str:
        return "".join(self.text_parts)

    def add_event(self, event: Event) -> None:
        match event:
            case PromptRead():
                self.prompt_tokens, self.cached_tokens = event.prompt_tokens, event.warm
            case TextDelta():
                self.text_parts.append(event.text)
                self.sampled += event.drawn
                self.completion_tokens = event.tokens
            case AnswerDone():
                self.finish_reason, self.completion_tokens = event.finish, event.tokens


class ResponseFormat:
    """The format of answers, whole or in chunks."""

    object_type = ""
    chunk_object_type = ""
    id_prefix = ""

    def __init__(self, model: str) -> None:
        self._common_fields = {
            "id": f"{self.id_prefix}{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def response(self, choices: list[StreamedAnswer], usage: dict[str, Any]) -> dict[str, Any]:
        made = [
            {"index": place, "finish_reason": each.finish_reason, "logprobs": self.logprobs(each.sampled, 0)}
            | self.answer_fields(each)
            for place, each in enumerate(choices)
        ]
        return self._common_fields | {"object": self.object_type, "choices": made, "usage": usage}

    def chunk(
        self,
        index: int,
        text: str | None,
        sampled: list[SampledToken],
        text_offset: int,
        finish_reason: str | None,
        is_first: bool = False,
    ) -> dict[str, Any]:
        choice = {"index": index, "finish_reason": finish_reason, "logprobs": self.logprobs(sampled, text_offset)}
        return self._common_fields | {
            "object": self.chunk_object_type,
            "choices": [choice | self.delta_fields(text, is_first)],
        }

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._common_fields | {"object": self.chunk_object_type, "choices": [], "usage": usage}

    def answer_fields(self, answer: StreamedAnswer) -> dict[str, Any]:
        raise NotImplementedError

    def delta_fields(self, text: str | None, is_first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def logprobs(self, sampled: list[SampledToken], text_offset: int) -> dict[str, Any] | None:
        raise NotImplementedError


class ChatFormat(ResponseFormat):
    object_type, chunk_object_type, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def answer_fields(self, answer: StreamedAnswer) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": answer.text, "refusal": None}}

    def delta_fields(self, text: str | None, is_first: bool) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"delta": {"role": "assistant"} | delta if is_first else delta}

    def logprobs(self, sampled: list[SampledToken], text_offset: int) -> dict[str, Any] | None:
        if not sampled:
            return None
        return {
            "content": [
                {
                    "token": each.text, "logprob": each.logprob, "bytes": list(each.bytes),
                    "top_logprobs": [
                        {"token": text, "logprob": logprob, "bytes": list(raw)} for text, raw, logprob in each.top
                    ],
                }
                for each in sampled
            ],
            "refusal": None,
        }  # fmt: skip


class CompletionFormat(ResponseFormat):
    object_type = chunk_object_type = "text_completion"
    id_prefix = "cmpl-"

    def answer_fields(self, answer: StreamedAnswer) -> dict[str, Any]:
        return {"text": answer.text}

    def delta_fields(self, text: str | None, is_first: bool) -> dict[str, Any]:
        return {"text": text or ""}

    def logprobs(self, sampled: list[SampledToken], text_offset: int) -> dict[str, Any] | None:
        if not sampled:
            return None
        offsets = []
        for each in sampled:
            offsets.append(text_offset)
            text_offset += len(each.text)
        return {
            "tokens": [each.text for each in sampled], "token_logprobs": [each.logprob for each in sampled],
            # `top` is sorted by likelihood: of two tokens with the same text the likelier one is kept.
            "top_logprobs": [{text: logprob for text, _, logprob in reversed(each.top)} for each in sampled],
            "text_offset": offsets,
        }  # fmt: skip


async def sse_frames(
    first: tuple[int, Event],
    events: AsyncIterator[tuple[int, Event]],
    count: int,
    response_format: ResponseFormat,
    wants_usage: bool,
) -> AsyncIterator[str]:
    answers = [StreamedAnswer() for _ in range(count)]
    lengths = [0] * count
    has_started = [False] * count

    async def all_events() -> AsyncIterator[tuple[int, Event]]:
        yield first
        async for each in events:
            yield each

    try:
        async for place, event in all_events():
            answer = answers[place]
            answer.add_event(event)
            if isinstance(event, PromptRead) and not has_started[place]:
                has_started[place] = True
                yield _sse_frame(response_format.chunk(place, "", [], 0, None, is_first=True))
            elif isinstance(event, TextDelta):
                yield _sse_frame(response_format.chunk(place, event.text, list(event.drawn), lengths[place], None))
                lengths[place] += len(event.text)
            elif isinstance(event, AnswerDone):
                yield _sse_frame(response_format.chunk(place, None, [], lengths[place], event.finish))
    except TrellisError as error:
        yield _sse_frame(to_openai_error(error, 500 if isinstance(error, EngineError) else 400))
        return
    if wants_usage:
        yield _sse_frame(response_format.usage_chunk(usage_json(answers)))
    yield "data: [DONE]\n\n"


def _sse_frame(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=True, separators=(',', ':'))}\n\n"


def usage_json(answers: list[StreamedAnswer]) -> dict[str, Any]:
    prompt_tokens = max((each.prompt_tokens for each in answers), default=0)
    completion_tokens = sum(each.completion_tokens for each in answers)
    cached_tokens = max((each.cached_tokens for each in answers), default=0)
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }  # fmt: skip
