"""The page of models: cards, loading in plain sight, unloading, fetching from the hub, deleting."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from pydantic import Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ...errors import TrellisError
from ...options import Device, ModelOptions, Precision
from ...studio.studio import Studio
from ..api.steering import StudioDep
from ..error_responses import status_of
from ..rate_limits import enforce_rate_limit
from ..render import get_renderer
from .steering.workbench import ActionForm

router = APIRouter(include_in_schema=False)


class LoadForm(ActionForm):
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
    studio: StudioDep,
    model: Annotated[str, Query(max_length=200)] = "",
    revision: Annotated[str, Query(max_length=100)] = "",
) -> HTMLResponse:
    """The page; `model` and `revision` are what the form for the hub begins with."""
    return await render_models_page(
        request, studio, form_values={"model": model, "revision": revision, "precision": "auto"}
    )


async def render_models_page(
    request: Request, studio: Studio, error: TrellisError | None = None, form_values: dict[str, str] | None = None
) -> HTMLResponse:
    status = status_of(error) if error else 200
    values = await page_context(studio)
    error_json = error.as_json() if error else None
    form_values = form_values or {"model": "", "revision": "", "precision": "auto"}
    return get_renderer(request).html_response(
        "models/page.html", status, place="models", error=error_json, sent=form_values, **values
    )


async def page_context(studio: Studio) -> dict[str, Any]:
    models = await studio.models.list_models()
    failed = await studio.models.list_failed_loads()
    known = {model["id"] for model in models}
    return {
        "models": models,
        "jobs": {job["id"]: job for job in await studio.jobs.list(["load"])},
        "failed": failed,
        "failed_elsewhere": [job for model, job in failed.items() if model not in known],
        "free": studio.models.memory.free_bytes(ModelOptions()),
    }


@router.get("/models/cards")
async def cards(request: Request, studio: StudioDep) -> HTMLResponse:
    """The cards alone, for a page that is open."""
    return get_renderer(request).html_response("models/_cards.html", **await page_context(studio))


@router.post("/models/load")
async def load(request: Request, studio: StudioDep, form: Annotated[LoadForm, Form()]) -> Response:
    await enforce_rate_limit(request)
    form_values = {"model": form.model, "revision": form.revision, "precision": form.precision}
    return await _run_action(request, studio, studio.models.load(form.options(), form.request), form_values)


@router.post("/models/{model:path}/unload")
async def unload(request: Request, model: str, studio: StudioDep) -> Response:
    return await _run_action(request, studio, studio.models.unload(model))


@router.post("/models/{model:path}/delete")
async def delete(request: Request, model: str, studio: StudioDep) -> Response:
    return await _run_action(request, studio, studio.models.delete(model))


@router.post("/models/{model:path}/forget")
async def forget(request: Request, model: str, studio: StudioDep) -> Response:
    """Remove a model that could not be loaded from the page, and the parts of it that were fetched."""
    return await _run_action(request, studio, studio.models.delete_failed_loads(model))


async def _run_action(
    request: Request, studio: Studio, action: Coroutine[Any, Any, Any], form_values: dict[str, str] | None = None
) -> Response:
    """Run an action, then render the cards, with its error if it failed."""
    try:
        await action
    except TrellisError as error:
        if "hx-request" in request.headers:
            raise
        return await render_models_page(request, studio, error, form_values)
    if "hx-request" in request.headers:
        return await cards(request, studio)
    return RedirectResponse("/models", 303)
