"""`/v1`: every model and version for the public OpenAI clients, as they are.

What they may ask for and is not here is refused by its name, never passed over in silence.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt
from starlette.responses import JSONResponse, Response, StreamingResponse

from ...errors import EngineError, Invalid, Refused, TrellisError, shorten
from ...messages import (
    AnswerDone,
    Chat,
    Event,
    PromptRead,
    SampledToken,
    TextDelta,
    Turn,
    derived_seed,
    template_kwargs_from,
)
from ...options import Sampling
from ...studio.chat.target import ChatTarget
from ...studio.studio import Studio
from ...text_rules import require_storable
from ..event_streams import SSE_HEADERS
from ..openai_errors import to_openai_error
from .steering import StudioDep

router = APIRouter(prefix="/v1", tags=["openai"])

MAX_TEXT_LENGTH = 1_500_000
MAX_ANSWER_TOKENS = 8192
"""Tokens of one answer at most, and where nobody says how many."""

MAX_CONCURRENT_ANSWERS = 64
"""Answers that one key, or one address without a key, may have made at the same time."""

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "modalities": (["text"],), "response_format": ({"type": "text"},),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({}, []), "echo": (False,), "suffix": ("",),
    "store": (False,), "service_tier": ("auto", "default"), "stop_token_ids": ([],), "bad_words": ([],),
    "use_beam_search": (False,), "length_penalty": (1,), "ignore_eos": (False,), "skip_special_tokens": (True,),
    "best_of": (1,), "include_stop_str_in_output": (False,), "add_generation_prompt": (True,),
    "web_search_options": ({},),
}  # fmt: skip
"""What is not here, with the values at which it asks for nothing."""

IGNORED_FIELDS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""What says something of the request and nothing of the answer."""

IGNORED_MESSAGE_FIELDS = {"name", "reasoning", "reasoning_content"}
"""What clients keep beside the text of a message. Earlier thoughts are not shown to a model again."""

MessageText = Annotated[str, Field(max_length=MAX_TEXT_LENGTH), AfterValidator(require_storable)]
StopString = Annotated[str, Field(min_length=1, max_length=200)]


TemplateVariables = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=100)], StrictBool | StrictInt | StrictFloat | MessageText],
    Field(max_length=50),
]
"""Plain values by name, for a chat template."""


class ContentPart(BaseModel):
    type: str = Field(max_length=40)
    text: MessageText = ""


