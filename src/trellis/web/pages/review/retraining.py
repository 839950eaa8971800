"""The log of choices and what can be done with it: take it away, fit afresh, learn from files, replay elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Form, Request
from pydantic import Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ....errors import Invalid, TrellisError
from ....studio.datasets import TABLE_SUFFIXES
from ....studio.jobs import Job
from ....studio.review import CHOICE_FORMATS, MAX_EPOCHS
from ....studio.steering import Node, Retraining, Session
from ....studio.studio import Studio
from ...api.steering import SessionDep, StudioDep
from ...error_responses import status_of
from ...rate_limits import enforce_rate_limit
from ...render import get_renderer
from ..steering.workbench import ActionForm

router = APIRouter(include_in_schema=False)


class RetrainForm(ActionForm):
    epochs: str = Field("", max_length=20)

    def parse_epochs(self) -> int | None:
        """Parse the number. Raise Invalid."""
        text = self.epochs.strip()
        if not text:
            return None
        if not text.isdecimal() or not 1 <= int(text) <= MAX_EPOCHS:
            raise Invalid(
                f"epochs: must be 1 to {MAX_EPOCHS}, got “{text}”.",
                field="epochs",
                next_step="Enter a number or leave it empty.",
            )
        return int(text)


class ImportForm(RetrainForm):
    file: str = Field("", max_length=400)


class ReplayForm(RetrainForm):
    model: str = Field("", max_length=400)


@router.get("/steer/{session}/log")
async def page(request: Request, session: SessionDep, studio: StudioDep) -> HTMLResponse:
    return await render_log_page(request, session, studio)


async def render_log_page(
    request: Request, session: Session, studio: Studio, error: TrellisError | None = None
) -> HTMLResponse:
    files = [file for file in await studio.datasets.list_files() if file["name"].lower().endswith(TABLE_SUFFIXES)]
    fits = await studio.retraining.list_jobs(session.id)
    models = [model for model in await studio.models.list_models() if model["id"] != session.config.model]
    return get_renderer(request).html_response(
        "retraining/page.html",
        status_of(error) if error else 200,
        place="steer",
        state=session.state(),
        counts=count_choices(session.tree.path(session.tree.head_id)),
        formats=CHOICE_FORMATS,
        files=files,
        models=models,
        fits=fits,
        working=next((job["id"] for job in fits if job["state"] in ("queued", "running")), None),
        most=MAX_EPOCHS,
        error=error.as_json() if error else None,
        request_id=secrets.token_hex(12),
    )


def count_choices(path: list[Node]) -> dict[str, int]:
    """Return the numbers of choices and refusals on a branch."""
    learned_nodes = [node for node in path if node.has_learned]
    from_logs = [node.choice for node in learned_nodes if isinstance(node.choice, Retraining)]
    refused = sum(node.choice == "none" for node in learned_nodes)
    return {
        "clicks": len(learned_nodes) - len(from_logs),
        "refused": refused,
        "from_logs": sum(log.lessons for log in from_logs),
    }


@router.post("/steer/{session}/refit")
async def retrain(
    request: Request, session: SessionDep, studio: StudioDep, form: Annotated[RetrainForm, Form()]
) -> Response:
    await enforce_rate_limit(request)
    return await start_job(
        request, session, studio, lambda: studio.retraining.retrain(session.id, None, form.parse_epochs(), form.request)
    )


@router.post("/steer/{session}/import")
async def import_preferences(
    request: Request, session: SessionDep, studio: StudioDep, form: Annotated[ImportForm, Form()]
) -> Response:
    await enforce_rate_limit(request)
    return await start_job(
        request,
        session,
        studio,
        lambda: studio.retraining.import_preferences(session.id, form.file, None, form.parse_epochs(), form.request),
    )


@router.post("/steer/{session}/replay")
async def replay(
    request: Request, session: SessionDep, studio: StudioDep, form: Annotated[ReplayForm, Form()]
) -> Response:
    await enforce_rate_limit(request)
    return await start_job(
        request,
        session,
        studio,
        lambda: studio.retraining.replay_on_model(session.id, form.model, None, form.parse_epochs(), form.request),
    )


async def start_job(
    request: Request, session: Session, studio: Studio, start: Callable[[], Awaitable[Job]]
) -> Response:
    """Start a job and redirect to the page that shows it, or render the page with the error."""
    try:
        await start()
    except TrellisError as error:
        return await render_log_page(request, session, studio, error)
    return RedirectResponse(f"/steer/{session.id}/log#fits", 303)


@router.post("/steer/{session}/fits/{job}/cancel")
async def cancel(session: SessionDep, studio: StudioDep, job: str) -> Response:
    await studio.jobs.cancel(job)
    return RedirectResponse(f"/steer/{session.id}/log#fits", 303)
