"""The JSON API of jobs: anything long."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import StreamingResponse

from ..event_streams import event_stream, resume_point
from .steering import OfStudio

router = APIRouter(prefix="/api/jobs", tags=["jobs"])


@router.get("")
async def jobs(studio: OfStudio) -> list[dict[str, Any]]:
    """The latest jobs, newest first."""
    return await studio.jobs.list()


async def job_of(job: str, studio: OfStudio) -> dict[str, Any]:
    return await studio.jobs.get(job)


OfJob = Annotated[dict[str, Any], Depends(job_of)]


@router.get("/{job}")
async def job(found: OfJob) -> dict[str, Any]:
    return found


@router.post("/{job}/cancel", status_code=202)
async def cancel(found: OfJob, studio: OfStudio) -> dict[str, Any]:
    return await studio.jobs.cancel(found["id"])


@router.get("/{job}/events", response_class=StreamingResponse)
async def events(
    found: OfJob, studio: OfStudio, after: Annotated[str | None, Depends(resume_point)]
) -> StreamingResponse:
    """Progress, then how it ended (SSE); a finished job answers with its last event."""
    return event_stream(studio.jobs.events(found["id"], after))
