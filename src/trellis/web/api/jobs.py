"""The JSON API of jobs: all long work."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import StreamingResponse

from ..event_streams import event_stream, resume_point
from .steering import StudioDep

router = APIRouter(prefix="/api/jobs", tags=["jobs"])


@router.get("")
async def jobs(studio: StudioDep) -> list[dict[str, Any]]:
    """The latest jobs, newest first."""
    return await studio.jobs.list()


async def get_job(job: str, studio: StudioDep) -> dict[str, Any]:
    return await studio.jobs.get(job)


JobDep = Annotated[dict[str, Any], Depends(get_job)]


@router.get("/{job}")
async def job(found: JobDep) -> dict[str, Any]:
    return found


@router.post("/{job}/cancel", status_code=202)
async def cancel(found: JobDep, studio: StudioDep) -> dict[str, Any]:
    return await studio.jobs.cancel(found["id"])


@router.get("/{job}/events", response_class=StreamingResponse)
async def events(
    found: JobDep, studio: StudioDep, after: Annotated[str | None, Depends(resume_point)]
) -> StreamingResponse:
    """Progress, then the end of the job (SSE); an ended job answers with its last event."""
    return event_stream(studio.jobs.events(found["id"], after))
