"""The JSON API of learning from a whole log: re-fit, import, replay on another base model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from pydantic import Field

from ...studio.jobs import as_json
from ...studio.review.retraining import MOST_EPOCHS
from ..rate_limits import expensive
from .steering import Body, OfSession, OfStudio, RequestId

router = APIRouter(prefix="/api/steering/sessions/{session}", tags=["fits"])


class Refit(Body):
    node: str | None = Field(None, max_length=100)
    epochs: int | None = Field(None, ge=1, le=MOST_EPOCHS)


class Import(Refit):
    file: str = Field(min_length=1, max_length=400)


class Replay(Refit):
    model: str = Field(min_length=1, max_length=400)


@router.post("/refit", status_code=202, dependencies=[Depends(expensive)])
async def refit(body: Refit, session: OfSession, studio: OfStudio, request: RequestId) -> dict[str, Any]:
    """Train a fresh adapter on the whole log of the branch to a node (default: the head): a job whose result names the
    new node, a child of the root."""
    return as_json((await studio.fits.refit(session.id, body.node, body.epochs, request)).row)


@router.post("/import", status_code=202, dependencies=[Depends(expensive)])
async def take_in(body: Import, session: OfSession, studio: OfStudio, request: RequestId) -> dict[str, Any]:
    """Learn from a file of preferences in the prompts folder: a job whose result names the new node."""
    return as_json((await studio.fits.take_in(session.id, body.file, body.node, body.epochs, request)).row)


@router.post("/replay", status_code=202, dependencies=[Depends(expensive)])
async def replay(body: Replay, session: OfSession, studio: OfStudio, request: RequestId) -> dict[str, Any]:
    """Learn the log of the branch to a node with another base model: a job whose result names a new session."""
    return as_json((await studio.fits.replay(session.id, body.model, body.node, body.epochs, request)).row)


@router.get("/fits")
async def fits(session: OfSession, studio: OfStudio) -> list[dict[str, Any]]:
    """The fits of a session as jobs, the newest first."""
    return await studio.fits.of(session.id)