class ChatMessage(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: MessageText | Annotated[list[ContentPart], Field(max_length=500, fail_fast=True)] | None = None

    def to_turn(self, index: int) -> Turn:
        """Raises Invalid for what is not text."""
        _reject_unsupported_fields(
            self.model_extra, IGNORED_MESSAGE_FIELDS, {"annotations": ([],), "tool_calls": ([],)},
                       f"messages.{index}.")  # fmt: skip
        role: Literal["system", "user", "assistant"] = "system" if self.role == "developer" else self.role
        if not isinstance(self.content, list):
            return Turn(role=role, text=self.content or "")
        for part in self.content:
            if part.type != "text":
                raise Invalid(
                    f"messages.{index}.content: “{shorten(part.type)}” is not supported; only text is.",
                    field=f"messages.{index}.content", code="unsupported_value", next_step="Send only text.",
                )  # fmt: skip
        return Turn(role=role, text="".join(part.text for part in self.content))


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against listeners on the line; taken, and not done."""


class BaseCompletionRequest(BaseModel):
    """What both ways of asking have in common."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    model: str = Field(min_length=1, max_length=300)
    n: int | None = Field(1, ge=1, le=16)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    temperature: float | None = Field(1.0, ge=0, le=5)
    top_p: float | None = Field(1.0, ge=0, le=1)
    min_p: float | None = Field(0.0, ge=0, lt=1)
    top_k: int | None = Field(0, ge=-1, le=10_000_000)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=10)
    min_tokens: int | None = Field(0, ge=0, le=MAX_ANSWER_TOKENS)
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)

    @property
    def answer_token_limit(self) -> int | None:
        return self.max_tokens

    def to_chat(self, seed: int, index: int, **fields: Any) -> Chat:
        """A request for one answer, the one at a place among those to the same question. Each draws by itself: those to
        neighbouring seeds have nothing in common."""
        return Chat(
            sampling=self.sampling(), seed=derived_seed("answer", seed, index), stop=self.stop_strings(),
            top_k=max(self.top_k or 0, 0), repetition_penalty=self.repetition_penalty or 1.0,
            min_tokens=self.min_tokens or 0, **fields,
        )  # fmt: skip

    def sampling(self) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=max(1.0 if self.top_p is None else self.top_p, 1e-6),
            min_p=self.min_p or 0.0,
            max_new_tokens=min(self.answer_token_limit or MAX_ANSWER_TOKENS, MAX_ANSWER_TOKENS),
        )

    def stop_strings(self) -> tuple[str, ...]:
        """What the answers are to stop at."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def reject_unsupported(self) -> None:
        """Raises Invalid for what would be passed over in silence."""
        _reject_unsupported_fields(self.model_extra, IGNORED_FIELDS, NEUTRAL_VALUES)
        if self.stream_options:
            _reject_unsupported_fields(self.stream_options.model_extra, set(), {}, "stream_options.")
        longest = min(self.answer_token_limit or MAX_ANSWER_TOKENS, MAX_ANSWER_TOKENS)
        if (self.min_tokens or 0) > longest:
            raise Invalid(
                f"min_tokens: {self.min_tokens} is more than the limit of {longest} tokens.",
                field="min_tokens", code="invalid_value", next_step="Lower it, or raise max_tokens.",
            )  # fmt: skip


def _reject_unsupported_fields(
    extra: dict[str, Any] | None, ignored: set[str], neutral: Mapping[str, tuple[Any, ...]], prefix: str = ""
) -> None:
    """Raises Invalid, which names the first field that asks for something that is not here. What is null asks for
    nothing."""
    for name, value in (extra or {}).items():
        if value is None or name in ignored or any(value == each for each in neutral.get(name, ())):
            continue
        known = name in neutral
        raise Invalid(
            f"{prefix}{shorten(name)}: {'this is not supported here' if known else 'there is no such parameter here'}, "
            f"got “{shorten(value)}”.",
            field=f"{prefix}{shorten(name)}", code="unsupported_parameter", next_step="Leave it out.",
        )  # fmt: skip


class ChatCompletionRequest(BaseCompletionRequest):
    messages: list[ChatMessage] = Field(min_length=1, max_length=5000, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, le=10_000_000)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: TemplateVariables | None = None

    @property
    def answer_token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(BaseCompletionRequest):
    prompt: (
        MessageText
        | Annotated[list[MessageText | int | list[int]], Field(min_length=1, max_length=10_000, fail_fast=True)]
    ) = ""
    max_tokens: int | None = Field(16, ge=1, le=10_000_000)
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=16)

    def prompts(self) -> list[str]:
        """Raises Invalid for tokens."""
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        found = [text for text in texts if isinstance(text, str)]
        if len(found) < len(texts) or len(found) > 64:
            what = "token ids are not supported, only text" if len(found) < len(texts) else "at most 64 prompts"
            raise Invalid(f"prompt: {what}.", field="prompt", code="unsupported_value", next_step="Send text.")
        return found


@router.get("/models")
async def models(studio: StudioDep) -> dict[str, Any]:
    """Every model and session by the name that the other calls take; a session's steps are `session:<name>@<step>`.
    One whose model is not here any more is not among them."""
    found: dict[str, dict[str, Any]] = {}
    targets = await studio.chat_targets.list_targets()
    present_models = {each["name"] for each in targets if each["kind"] == "model"}
    for each in targets:
        if each["kind"] == "session" and each["model"] not in present_models:
            continue
        name = f"session:{each['session']}" if each["kind"] == "session" else each["name"]
        found.setdefault(
            each["name"] if name in found else name, _model_entry(name if name not in found else each["name"])
        )
    return {"object": "list", "data": list(found.values())}


@router.get("/models/{model:path}")
async def model(model: str, studio: StudioDep) -> dict[str, Any]:
    await studio.chat_targets.find(model)
    return _model_entry(model)


def _model_entry(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "trellis"}


@router.post("/chat/completions")
async def chat_completions(request: Request, body: ChatCompletionRequest, studio: StudioDep) -> Response:
    """Answer a conversation."""
    body.reject_unsupported()
    turns = tuple(each.to_turn(place) for place, each in enumerate(body.messages))
    if sum(len(turn.text) for turn in turns) > MAX_TEXT_LENGTH:
        raise Invalid("messages: too much text.", field="messages", next_step="Send less.")
    top = (body.top_logprobs or 0) if body.logprobs else None
    seed, variables = _seed(body), template_kwargs_from(body.chat_template_kwargs or {})
    chats = [body.to_chat(seed, place, turns=turns, top=top, template_kwargs=variables) for place in range(body.n or 1)]
    return await _respond(request, studio, body, chats, ChatFormat(body.model))


@router.post("/completions")
async def completions(request: Request, body: CompletionRequest, studio: StudioDep) -> Response:
    """Go on with a text, without a chat template."""
    body.reject_unsupported()
    if body.best_of not in (None, body.n or 1):
        raise Invalid("best_of: must equal n.", field="best_of", next_step="Leave it out.")
    seed = _seed(body)
    chats = [
        body.to_chat(seed, place, text=prompt, top=body.logprobs)
        for prompt in body.prompts()
        for place in range(body.n or 1)
    ]
    return await _respond(request, studio, body, chats, CompletionFormat(body.model))


def _seed(body: BaseCompletionRequest) -> int:
    return secrets.randbits(62) if body.seed is None else body.seed % 2**63


class ResponseFormat:
    """How answers are written: whole, or in pieces."""

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
            # Of two tokens that write the same the likelier one is told; they come likeliest first.
            "top_logprobs": [{text: logprob for text, _, logprob in reversed(each.top)} for each in sampled],
            "text_offset": offsets,
        }  # fmt: skip


class StreamedAnswer:
    """One answer as it comes."""

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


async def _respond(
    request: Request, studio: Studio, body: BaseCompletionRequest, chats: list[Chat], response_format: ResponseFormat
) -> Response:
    owner = request.scope.get("trellis.key") or (request.client.host if request.client else "unknown")
    target = await studio.chat_targets.find(body.model)
    if not body.stream:
        async with _limit_concurrency(request, owner, len(chats)):
            answers = await _run_while_connected(request, _collect_answers(target, chats, owner))
        return JSONResponse(response_format.response(answers, _usage(answers)))
    concurrency_limit = _limit_concurrency(request, owner, len(chats))
    await concurrency_limit.__aenter__()
    events = _stream_concurrently(target, chats, owner)
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)

    async def close() -> None:
        await events.aclose()
        await concurrency_limit.__aexit__(None, None, None)

    try:
        first = await anext(events)  # what is wrong with the request is said before the stream begins
    except BaseException:
        await close()
        raise

    async def frames() -> AsyncIterator[str]:
        try:
            async for frame in _sse_frames(first, events, len(chats), response_format, wants_usage):
                yield frame
        finally:
            await close()

    return StreamingResponse(frames(), media_type="text/event-stream", headers=SSE_HEADERS)


async def _collect_answers(target: ChatTarget, chats: list[Chat], owner: str) -> list[StreamedAnswer]:
    answers = [StreamedAnswer() for _ in chats]
    async with aclosing(_stream_concurrently(target, chats, owner)) as events:
        async for place, event in events:
            answers[place].add_event(event)
    return answers


async def _stream_concurrently(
    target: ChatTarget, chats: list[Chat], owner: str
) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of several answers as they come, each with its place. The first error ends all."""
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(maxsize=256)

    async def answer_one(index: int, chat: Chat) -> None:
        try:
            async with aclosing(target.answer(chat, owner, lambda progress: None)) as events:
                async for event in events:
                    await queue.put((index, event))
            await queue.put((index, None))
        except TrellisError as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(answer_one(place, request)) for place, request in enumerate(chats)]
    try:
        unfinished = len(tasks)
        while unfinished:
            place, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                unfinished -= 1
            else:
                yield place, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _sse_frames(
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
        yield _sse_frame(response_format.usage_chunk(_usage(answers)))
    yield "data: [DONE]\n\n"


def _sse_frame(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=True, separators=(',', ':'))}\n\n"


