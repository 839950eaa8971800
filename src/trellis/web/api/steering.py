"""The JSON API of steering."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from ...messages import Choice
from ...options import SessionConfig
from ...studio.jobs import job_json
from ...studio.review import export_choices, journal_markdown
from ...studio.steering import Session, all_presets
from ...studio.studio import Studio
from ...text_rules import PROMPT_LIMIT, require_storable
from ..event_streams import event_stream, resume_point
from ..rate_limits import enforce_rate_limit

router = APIRouter(prefix="/api/steering", tags=["steering"])

PromptText = Annotated[
    str, Field(min_length=1, max_length=PROMPT_LIMIT, pattern=r"\S"), AfterValidator(require_storable)
]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S"), AfterValidator(require_storable)]


class RequestBody(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewSession(RequestBody):
    name: Name | None = None
    config: dict[str, Any] = {}


class Rename(RequestBody):
    name: Name


class Choose(RequestBody):
    offer: str = Field(max_length=100)
    choice: Choice


class Goto(RequestBody):
    node: str = Field(max_length=100)


class NewPrompt(RequestBody):
    text: PromptText


class Check(RequestBody):
    config: dict[str, Any] = {}


class Preview(RequestBody):
    dataset: dict[str, Any] = {}


class NodeName(RequestBody):
    name: Annotated[str, Field(max_length=200), AfterValidator(require_storable)]


class Compare(RequestBody):
    left: str = Field(max_length=100)
    right: str = Field(max_length=100)
    prompts: list[PromptText] = Field([], max_length=12)


class Export(RequestBody):
    kind: Literal["adapter", "merged"]
    name: str = Field(min_length=1, max_length=100)
    node: str | None = Field(None, max_length=100)


class Sample(RequestBody):
    prompt: PromptText
    node: str | None = Field(None, max_length=100)
    n: int = Field(1, ge=1, le=16)
    sampling: dict[str, float | int] = {}


def get_studio(request: Request) -> Studio:
    studio: Studio = request.app.state.studio
    return studio


def get_request_id(
    idempotency_key: Annotated[str | None, Header(max_length=200, description="The same key is one action.")] = None,
) -> str:
    return idempotency_key or secrets.token_hex(12)


async def get_session(session: str, studio: Annotated[Studio, Depends(get_studio)]) -> Session:
    found = await studio.steering.session(session)
    found.work.wake()
    return found


StudioDep = Annotated[Studio, Depends(get_studio)]
SessionDep = Annotated[Session, Depends(get_session)]
RequestIdDep = Annotated[str, Depends(get_request_id)]


@router.get("/schema")
async def schema() -> dict[str, Any]:
    """Return the JSON schema of a session's configuration."""
    return SessionConfig.model_json_schema()


@router.get("/defaults")
async def defaults() -> dict[str, Any]:
    """Return the default values of a session's configuration."""
    return SessionConfig().model_dump(mode="json")


@router.post("/sessions", status_code=201, dependencies=[Depends(enforce_rate_limit)])
async def create(body: NewSession, studio: StudioDep, request: RequestIdDep) -> dict[str, Any]:
    """Create a session. The model is loaded if necessary, then the first options are generated."""
    return (await studio.steering.create(body.name, body.config, request)).state()


@router.post("/check")
async def check(body: Check, studio: StudioDep) -> dict[str, Any]:
    """Check a partial configuration: errors by field, and whether its model fits into memory."""
    return await studio.steering.check_config(body.config)


@router.get("/presets")
async def presets() -> list[dict[str, Any]]:
    """List the presets."""
    return [preset.as_json() for preset in all_presets()]


@router.get("/files")
async def files(studio: StudioDep) -> list[dict[str, Any]]:
    """List the prompt files that a dataset can name."""
    return await studio.datasets.list_files()


@router.post("/preview", dependencies=[Depends(enforce_rate_limit)])
async def preview(body: Preview, studio: StudioDep) -> dict[str, Any]:
    """Preview the first prompts of a dataset, their column, and the other columns, subsets and splits."""
    return await studio.datasets.preview(SessionConfig.parse({"dataset": body.dataset}).dataset)


@router.get("/sessions")
async def sessions(studio: StudioDep) -> list[dict[str, Any]]:
    return await studio.steering.list_sessions()


@router.get("/sessions/{session}")
async def state(session: SessionDep) -> dict[str, Any]:
    return session.state()


@router.patch("/sessions/{session}")
async def rename(body: Rename, session: SessionDep) -> dict[str, Any]:
    await session.commands.rename(body.name)
    return session.state()


@router.delete("/sessions/{session}", status_code=204)
async def delete(session: str, studio: StudioDep) -> Response:
    await studio.steering.delete(session)
    return Response(status_code=204)


@router.post("/sessions/{session}/choose", status_code=202)
async def choose(body: Choose, session: SessionDep, request: RequestIdDep) -> dict[str, str]:
    """Learn from a choice: an index, several indexes, a ranking, none, or a written answer."""
    await session.commands.choose(body.offer, body.choice, request)
    return {"request": request}


