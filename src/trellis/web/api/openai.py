"""`/v1`: every model and version for the public OpenAI clients, as they are.

What they may ask for and is not here is refused by its name, never passed over in silence.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt
from starlette.responses import JSONResponse, Response, StreamingResponse

from ...errors import EngineError, Invalid, Refused, TrellisError, shorten
from ...messages import Answered, Chat, Drawn, Event, Heard, Spoke, Turn, derived_seed, template_kwargs_from
from ...params import Sampling
from ...studio.chat.target import Speaker
from ...studio.studio import Studio
from ...text_rules import storable
from ..event_streams import HEADERS
from ..openai_errors import as_openai
from .steering import OfStudio

router = APIRouter(prefix="/v1", tags=["openai"])

MOST_TEXT = 1_500_000
LONGEST = 8192
"""Tokens of one answer at most, and where nobody says how many."""

AT_ONCE = 64
"""Answers that one key, or one address without a key, may have made at the same time."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "modalities": (["text"],), "response_format": ({"type": "text"},),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({}, []), "echo": (False,), "suffix": ("",),
    "store": (False,), "service_tier": ("auto", "default"), "stop_token_ids": ([],), "bad_words": ([],),
    "use_beam_search": (False,), "length_penalty": (1,), "ignore_eos": (False,), "skip_special_tokens": (True,),
    "best_of": (1,), "include_stop_str_in_output": (False,), "add_generation_prompt": (True,),
    "web_search_options": ({},),
}  # fmt: skip
"""What is not here, with the values at which it asks for nothing."""

HARMLESS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""What says something of the request and nothing of the answer."""

HARMLESS_IN_MESSAGES = {"name", "reasoning", "reasoning_content"}
"""What clients keep beside the text of a message. Earlier thoughts are not shown to a model again."""

Said = Annotated[str, Field(max_length=MOST_TEXT), AfterValidator(storable)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


Variables = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=100)], StrictBool | StrictInt | StrictFloat | Said],
    Field(max_length=50),
]
"""Plain values by name, for a chat template."""


class Part(BaseModel):
    type: str = Field(max_length=40)
    text: Said = ""


class OneMessage(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: Said | Annotated[list[Part], Field(max_length=500, fail_fast=True)] | None = None

    def turn(self, place: int) -> Turn:
        """Raises Invalid for what is not text."""
        _refuse_others(self.model_extra, HARMLESS_IN_MESSAGES, {"annotations": ([],), "tool_calls": ([],)},
                       f"messages.{place}.")  # fmt: skip
        role: Literal["system", "user", "assistant"] = "system" if self.role == "developer" else self.role
        if not isinstance(self.content, list):
            return Turn(role=role, text=self.content or "")
        for part in self.content:
            if part.type != "text":
                raise Invalid(
                    f"messages.{place}.content: “{shorten(part.type)}” is not supported; only text is.",
                    field=f"messages.{place}.content", code="unsupported_value", next_step="Send only text.",
                )  # fmt: skip
        return Turn(role=role, text="".join(part.text for part in self.content))


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against listeners on the line; taken, and not done."""


