"""The OpenAI API at `/v1`: every model and version, for the public clients as they are."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ...errors import EngineError, Invalid, Refused, TrellisError
from ...messages import Chat, Event, template_kwargs_from
from ...studio.chat import ChatTarget
from ...studio.studio import Studio
from ..event_streams import SSE_HEADERS
from ..openai_requests import MAX_TEXT_LENGTH, BaseCompletionRequest, ChatCompletionRequest, CompletionRequest
from ..openai_responses import ChatFormat, CompletionFormat, ResponseFormat, StreamedAnswer, sse_frames, usage_json
from .steering import StudioDep

router = APIRouter(prefix="/v1", tags=["openai"])

MAX_CONCURRENT_ANSWERS = 64
"""The most concurrent answers of one key, or of one address without a key."""


@router.get("/models")
async def models(studio: StudioDep) -> dict[str, Any]:
    """Every model and session by the name that the other calls take; a session's steps are `session:<name>@<step>`.
    Sessions without their model are left out."""
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
    """Continue a text, without a chat template."""
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


async def _respond(
    request: Request, studio: Studio, body: BaseCompletionRequest, chats: list[Chat], response_format: ResponseFormat
) -> Response:
    owner = request.scope.get("trellis.key") or (request.client.host if request.client else "unknown")
    target = await studio.chat_targets.find(body.model)
    if not body.stream:
        async with _limit_concurrency(request, owner, len(chats)):
            answers = await _run_while_connected(request, _collect_answers(target, chats, owner))
        return JSONResponse(response_format.response(answers, usage_json(answers)))
    concurrency_limit = _limit_concurrency(request, owner, len(chats))
    await concurrency_limit.__aenter__()
    events = _stream_concurrently(target, chats, owner)
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)

    async def close() -> None:
        await events.aclose()
        await concurrency_limit.__aexit__(None, None, None)

    try:
        first = await anext(events)  # errors of the request get their own status: they come before the first event
    except BaseException:
        await close()
        raise

    async def frames() -> AsyncIterator[str]:
        try:
            async for frame in sse_frames(first, events, len(chats), response_format, wants_usage):
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
    """Yield (index, event) of several answers as they come. The first error ends all."""
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


async def _run_while_connected(request: Request, work: Any) -> Any:
    """Return the result of `work`, or cancel it when the client disconnects."""
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
    """Raise Refused for too many concurrent answers."""
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
