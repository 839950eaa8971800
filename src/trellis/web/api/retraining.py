"""The JSON API of learning from a whole log: re-fit, import, replay on another base model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from pydantic import Field

from ...studio.jobs import as_json
from ...studio.review.retraining import MOST_EPOCHS
from ..rate_limits import enforce_rate_limit
from .steering import RequestBody, RequestIdDep, SessionDep, StudioDep

router = APIRouter(prefix="/api/steering/sessions/{session}", tags=["fits"])


class Retrain(RequestBody):
    node: str | None = Field(None, max_length=100)
    epochs: int | None = Field(None, ge=1, le=MOST_EPOCHS)


class ImportPreferences(Retrain):
    file: str = Field(min_length=1, max_length=400)


class ReplayOnModel(Retrain):
    model: str = Field(min_length=1, max_length=400)


@router.post("/refit", status_code=202, dependencies=[Depends(enforce_rate_limit)])
async def retrain(body: Retrain, session: SessionDep, studio: StudioDep, request: RequestIdDep) -> dict[str, Any]:
    """Train a fresh adapter on the whole log of the branch to a node (default: the head): a job whose result names the
    new node, a child of the root."""
    return as_json((await studio.fits.refit(session.id, body.node, body.epochs, request)).row)


@router.post("/import", status_code=202, dependencies=[Depends(enforce_rate_limit)])
async def import_preferences(
    body: ImportPreferences, session: SessionDep, studio: StudioDep, request: RequestIdDep
) -> dict[str, Any]:
    """Learn from a file of preferences in the prompts folder: a job whose result names the new node."""
    return as_json((await studio.fits.take_in(session.id, body.file, body.node, body.epochs, request)).row)


@router.post("/replay", status_code=202, dependencies=[Depends(enforce_rate_limit)])
async def replay(body: ReplayOnModel, session: SessionDep, studio: StudioDep, request: RequestIdDep) -> dict[str, Any]:
    """Learn the log of the branch to a node with another base model: a job whose result names a new session."""
    return as_json((await studio.fits.replay(session.id, body.model, body.node, body.epochs, request)).row)


@router.get("/fits")
async def retraining_jobs(session: SessionDep, studio: StudioDep) -> list[dict[str, Any]]:
    """The fits of a session as jobs, the newest first."""
    return await studio.fits.of(session.id)
