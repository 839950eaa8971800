"""The JSON API of retraining: on a branch's log, a preference file, or with another base model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from pydantic import Field

from ...studio.jobs import job_json
from ...studio.review import MAX_EPOCHS
from ..rate_limits import enforce_rate_limit
from .steering import RequestBody, RequestIdDep, SessionDep, StudioDep

router = APIRouter(prefix="/api/steering/sessions/{session}", tags=["fits"])


class Retrain(RequestBody):
    node: str | None = Field(None, max_length=100)
    epochs: int | None = Field(None, ge=1, le=MAX_EPOCHS)


class ImportPreferences(Retrain):
    file: str = Field(min_length=1, max_length=400)


class ReplayOnModel(Retrain):
    model: str = Field(min_length=1, max_length=400)


@router.post("/refit", status_code=202, dependencies=[Depends(enforce_rate_limit)])
async def retrain(body: Retrain, session: SessionDep, studio: StudioDep, request: RequestIdDep) -> dict[str, Any]:
    """Train a fresh adapter on the log of the branch to a node (default: the head): a job whose result names the new
    node, a child of the root."""
    return job_json((await studio.retraining.retrain(session.id, body.node, body.epochs, request)).row)


@router.post("/import", status_code=202, dependencies=[Depends(enforce_rate_limit)])
async def import_preferences(
    body: ImportPreferences, session: SessionDep, studio: StudioDep, request: RequestIdDep
) -> dict[str, Any]:
    """Train on a preference file of the prompts folder: a job whose result names the new node."""
    return job_json(
        (await studio.retraining.import_preferences(session.id, body.file, body.node, body.epochs, request)).row
    )


@router.post("/replay", status_code=202, dependencies=[Depends(enforce_rate_limit)])
async def replay(body: ReplayOnModel, session: SessionDep, studio: StudioDep, request: RequestIdDep) -> dict[str, Any]:
    """Train another base model on the log of the branch to a node: a job whose result names a new session."""
    return job_json(
        (await studio.retraining.replay_on_model(session.id, body.model, body.node, body.epochs, request)).row
    )


@router.get("/fits")
async def retraining_jobs(session: SessionDep, studio: StudioDep) -> list[dict[str, Any]]:
    """The retraining jobs of a session, newest first."""
    return await studio.retraining.list_jobs(session.id)
