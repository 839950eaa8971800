"""The JSON API of steering."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from ...messages import Choice
from ...params import PROMPT_LIMIT, SessionConfig, storable
from ...studio import journal as journals
from ...studio.session import Session
from ...studio.studio import Studio
from ..live import event_stream, resume_point

router = APIRouter(prefix="/api/steering", tags=["steering"])

Words = Annotated[str, Field(min_length=1, max_length=PROMPT_LIMIT, pattern=r"\S"), AfterValidator(storable)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S"), AfterValidator(storable)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewSession(Body):
    name: Name | None = None
    config: dict[str, Any] = {}


class Rename(Body):
    name: Name


class Choose(Body):
    offer: str = Field(max_length=100)
    choice: Choice


class Goto(Body):
    node: str = Field(max_length=100)


class NewPrompt(Body):
    text: Words


class Sample(Body):
    prompt: Words
    node: str | None = Field(None, max_length=100)
    n: int = Field(1, ge=1, le=16)
    sampling: dict[str, float | int] = {}


def studio_of(request: Request) -> Studio:
    studio: Studio = request.app.state.studio
    return studio


def request_id(
    idempotency_key: Annotated[str | None, Header(max_length=200, description="The same key is one action.")] = None,
) -> str:
    return idempotency_key or secrets.token_hex(12)


async def session_of(session: str, studio: Annotated[Studio, Depends(studio_of)]) -> Session:
    found = await studio.steering.session(session)
    found.wake()
    return found


OfStudio = Annotated[Studio, Depends(studio_of)]
OfSession = Annotated[Session, Depends(session_of)]
RequestId = Annotated[str, Depends(request_id)]


@router.get("/schema")
async def schema() -> dict[str, Any]:
    """JSON schema of a session's configuration."""
    return SessionConfig.model_json_schema()


@router.get("/defaults")
async def defaults() -> dict[str, Any]:
    """Default values of a session's configuration."""
    return SessionConfig().model_dump(mode="json")


@router.post("/sessions", status_code=201)
async def create(body: NewSession, studio: OfStudio, request: RequestId) -> dict[str, Any]:
    """A new session; loads the model if needed, then offers the first options."""
    return (await studio.steering.create(body.name, body.config, request)).state()


@router.get("/sessions")
async def sessions(studio: OfStudio) -> list[dict[str, Any]]:
    return await studio.steering.sessions()


@router.get("/sessions/{session}")
async def state(session: OfSession) -> dict[str, Any]:
    return session.state()


@router.patch("/sessions/{session}")
async def rename(body: Rename, session: OfSession) -> dict[str, Any]:
    await session.rename(body.name)
    return session.state()


@router.delete("/sessions/{session}", status_code=204)
async def delete(session: str, studio: OfStudio) -> Response:
    await studio.steering.delete(session)
    return Response(status_code=204)


@router.post("/sessions/{session}/choose", status_code=202)
async def choose(body: Choose, session: OfSession, request: RequestId) -> dict[str, str]:
    """Learn from a choice: an index, several indexes, a ranking, none, or a written answer."""
    await session.choose(body.offer, body.choice, request)
    return {"request": request}


@router.post("/sessions/{session}/skip", status_code=202)
async def skip(session: OfSession, request: RequestId) -> dict[str, str]:
    await session.skip(request)
    return {"request": request}


@router.post("/sessions/{session}/undo", status_code=202)
async def undo(session: OfSession, request: RequestId) -> dict[str, str]:
    await session.undo(request)
    return {"request": request}


@router.post("/sessions/{session}/redo", status_code=202)
async def redo(session: OfSession, request: RequestId) -> dict[str, str]:
    await session.redo(request)
    return {"request": request}


@router.post("/sessions/{session}/resume", status_code=202)
async def resume(session: OfSession, request: RequestId) -> dict[str, str]:
    """Try again after a failure."""
    await session.resume()
    return {"request": request}


@router.post("/sessions/{session}/goto", status_code=202)
async def goto(body: Goto, session: OfSession, request: RequestId) -> dict[str, str]:
    """Stand at any node; the options that were shown there come back."""
    await session.goto(body.node, request)
    return {"request": request}


@router.post("/sessions/{session}/prompt", status_code=202)
async def prompt(body: NewPrompt, session: OfSession, request: RequestId) -> dict[str, str]:
    """Replace the current prompt and offer again."""
    await session.prompt(body.text, request)
    return {"request": request}


@router.post("/sessions/{session}/sample")
async def sample(body: Sample, session: OfSession, studio: OfStudio) -> dict[str, list[str]]:
    """Answers from any node (default: the head) without moving the session."""
    answers = await studio.steering.sample(session.id, body.prompt, body.node, body.n, body.sampling)
    return {"answers": answers}


@router.get("/sessions/{session}/tree")
async def tree(session: OfSession, studio: OfStudio) -> dict[str, Any]:
    return await studio.steering.tree(session.id)


@router.get("/sessions/{session}/journal", response_class=PlainTextResponse)
async def journal(session: OfSession, studio: OfStudio) -> Response:
    """The branch to the head as Markdown."""
    text = await journals.journal(studio.store, session)
    return Response(text, media_type="text/markdown; charset=utf-8")


@router.get("/sessions/{session}/choices")
async def choices(
    session: OfSession, studio: OfStudio, format: Annotated[str, Query(max_length=40)] = "raw"
) -> StreamingResponse:
    """Every choice as JSON lines: raw, trl-preference, trl-unpaired or openai-dpo."""
    lines = await journals.choices(studio.store, session, format)
    disposition = {"content-disposition": f'attachment; filename="{session.id}-{format}.jsonl"'}
    return StreamingResponse(lines, media_type="application/jsonl", headers=disposition)


@router.get("/sessions/{session}/events", response_class=StreamingResponse)
async def events(
    session: OfSession, studio: OfStudio, after: Annotated[str | None, Depends(resume_point)]
) -> StreamingResponse:
    """What happens, as it happens (SSE). The whole state comes first unless the stream is resumed."""
    return event_stream(studio.steering.events(session.id, after))