class Asked(BaseModel):
    """What both ways of asking have in common."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    model: str = Field(min_length=1, max_length=300)
    n: int | None = Field(1, ge=1, le=16)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    temperature: float | None = Field(1.0, ge=0, le=5)
    top_p: float | None = Field(1.0, ge=0, le=1)
    min_p: float | None = Field(0.0, ge=0, lt=1)
    top_k: int | None = Field(0, ge=-1, le=10_000_000)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=10)
    min_tokens: int | None = Field(0, ge=0, le=LONGEST)
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)

    @property
    def longest(self) -> int | None:
        return self.max_tokens

    def chat(self, seed: int, place: int, **about: Any) -> Chat:
        """A request for one answer, the one at a place among those to the same question. Each draws by itself: those to
        neighbouring seeds have nothing in common."""
        return Chat(
            sampling=self.sampling(), seed=derived_seed("answer", seed, place), stop=self.stops(),
            top_k=max(self.top_k or 0, 0), repetition_penalty=self.repetition_penalty or 1.0,
            min_tokens=self.min_tokens or 0, **about,
        )  # fmt: skip

    def sampling(self) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=max(1.0 if self.top_p is None else self.top_p, 1e-6),
            min_p=self.min_p or 0.0,
            max_new_tokens=min(self.longest or LONGEST, LONGEST),
        )

    def stops(self) -> tuple[str, ...]:
        """What the answers are to stop at."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def refuse_what_is_not_here(self) -> None:
        """Raises Invalid for what would be passed over in silence."""
        _refuse_others(self.model_extra, HARMLESS, NEUTRAL)
        if self.stream_options:
            _refuse_others(self.stream_options.model_extra, set(), {}, "stream_options.")
        longest = min(self.longest or LONGEST, LONGEST)
        if (self.min_tokens or 0) > longest:
            raise Invalid(
                f"min_tokens: {self.min_tokens} is more than the limit of {longest} tokens.",
                field="min_tokens", code="invalid_value", next_step="Lower it, or raise max_tokens.",
            )  # fmt: skip


def _refuse_others(
    extra: dict[str, Any] | None, harmless: set[str], neutral: Mapping[str, tuple[Any, ...]], where: str = ""
) -> None:
    """Raises Invalid, which names the first field that asks for something that is not here. What is null asks for
    nothing."""
    for name, value in (extra or {}).items():
        if value is None or name in harmless or any(value == each for each in neutral.get(name, ())):
            continue
        known = name in neutral
        raise Invalid(
            f"{where}{shorten(name)}: {'this is not supported here' if known else 'there is no such parameter here'}, "
            f"got “{shorten(value)}”.",
            field=f"{where}{shorten(name)}", code="unsupported_parameter", next_step="Leave it out.",
        )  # fmt: skip


class ChatAsked(Asked):
    messages: list[OneMessage] = Field(min_length=1, max_length=5000, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, le=10_000_000)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: Variables | None = None

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextAsked(Asked):
    prompt: Said | Annotated[list[Said | int | list[int]], Field(min_length=1, max_length=10_000, fail_fast=True)] = ""
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
async def models(studio: OfStudio) -> dict[str, Any]:
    """Every model and session by the name that the other calls take; a session's steps are `session:<name>@<step>`.
    One whose model is not here any more is not among them."""
    found: dict[str, dict[str, Any]] = {}
    everybody = await studio.speakers.everybody()
    here = {each["name"] for each in everybody if each["kind"] == "model"}
    for each in everybody:
        if each["kind"] == "session" and each["model"] not in here:
            continue
        name = f"session:{each['session']}" if each["kind"] == "session" else each["name"]
        found.setdefault(each["name"] if name in found else name, _model(name if name not in found else each["name"]))
    return {"object": "list", "data": list(found.values())}


@router.get("/models/{model:path}")
async def model(model: str, studio: OfStudio) -> dict[str, Any]:
    await studio.speakers.find(model)
    return _model(model)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "trellis"}


@router.post("/chat/completions")
async def chat_completions(request: Request, body: ChatAsked, studio: OfStudio) -> Response:
    """Answer a conversation."""
    body.refuse_what_is_not_here()
    turns = tuple(each.turn(place) for place, each in enumerate(body.messages))
    if sum(len(turn.text) for turn in turns) > MOST_TEXT:
        raise Invalid("messages: too much text.", field="messages", next_step="Send less.")
    top = (body.top_logprobs or 0) if body.logprobs else None
    seed, variables = _seed(body), template_kwargs_from(body.chat_template_kwargs or {})
    asked = [body.chat(seed, place, turns=turns, top=top, template_kwargs=variables) for place in range(body.n or 1)]
    return await _answer(request, studio, body, asked, ChatShape(body.model))


