"""The JSON API of blind tests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from ...studio.review import DEFAULT_ROUNDS, MAX_ROUNDS
from ..rate_limits import enforce_rate_limit
from .steering import PromptText, RequestBody, RequestIdDep, SessionDep, StudioDep

router = APIRouter(prefix="/api/steering/sessions/{session}/blind", tags=["blind comparison"])


class NewTrial(RequestBody):
    left: str = Field(max_length=100)
    right: str = Field(max_length=100)
    rounds: Annotated[int, Field(ge=1, le=MAX_ROUNDS)] = DEFAULT_ROUNDS
    prompts: list[PromptText] = Field([], max_length=MAX_ROUNDS)


class Verdict(RequestBody):
    round: int
    verdict: Literal["first", "second", "tie"]


@router.post("", status_code=201, dependencies=[Depends(enforce_rate_limit)])
async def start(body: NewTrial, session: SessionDep, studio: StudioDep, request: RequestIdDep) -> dict[str, Any]:
    """Start a blind test of two nodes. Without prompts, the next ones of the session are used."""
    return await studio.blind_tests.start(session.id, body.left, body.right, body.rounds, list(body.prompts), request)


@router.get("")
async def trials(session: SessionDep, studio: StudioDep) -> list[dict[str, Any]]:
    return await studio.blind_tests.list_trials(session.id)


@router.get("/{trial}")
async def state(trial: str, session: SessionDep, studio: StudioDep) -> dict[str, Any]:
    """The round to judge (null while it is generated), or the result when the test has ended."""
    return await studio.blind_tests.state(session.id, trial)


@router.post("/{trial}/verdict")
async def verdict(trial: str, body: Verdict, session: SessionDep, studio: StudioDep) -> dict[str, Any]:
    """Judge the current round."""
    return await studio.blind_tests.judge(session.id, trial, body.round, body.verdict)


@router.post("/{trial}/undo")
async def undo(trial: str, session: SessionDep, studio: StudioDep) -> dict[str, Any]:
    """Remove the last verdict, and judge that round again."""
    return await studio.blind_tests.undo_verdict(session.id, trial)


@router.post("/{trial}/retry")
async def retry(trial: str, session: SessionDep, studio: StudioDep) -> dict[str, Any]:
    """Generate again after `error`."""
    return await studio.blind_tests.retry(session.id, trial)


@router.post("/{trial}/end")
async def end(trial: str, session: SessionDep, studio: StudioDep) -> dict[str, Any]:
    """End the test, and reveal the result so far."""
    return await studio.blind_tests.end(session.id, trial)
