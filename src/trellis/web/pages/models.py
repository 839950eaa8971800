"""The page of models: cards, loading in plain sight, unloading, fetching from the hub, deleting."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from pydantic import Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ...errors import TrellisError
from ...params import Device, ModelOptions, Precision
from ...studio.studio import Studio
from ..api.steering import OfStudio
from ..failures import status_of
from ..limits import expensive
from ..render import render_of
from .steering import Sent

router = APIRouter(include_in_schema=False)


class LoadForm(Sent):
    model: str = Field(min_length=1, max_length=200, pattern=r"\S")
    revision: str = Field("", max_length=100, pattern=r"^[A-Za-z0-9._/-]*$")
    precision: Precision = "auto"
    device: Device = "auto"

    def options(self) -> ModelOptions:
        return ModelOptions(
            model=self.model.strip(), revision=self.revision, precision=self.precision, device=self.device
        )


@router.get("/models")
async def page(request: Request, studio: OfStudio) -> HTMLResponse:
    return await models_page(request, studio)


async def models_page(request: Request, studio: Studio, error: TrellisError | None = None) -> HTMLResponse:
    status = status_of(error) if error else 200
    values = await values_of(studio)
    said = error.as_json() if error else None
    return render_of(request).page("models/page.html", status, place="models", error=said, **values)


async def values_of(studio: Studio) -> dict[str, Any]:
    jobs = await studio.jobs.list()
    loads: dict[str, dict[str, Any]] = {}
    for job in jobs:
        if job["kind"] == "load":
            loads.setdefault(job["about"]["model"], job)
    return {
        "models": await studio.models.list(),
        "jobs": {job["id"]: job for job in jobs},
        "failed": {model: job["error"] for model, job in loads.items() if job["state"] == "failed"},
        "free": studio.models.free(ModelOptions()),
    }


@router.get("/models/cards")
async def cards(request: Request, studio: OfStudio) -> HTMLResponse:
    """The cards alone, for a page that is open."""
    return render_of(request).page("models/_cards.html", **await values_of(studio))


@router.post("/models/load")
async def load(request: Request, studio: OfStudio, form: Annotated[LoadForm, Form()]) -> Response:
    await expensive(request)
    return await _after(request, studio, studio.models.load(form.options(), form.request))


@router.post("/models/{model:path}/unload")
async def unload(request: Request, model: str, studio: OfStudio) -> Response:
    return await _after(request, studio, studio.models.unload(model))


@router.post("/models/{model:path}/delete")
async def delete(request: Request, model: str, studio: OfStudio) -> Response:
    return await _after(request, studio, studio.models.delete(model))


async def _after(request: Request, studio: Studio, action: Any) -> Response:
    """Do it, then show the cards again; what was wrong is said on the page."""
    try:
        await action
    except TrellisError as error:
        if "hx-request" in request.headers:
            raise
        return await models_page(request, studio, error)
    if "hx-request" in request.headers:
        return await cards(request, studio)
    return RedirectResponse("/models", 303)
