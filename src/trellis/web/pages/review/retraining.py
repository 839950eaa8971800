"""The log of choices and what can be done with it: take it away, fit afresh, learn from files, replay elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Form, Request
from pydantic import Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ....errors import Invalid, TrellisError
from ....studio.datasets.datasets import TABLES
from ....studio.jobs import Job
from ....studio.review import journal as journals
from ....studio.review.retraining import MOST_EPOCHS
from ....studio.steering.session import Session
from ....studio.steering.tree import Fitted, Node
from ....studio.studio import Studio
from ...api.steering import OfSession, OfStudio
from ...error_responses import status_of
from ...rate_limits import expensive
from ...render import render_of
from ..steering.workbench import Sent

router = APIRouter(include_in_schema=False)


class FitForm(Sent):
    epochs: str = Field("", max_length=20)

    def passes(self) -> int | None:
        """Raises Invalid."""
        text = self.epochs.strip()
        if not text:
            return None
        if not text.isdecimal() or not 1 <= int(text) <= MOST_EPOCHS:
            raise Invalid(
                f"epochs: must be 1 to {MOST_EPOCHS}, got “{text}”.",
                field="epochs",
                next_step="Enter a number or leave it empty.",
            )
        return int(text)


class ImportForm(FitForm):
    file: str = Field("", max_length=400)


class ReplayForm(FitForm):
    model: str = Field("", max_length=400)


@router.get("/steer/{session}/log")
async def page(request: Request, session: OfSession, studio: OfStudio) -> HTMLResponse:
    return await log_page(request, session, studio)


async def log_page(
    request: Request, session: Session, studio: Studio, error: TrellisError | None = None
) -> HTMLResponse:
    files = [file for file in await studio.datasets.files() if file["name"].lower().endswith(TABLES)]
    fits = await studio.fits.of(session.id)
    models = [model for model in await studio.models.list() if model["id"] != session.config.model]
    return render_of(request).page(
        "retraining/page.html",
        status_of(error) if error else 200,
        place="steer",
        state=session.state(),
        counts=counts_of(session.tree.path(session.tree.head_id)),
        formats=journals.FORMATS,
        files=files,
        models=models,
        fits=fits,
        working=next((job["id"] for job in fits if job["state"] in ("queued", "running")), None),
        most=MOST_EPOCHS,
        error=error.as_json() if error else None,
        request_id=secrets.token_hex(12),
    )


def counts_of(path: list[Node]) -> dict[str, int]:
    """What was said on a branch, in numbers."""
    said = [node for node in path if node.learned]
    logs = [node.choice for node in said if isinstance(node.choice, Fitted)]
    refused = sum(node.choice == "none" for node in said)
    return {
        "clicks": len(said) - len(logs),
        "refused": refused,
        "from_logs": sum(log.lessons for log in logs),
    }


@router.post("/steer/{session}/refit")
async def refit(request: Request, session: OfSession, studio: OfStudio, form: Annotated[FitForm, Form()]) -> Response:
    await expensive(request)
    return await started(
        request, session, studio, lambda: studio.fits.refit(session.id, None, form.passes(), form.request)
    )


@router.post("/steer/{session}/import")
async def take_in(
    request: Request, session: OfSession, studio: OfStudio, form: Annotated[ImportForm, Form()]
) -> Response:
    await expensive(request)
    return await started(
        request, session, studio, lambda: studio.fits.take_in(session.id, form.file, None, form.passes(), form.request)
    )


@router.post("/steer/{session}/replay")
async def replay(
    request: Request, session: OfSession, studio: OfStudio, form: Annotated[ReplayForm, Form()]
) -> Response:
    await expensive(request)
    return await started(
        request, session, studio, lambda: studio.fits.replay(session.id, form.model, None, form.passes(), form.request)
    )


async def started(request: Request, session: Session, studio: Studio, start: Callable[[], Awaitable[Job]]) -> Response:
    """Back to the page, which shows the job; with what stands in the way, if something does."""
    try:
        await start()
    except TrellisError as error:
        return await log_page(request, session, studio, error)
    return RedirectResponse(f"/steer/{session.id}/log#fits", 303)


@router.post("/steer/{session}/fits/{job}/cancel")
async def cancel(session: OfSession, studio: OfStudio, job: str) -> Response:
    await studio.jobs.cancel(job)
    return RedirectResponse(f"/steer/{session.id}/log#fits", 303)
