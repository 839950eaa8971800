"""The JSON API of models and jobs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.responses import StreamingResponse

from ...studio.jobs import as_json
from ..live import event_stream, resume_point
from .steering import Body, OfStudio, RequestId

router = APIRouter(prefix="/api", tags=["models and jobs"])


class LoadModel(Body):
    model: str = Field(min_length=1, max_length=200)


@router.get("/models")
async def models(studio: OfStudio) -> list[dict[str, Any]]:
    """Known models: id, kind, source, size, state, memory estimate."""
    return await studio.models.list()


@router.post("/models/load", status_code=202)
async def load(body: LoadModel, studio: OfStudio, request: RequestId) -> dict[str, Any]:
    """Start loading a model. A loaded one answers with the job that loaded it."""
    return as_json((await studio.models.load(body.model, request)).row)


@router.post("/models/{model}/unload", status_code=202)
async def unload(model: str, studio: OfStudio) -> dict[str, str]:
    await studio.models.unload(model)
    return {"model": model, "state": "unloaded"}


@router.get("/jobs")
async def jobs(studio: OfStudio) -> list[dict[str, Any]]:
    return await studio.jobs.list()


async def job_of(job: str, studio: OfStudio) -> dict[str, Any]:
    return await studio.jobs.get(job)


OfJob = Annotated[dict[str, Any], Depends(job_of)]


@router.get("/jobs/{job}")
async def job(found: OfJob) -> dict[str, Any]:
    return found


@router.post("/jobs/{job}/cancel", status_code=202)
async def cancel(found: OfJob, studio: OfStudio) -> dict[str, Any]:
    return await studio.jobs.cancel(found["id"])


@router.get("/jobs/{job}/events", response_class=StreamingResponse)
async def events(
    found: OfJob, studio: OfStudio, after: Annotated[str | None, Depends(resume_point)]
) -> StreamingResponse:
    """Progress, then how it ended (SSE); a finished job answers with its last event."""
    return event_stream(studio.jobs.events(found["id"], after))
