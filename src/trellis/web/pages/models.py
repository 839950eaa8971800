"""The page of models: cards, loading in plain sight, unloading, fetching from the hub, deleting."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from pydantic import Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ...errors import TrellisError
from ...params import Device, ModelOptions, Precision
from ...studio.studio import Studio
from ..api.steering import OfStudio
from ..error_responses import status_of
from ..rate_limits import expensive
from ..render import render_of
from .steering.workbench import Sent

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
async def page(
    request: Request,
    studio: OfStudio,
    model: Annotated[str, Query(max_length=200)] = "",
    revision: Annotated[str, Query(max_length=100)] = "",
) -> HTMLResponse:
    """The page; `model` and `revision` are what the form for the hub begins with."""
    return await models_page(request, studio, sent={"model": model, "revision": revision, "precision": "auto"})


async def models_page(
    request: Request, studio: Studio, error: TrellisError | None = None, sent: dict[str, str] | None = None
) -> HTMLResponse:
    status = status_of(error) if error else 200
    values = await values_of(studio)
    said = error.as_json() if error else None
    sent = sent or {"model": "", "revision": "", "precision": "auto"}
    return render_of(request).page("models/page.html", status, place="models", error=said, sent=sent, **values)


async def values_of(studio: Studio) -> dict[str, Any]:
    models = await studio.models.list()
    failed = await studio.models.failed_loads()
    known = {model["id"] for model in models}
    return {
        "models": models,
        "jobs": {job["id"]: job for job in await studio.jobs.list(["load"])},
        "failed": failed,
        "failed_elsewhere": [job for model, job in failed.items() if model not in known],
        "free": studio.models.free(ModelOptions()),
    }


@router.get("/models/cards")
async def cards(request: Request, studio: OfStudio) -> HTMLResponse:
    """The cards alone, for a page that is open."""
    return render_of(request).page("models/_cards.html", **await values_of(studio))


@router.post("/models/load")
async def load(request: Request, studio: OfStudio, form: Annotated[LoadForm, Form()]) -> Response:
    await expensive(request)
    sent = {"model": form.model, "revision": form.revision, "precision": form.precision}
    return await _after(request, studio, studio.models.load(form.options(), form.request), sent)


@router.post("/models/{model:path}/unload")
async def unload(request: Request, model: str, studio: OfStudio) -> Response:
    return await _after(request, studio, studio.models.unload(model))


@router.post("/models/{model:path}/delete")
async def delete(request: Request, model: str, studio: OfStudio) -> Response:
    return await _after(request, studio, studio.models.delete(model))


@router.post("/models/{model:path}/forget")
async def forget(request: Request, model: str, studio: OfStudio) -> Response:
    """Remove a model that could not be loaded from the page, and the parts of it that were fetched."""
    return await _after(request, studio, studio.models.forget_failed_loads(model))


async def _after(
    request: Request, studio: Studio, action: Coroutine[Any, Any, Any], sent: dict[str, str] | None = None
) -> Response:
    """Do it, then show the cards again; what was wrong is said on the page."""
    try:
        await action
    except TrellisError as error:
        if "hx-request" in request.headers:
            raise
        return await models_page(request, studio, error, sent)
    if "hx-request" in request.headers:
        return await cards(request, studio)
    return RedirectResponse("/models", 303)