def _usage(answers: list[StreamedAnswer]) -> dict[str, Any]:
    prompt_tokens = max((each.prompt_tokens for each in answers), default=0)
    completion_tokens = sum(each.completion_tokens for each in answers)
    cached_tokens = max((each.cached_tokens for each in answers), default=0)
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }  # fmt: skip


async def _run_while_connected(request: Request, work: Any) -> Any:
    """The result of some work, which is given up when nobody waits for it any more."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=0.5))[0]:
            if await request.is_disconnected():
                raise EngineError("The client disconnected.", code="cancelled", next_step="Ask again.")
        return task.result()
    finally:
        task.cancel()


@asynccontextmanager
async def _limit_concurrency(request: Request, owner: str, count: int) -> AsyncIterator[None]:
    """Raises Refused where one has too many answers made at once."""
    answers_in_progress: Counter[str] = request.app.state.answering
    if answers_in_progress[owner] + count > MAX_CONCURRENT_ANSWERS:
        raise Refused(
            f"You have {answers_in_progress[owner]} answers in progress and asked for {count} more; the "
            f"limit is {MAX_CONCURRENT_ANSWERS}.",
            code="too_many_requests", next_step="Wait until some are done.",
        )  # fmt: skip
    answers_in_progress[owner] += count
    try:
        yield
    finally:
        answers_in_progress[owner] -= count
        if answers_in_progress[owner] <= 0:
            del answers_in_progress[owner]
