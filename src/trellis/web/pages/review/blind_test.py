"""The pages of blind comparison: choose two steps, judge round by round, see who was who."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from pydantic import Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ....errors import Conflict, Invalid, TrellisError
from ....studio.review import DEFAULT_ROUNDS, MAX_ROUNDS, distinct_names, win_rate_sentence
from ....studio.steering import Session, drift_of
from ....studio.studio import Studio
from ...api.steering import SessionDep, StudioDep
from ...error_responses import status_of
from ...rate_limits import enforce_rate_limit
from ...render import get_renderer
from ..steering.workbench import ActionForm
from .review import comparable_nodes, node_label

router = APIRouter(include_in_schema=False)


class StartForm(ActionForm):
    left: str = Field(max_length=100)
    right: str = Field(max_length=100)
    rounds: str = Field(str(DEFAULT_ROUNDS), max_length=20)
    prompts: str = Field("", max_length=200_000)


class VerdictForm(ActionForm):
    round: int
    verdict: Literal["first", "second", "tie"]


@router.get("/steer/{session}/blind")
async def page(
    request: Request,
    session: SessionDep,
    studio: StudioDep,
    left: Annotated[str, Query(max_length=100)] = "",
    right: Annotated[str, Query(max_length=100)] = "",
) -> HTMLResponse:
    """Choose what to compare, and see what was compared."""
    values = {"left": left, "right": right, "rounds": str(DEFAULT_ROUNDS), "prompts": ""}
    return await render_start_page(request, session, studio, values)


async def render_start_page(
    request: Request, session: Session, studio: Studio, values: dict[str, str], error: TrellisError | None = None
) -> HTMLResponse:
    labels = await session.nodes.labels()
    trials = await studio.blind_tests.list_trials(session.id)
    return get_renderer(request).html_response(
        "blind_test/start.html",
        status_of(error) if error else 200,
        place="steer",
        state=session.state(),
        nodes=[(node.id, node_label(node, labels), drift_of(node, session.tree)) for node in comparable_nodes(session)],
        left=values["left"] or session.tree.root.id,
        right=values["right"] or session.tree.head_id,
        rounds=values["rounds"],
        most=MAX_ROUNDS,
        prompts=values["prompts"],
        trials=[
            trial | {"told": result_text(trial), "names": distinct_names(trial["left"], trial["right"])}
            for trial in trials
        ],
        error=error.as_json() if error else None,
        request_id=secrets.token_hex(12),
    )


def result_text(trial: dict[str, Any]) -> str:
    """Return the result of a trial as a sentence; empty while it is open."""
    if not trial["result"]:
        return ""
    return win_rate_sentence(trial["result"], *distinct_names(trial["left"], trial["right"]))


@router.post("/steer/{session}/blind")
async def start(
    request: Request, session: SessionDep, studio: StudioDep, form: Annotated[StartForm, Form()]
) -> Response:
    await enforce_rate_limit(request)
    prompts = [line for line in form.prompts.splitlines() if line.strip()]
    try:
        if not form.rounds.strip().isdecimal():
            raise Invalid(
                f"rounds: must be a whole number, got “{form.rounds[:20]}”.",
                field="rounds",
                next_step=f"Enter a number from 1 to {MAX_ROUNDS}.",
            )
        trial = await studio.blind_tests.start(
            session.id, form.left, form.right, int(form.rounds), prompts, form.request
        )
    except TrellisError as error:
        return await render_start_page(request, session, studio, form.model_dump(), error)
    return RedirectResponse(f"/steer/{session.id}/blind/{trial['id']}", 303)


@router.get("/steer/{session}/blind/{trial}")
async def trial_page(request: Request, session: SessionDep, studio: StudioDep, trial: str) -> HTMLResponse:
    """The round to judge, or the result. A part of the page when a script asks."""
    return render_trial(request, session, await studio.blind_tests.state(session.id, trial))


@router.post("/steer/{session}/blind/{trial}/verdict")
async def verdict(
    request: Request, session: SessionDep, studio: StudioDep, trial: str, form: Annotated[VerdictForm, Form()]
) -> Response:
    try:
        found = await studio.blind_tests.judge(session.id, trial, form.round, form.verdict)
    except Conflict:  # judged already, here or in another tab: the current round is what to look at
        found = await studio.blind_tests.state(session.id, trial)
    return action_response(request, session, found)


@router.post("/steer/{session}/blind/{trial}/end")
async def end(request: Request, session: SessionDep, studio: StudioDep, trial: str) -> Response:
    return action_response(request, session, await studio.blind_tests.end(session.id, trial))


@router.post("/steer/{session}/blind/{trial}/undo")
async def undo(request: Request, session: SessionDep, studio: StudioDep, trial: str) -> Response:
    return action_response(request, session, await studio.blind_tests.undo_verdict(session.id, trial))


@router.post("/steer/{session}/blind/{trial}/retry")
async def retry(request: Request, session: SessionDep, studio: StudioDep, trial: str) -> Response:
    return action_response(request, session, await studio.blind_tests.retry(session.id, trial))


def action_response(request: Request, session: Session, trial: dict[str, Any]) -> Response:
    if "hx-request" in request.headers:
        return render_trial(request, session, trial)
    return RedirectResponse(f"/steer/{session.id}/blind/{trial['id']}", 303)


def render_trial(request: Request, session: Session, trial: dict[str, Any]) -> HTMLResponse:
    template = "blind_test/_round.html" if "hx-request" in request.headers else "blind_test/trial.html"
    return get_renderer(request).html_response(
        template,
        place="steer",
        state=session.state(),
        trial=trial,
        told=result_text(trial),
        names=distinct_names(trial["left"], trial["right"]),
        request_id=secrets.token_hex(12),
    )
