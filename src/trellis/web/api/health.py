"""Liveness and readiness."""

from __future__ import annotations

from fastapi import APIRouter

from ... import __version__
from ...store import jobs
from .steering import StudioDep

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Answers as long as the process runs; touches nothing else."""
    return {"status": "ok", "version": __version__}


@router.get("/readyz")
async def readyz(studio: StudioDep) -> dict[str, str]:
    """Answers when the database does."""
    await studio.store.read(jobs.list_jobs, limit=1)
    return {"status": "ok", "version": __version__}
