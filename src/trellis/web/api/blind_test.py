"""The JSON API of blind comparisons."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from ...studio.review.blind_test import MOST_ROUNDS, USUAL_ROUNDS
from ..rate_limits import expensive
from .steering import Body, OfSession, OfStudio, RequestId, Words

router = APIRouter(prefix="/api/steering/sessions/{session}/blind", tags=["blind comparison"])


class NewTrial(Body):
    left: str = Field(max_length=100)
    right: str = Field(max_length=100)
    rounds: Annotated[int, Field(ge=1, le=MOST_ROUNDS)] = USUAL_ROUNDS
    prompts: list[Words] = Field([], max_length=MOST_ROUNDS)


class Verdict(Body):
    round: int
    verdict: Literal["first", "second", "tie"]


@router.post("", status_code=201, dependencies=[Depends(expensive)])
async def start(body: NewTrial, session: OfSession, studio: OfStudio, request: RequestId) -> dict[str, Any]:
    """Begin a blind comparison of two nodes. Without prompts, those that come next in the session are asked."""
    return await studio.blind.start(session.id, body.left, body.right, body.rounds, list(body.prompts), request)


@router.get("")
async def trials(session: OfSession, studio: OfStudio) -> list[dict[str, Any]]:
    return await studio.blind.all(session.id)


@router.get("/{trial}")
async def state(trial: str, session: OfSession, studio: OfStudio) -> dict[str, Any]:
    """The round to judge (null while it is drawn), or the result when all rounds are judged or it was ended."""
    return await studio.blind.state(session.id, trial)


@router.post("/{trial}/verdict")
async def verdict(trial: str, body: Verdict, session: OfSession, studio: OfStudio) -> dict[str, Any]:
    """Say which answer of the current round is better."""
    return await studio.blind.judge(session.id, trial, body.round, body.verdict)


@router.post("/{trial}/undo")
async def undo(trial: str, session: OfSession, studio: OfStudio) -> dict[str, Any]:
    """Take the last verdict back, and judge that round again."""
    return await studio.blind.take_back(session.id, trial)


@router.post("/{trial}/retry")
async def retry(trial: str, session: OfSession, studio: OfStudio) -> dict[str, Any]:
    """Draw again after `error`."""
    return await studio.blind.retry(session.id, trial)


@router.post("/{trial}/end")
async def end(trial: str, session: OfSession, studio: OfStudio) -> dict[str, Any]:
    """Stop, and tell the result of what was judged so far."""
    return await studio.blind.end(session.id, trial)