@router.post("/completions")
async def completions(request: Request, body: TextAsked, studio: OfStudio) -> Response:
    """Go on with a text, without a chat template."""
    body.refuse_what_is_not_here()
    if body.best_of not in (None, body.n or 1):
        raise Invalid("best_of: must equal n.", field="best_of", next_step="Leave it out.")
    seed = _seed(body)
    asked = [
        body.chat(seed, place, text=prompt, top=body.logprobs)
        for prompt in body.prompts()
        for place in range(body.n or 1)
    ]
    return await _answer(request, studio, body, asked, TextShape(body.model))


def _seed(body: Asked) -> int:
    return secrets.randbits(62) if body.seed is None else body.seed % 2**63


class Shape:
    """How answers are written: whole, or in pieces."""

    kind = ""
    piece_kind = ""
    prefix = ""

    def __init__(self, model: str) -> None:
        self._about = {"id": f"{self.prefix}{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        made = [
            {"index": place, "finish_reason": each.finish, "logprobs": self.logprobs(each.drawn, 0)} | self.said(each)
            for place, each in enumerate(choices)
        ]
        return self._about | {"object": self.kind, "choices": made, "usage": usage}

    def piece(
        self, place: int, text: str | None, drawn: list[Drawn], at: int, finish: str | None, first: bool = False
    ) -> dict[str, Any]:
        choice = {"index": place, "finish_reason": finish, "logprobs": self.logprobs(drawn, at)}
        return self._about | {"object": self.piece_kind, "choices": [choice | self.grown(text, first)]}

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._about | {"object": self.piece_kind, "choices": [], "usage": usage}

    def said(self, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def grown(self, text: str | None, first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def logprobs(self, drawn: list[Drawn], at: int) -> dict[str, Any] | None:
        raise NotImplementedError


class ChatShape(Shape):
    kind, piece_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def said(self, answer: Answer) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": answer.text, "refusal": None}}

    def grown(self, text: str | None, first: bool) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"delta": {"role": "assistant"} | delta if first else delta}

    def logprobs(self, drawn: list[Drawn], at: int) -> dict[str, Any] | None:
        if not drawn:
            return None
        return {
            "content": [
                {
                    "token": each.text, "logprob": each.logprob, "bytes": list(each.bytes),
                    "top_logprobs": [
                        {"token": text, "logprob": logprob, "bytes": list(raw)} for text, raw, logprob in each.top
                    ],
                }
                for each in drawn
            ],
            "refusal": None,
        }  # fmt: skip


class TextShape(Shape):
    kind = piece_kind = "text_completion"
    prefix = "cmpl-"

    def said(self, answer: Answer) -> dict[str, Any]:
        return {"text": answer.text}

    def grown(self, text: str | None, first: bool) -> dict[str, Any]:
        return {"text": text or ""}

    def logprobs(self, drawn: list[Drawn], at: int) -> dict[str, Any] | None:
        if not drawn:
            return None
        offsets = []
        for each in drawn:
            offsets.append(at)
            at += len(each.text)
        return {
            "tokens": [each.text for each in drawn], "token_logprobs": [each.logprob for each in drawn],
            # Of two tokens that write the same the likelier one is told; they come likeliest first.
            "top_logprobs": [{text: logprob for text, _, logprob in reversed(each.top)} for each in drawn],
            "text_offset": offsets,
        }  # fmt: skip


class Answer:
    """One answer as it comes."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.drawn: list[Drawn] = []
        self.finish = "stop"
        self.tokens = self.prompt_tokens = self.warm = 0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def take(self, event: Event) -> None:
        match event:
            case Heard():
                self.prompt_tokens, self.warm = event.prompt_tokens, event.warm
            case Spoke():
                self.pieces.append(event.text)
                self.drawn += event.drawn
                self.tokens = event.tokens
            case Answered():
                self.finish, self.tokens = event.finish, event.tokens


async def _answer(request: Request, studio: Studio, body: Asked, asked: list[Chat], shape: Shape) -> Response:
    owner = request.scope.get("trellis.key") or (request.client.host if request.client else "unknown")
    speaker = await studio.speakers.find(body.model)
    if not body.stream:
        async with _counted(request, owner, len(asked)):
            answers = await _while_connected(request, _whole(speaker, asked, owner))
        return JSONResponse(shape.whole(answers, _usage(answers)))
    counted = _counted(request, owner, len(asked))
    await counted.__aenter__()
    events = _side_by_side(speaker, asked, owner)
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)

    async def over() -> None:
        await events.aclose()
        await counted.__aexit__(None, None, None)

    try:
        first = await anext(events)  # what is wrong with the request is said before the stream begins
    except BaseException:
        await over()
        raise

    async def frames() -> AsyncIterator[str]:
        try:
            async for frame in _frames(first, events, len(asked), shape, wants_usage):
                yield frame
        finally:
            await over()

    return StreamingResponse(frames(), media_type="text/event-stream", headers=HEADERS)


async def _whole(speaker: Speaker, asked: list[Chat], owner: str) -> list[Answer]:
    answers = [Answer() for _ in asked]
    async with aclosing(_side_by_side(speaker, asked, owner)) as events:
        async for place, event in events:
            answers[place].take(event)
    return answers


async def _side_by_side(speaker: Speaker, asked: list[Chat], owner: str) -> Any:
    """The events of several answers as they come, each with its place. The first error ends all."""
    inbox: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(maxsize=256)

    async def ask(place: int, request: Chat) -> None:
        try:
            async with aclosing(speaker.answer(request, owner, lambda progress: None)) as events:
                async for event in events:
                    await inbox.put((place, event))
            await inbox.put((place, None))
        except TrellisError as error:
            await inbox.put((place, error))

    tasks = [asyncio.create_task(ask(place, request)) for place, request in enumerate(asked)]
    try:
        left = len(tasks)
        while left:
            place, event = await inbox.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                left -= 1
            else:
                yield place, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _frames(
    first: tuple[int, Event], events: AsyncIterator[tuple[int, Event]], count: int, shape: Shape, wants_usage: bool
) -> AsyncIterator[str]:
    answers = [Answer() for _ in range(count)]
    lengths = [0] * count
    begun = [False] * count

    async def all_of_them() -> AsyncIterator[tuple[int, Event]]:
        yield first
        async for each in events:
            yield each

    try:
        async for place, event in all_of_them():
            answer = answers[place]
            answer.take(event)
            if isinstance(event, Heard) and not begun[place]:
                begun[place] = True
                yield _frame(shape.piece(place, "", [], 0, None, first=True))
            elif isinstance(event, Spoke):
                yield _frame(shape.piece(place, event.text, list(event.drawn), lengths[place], None))
                lengths[place] += len(event.text)
            elif isinstance(event, Answered):
                yield _frame(shape.piece(place, None, [], lengths[place], event.finish))
    except TrellisError as error:
        yield _frame(as_openai(error, 500 if isinstance(error, EngineError) else 400))
        return
    if wants_usage:
        yield _frame(shape.usage(_usage(answers)))
    yield "data: [DONE]\n\n"


def _frame(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=True, separators=(',', ':'))}\n\n"


def _usage(answers: list[Answer]) -> dict[str, Any]:
    prompt = max((each.prompt_tokens for each in answers), default=0)
    said = sum(each.tokens for each in answers)
    warm = max((each.warm for each in answers), default=0)
    return {
        "prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": warm},
    }  # fmt: skip


async def _while_connected(request: Request, work: Any) -> Any:
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
async def _counted(request: Request, owner: str, count: int) -> AsyncIterator[None]:
    """Raises Refused where one has too many answers made at once."""
    busy: Counter[str] = request.app.state.answering
    if busy[owner] + count > AT_ONCE:
        raise Refused(
            f"You have {busy[owner]} answers in progress and asked for {count} more; the limit is {AT_ONCE}.",
            code="too_many_requests", next_step="Wait until some are done.",
        )  # fmt: skip
    busy[owner] += count
    try:
        yield
    finally:
        busy[owner] -= count
        if busy[owner] <= 0:
            del busy[owner]