@router.post("/sessions/{session}/skip", status_code=202)
async def skip(session: SessionDep, request: RequestIdDep) -> dict[str, str]:
    await session.commands.skip(request)
    return {"request": request}


@router.post("/sessions/{session}/undo", status_code=202)
async def undo(session: SessionDep, request: RequestIdDep) -> dict[str, str]:
    await session.commands.undo(request)
    return {"request": request}


@router.post("/sessions/{session}/redo", status_code=202)
async def redo(session: SessionDep, request: RequestIdDep) -> dict[str, str]:
    await session.commands.redo(request)
    return {"request": request}


@router.post("/sessions/{session}/resume", status_code=202)
async def resume(session: SessionDep, request: RequestIdDep) -> dict[str, str]:
    """Try again after a failure."""
    await session.commands.resume()
    return {"request": request}


@router.post("/sessions/{session}/goto", status_code=202)
async def goto(body: Goto, session: SessionDep, request: RequestIdDep) -> dict[str, str]:
    """Move the head to any node and show its offer again."""
    await session.commands.go_to(body.node, request)
    return {"request": request}


@router.post("/sessions/{session}/prompt", status_code=202)
async def prompt(body: NewPrompt, session: SessionDep, request: RequestIdDep) -> dict[str, str]:
    """Replace the current prompt and generate a new offer."""
    await session.commands.replace_prompt(body.text, request)
    return {"request": request}


@router.patch("/sessions/{session}/nodes/{node}")
async def name_node(body: NodeName, session: SessionDep, node: str) -> dict[str, Any]:
    """Name a node; an empty name removes it."""
    await session.commands.name_node(node, body.name.strip())
    return {"node": node, "name": body.name.strip() or None}


@router.post("/sessions/{session}/compare", status_code=202, dependencies=[Depends(enforce_rate_limit)])
async def compare(body: Compare, session: SessionDep, studio: StudioDep, request: RequestIdDep) -> dict[str, Any]:
    """Answer prompts from two nodes with the same seed: a job whose result has both answers to each."""
    prompts = list(body.prompts) or await studio.comparisons.default_prompts(session.id)
    return job_json((await studio.comparisons.start(session.id, body.left, body.right, prompts, request)).row)


@router.post("/sessions/{session}/exports", status_code=202, dependencies=[Depends(enforce_rate_limit)])
async def export(body: Export, session: SessionDep, studio: StudioDep, request: RequestIdDep) -> dict[str, Any]:
    """Export a node as a folder: a job whose result is {path, files, bytes, checks}."""
    return job_json((await studio.exports.start(session.id, body.kind, body.name, body.node, request)).row)


@router.post("/sessions/{session}/sample", dependencies=[Depends(enforce_rate_limit)])
async def sample(body: Sample, session: SessionDep, studio: StudioDep) -> dict[str, list[str]]:
    """Sample answers at any node (default: the head) without moving the head."""
    answers = await studio.steering.sample(session.id, body.prompt, body.node, body.n, body.sampling)
    return {"answers": answers}


@router.get("/sessions/{session}/tree")
async def tree(session: SessionDep, studio: StudioDep) -> Response:
    """Return all nodes `{id, parent, step, choice, drift, metrics, name, created}`, and the id of the head."""
    found = await studio.steering.tree_json(session.id)
    text = await asyncio.to_thread(json.dumps, found)  # hundreds of nodes take longer than the event loop may be held
    return Response(text, media_type="application/json")


@router.get("/sessions/{session}/journal", response_class=PlainTextResponse)
async def journal(session: SessionDep, studio: StudioDep, download: bool = False) -> Response:
    """Return the journal of the branch to the head as Markdown."""
    text = await journal_markdown(studio.store, session)
    headers = {"content-disposition": f'attachment; filename="{session.id}-journal.md"'} if download else {}
    return Response(text, media_type="text/markdown; charset=utf-8", headers=headers)


@router.get("/sessions/{session}/choices")
async def choices(
    session: SessionDep, studio: StudioDep, format: Annotated[str, Query(max_length=40)] = "raw"
) -> StreamingResponse:
    """Return every choice as JSON Lines: raw, trl-preference, trl-unpaired or openai-dpo."""
    lines = await export_choices(studio.store, session, format)
    disposition = {"content-disposition": f'attachment; filename="{session.id}-{format}.jsonl"'}
    return StreamingResponse(lines, media_type="application/jsonl", headers=disposition)


@router.get("/sessions/{session}/events", response_class=StreamingResponse)
async def events(
    session: SessionDep, studio: StudioDep, after: Annotated[str | None, Depends(resume_point)]
) -> StreamingResponse:
    """Stream events (SSE). The whole state comes first unless the stream is resumed."""
    return event_stream(studio.steering.events(session.id, after))
