"""The pages of blind comparison: choose two steps, judge round by round, see who was who."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from pydantic import Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ....errors import Conflict, Invalid, TrellisError
from ....studio.review.blind_test import MOST_ROUNDS, USUAL_ROUNDS
from ....studio.review.win_rate import in_words, names_of
from ....studio.steering.session import Session
from ....studio.steering.tree import drift_of
from ....studio.studio import Studio
from ...api.steering import OfSession, OfStudio
from ...error_responses import status_of
from ...rate_limits import expensive
from ...render import render_of
from ..steering.workbench import Sent
from .review import name_of, to_choose

router = APIRouter(include_in_schema=False)


class StartForm(Sent):
    left: str = Field(max_length=100)
    right: str = Field(max_length=100)
    rounds: str = Field(str(USUAL_ROUNDS), max_length=20)
    prompts: str = Field("", max_length=200_000)


class VerdictForm(Sent):
    round: int
    verdict: Literal["first", "second", "tie"]


@router.get("/steer/{session}/blind")
async def page(
    request: Request,
    session: OfSession,
    studio: OfStudio,
    left: Annotated[str, Query(max_length=100)] = "",
    right: Annotated[str, Query(max_length=100)] = "",
) -> HTMLResponse:
    """Choose what to compare, and see what was compared."""
    values = {"left": left, "right": right, "rounds": str(USUAL_ROUNDS), "prompts": ""}
    return await start_page(request, session, studio, values)


async def start_page(
    request: Request, session: Session, studio: Studio, values: dict[str, str], error: TrellisError | None = None
) -> HTMLResponse:
    labels = await session.labels()
    trials = await studio.blind.all(session.id)
    return render_of(request).page(
        "blind_test/start.html",
        status_of(error) if error else 200,
        place="steer",
        state=session.state(),
        nodes=[(node.id, name_of(node, labels), drift_of(node, session.tree)) for node in to_choose(session)],
        left=values["left"] or session.tree.root.id,
        right=values["right"] or session.tree.head_id,
        rounds=values["rounds"],
        most=MOST_ROUNDS,
        prompts=values["prompts"],
        trials=[trial | {"told": told(trial), "names": names_of(trial["left"], trial["right"])} for trial in trials],
        error=error.as_json() if error else None,
        request_id=secrets.token_hex(12),
    )


def told(trial: dict[str, Any]) -> str:
    """What a comparison came to, in words; empty while it goes on."""
    if not trial["result"]:
        return ""
    return in_words(trial["result"], *names_of(trial["left"], trial["right"]))


@router.post("/steer/{session}/blind")
async def start(request: Request, session: OfSession, studio: OfStudio, form: Annotated[StartForm, Form()]) -> Response:
    await expensive(request)
    prompts = [line for line in form.prompts.splitlines() if line.strip()]
    try:
        if not form.rounds.strip().isdecimal():
            raise Invalid(
                f"rounds: must be a whole number, got “{form.rounds[:20]}”.",
                field="rounds",
                next_step=f"Enter a number from 1 to {MOST_ROUNDS}.",
            )
        trial = await studio.blind.start(session.id, form.left, form.right, int(form.rounds), prompts, form.request)
    except TrellisError as error:
        return await start_page(request, session, studio, form.model_dump(), error)
    return RedirectResponse(f"/steer/{session.id}/blind/{trial['id']}", 303)


@router.get("/steer/{session}/blind/{trial}")
async def trial_page(request: Request, session: OfSession, studio: OfStudio, trial: str) -> HTMLResponse:
    """The round to judge, or the result. A part of the page when a script asks."""
    return shown(request, session, await studio.blind.state(session.id, trial))


@router.post("/steer/{session}/blind/{trial}/verdict")
async def verdict(
    request: Request, session: OfSession, studio: OfStudio, trial: str, form: Annotated[VerdictForm, Form()]
) -> Response:
    try:
        found = await studio.blind.judge(session.id, trial, form.round, form.verdict)
    except Conflict:  # judged already, here or in another tab: the current round is what to look at
        found = await studio.blind.state(session.id, trial)
    return answered(request, session, found)


@router.post("/steer/{session}/blind/{trial}/end")
async def end(request: Request, session: OfSession, studio: OfStudio, trial: str) -> Response:
    return answered(request, session, await studio.blind.end(session.id, trial))


@router.post("/steer/{session}/blind/{trial}/undo")
async def undo(request: Request, session: OfSession, studio: OfStudio, trial: str) -> Response:
    return answered(request, session, await studio.blind.take_back(session.id, trial))


@router.post("/steer/{session}/blind/{trial}/retry")
async def retry(request: Request, session: OfSession, studio: OfStudio, trial: str) -> Response:
    return answered(request, session, await studio.blind.retry(session.id, trial))


def answered(request: Request, session: Session, trial: dict[str, Any]) -> Response:
    if "hx-request" in request.headers:
        return shown(request, session, trial)
    return RedirectResponse(f"/steer/{session.id}/blind/{trial['id']}", 303)


def shown(request: Request, session: Session, trial: dict[str, Any]) -> HTMLResponse:
    template = "blind_test/_round.html" if "hx-request" in request.headers else "blind_test/trial.html"
    return render_of(request).page(
        template,
        place="steer",
        state=session.state(),
        trial=trial,
        told=told(trial),
        names=names_of(trial["left"], trial["right"]),
        request_id=secrets.token_hex(12),
    )
