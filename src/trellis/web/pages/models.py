"""The page of models: cards, loading in plain sight, unloading."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ..api.steering import OfStudio
from .steering import Sent, render_of

router = APIRouter(include_in_schema=False)


@router.get("/models")
async def page(request: Request, studio: OfStudio) -> HTMLResponse:
    models = await studio.models.list()
    jobs = {job["id"]: job for job in await studio.jobs.list()}
    return render_of(request).page("models/page.html", place="models", models=models, jobs=jobs)


@router.get("/models/cards")
async def cards(request: Request, studio: OfStudio) -> HTMLResponse:
    """The cards alone, for a page that is open."""
    models = await studio.models.list()
    jobs = {job["id"]: job for job in await studio.jobs.list()}
    return render_of(request).page("models/_cards.html", models=models, jobs=jobs)


@router.post("/models/{model}/load")
async def load(request: Request, model: str, studio: OfStudio, form: Annotated[Sent, Form()]) -> Response:
    await studio.models.load(model, form.request)
    return await _answered(request, studio)


@router.post("/models/{model}/unload")
async def unload(request: Request, model: str, studio: OfStudio) -> Response:
    await studio.models.unload(model)
    return await _answered(request, studio)


async def _answered(request: Request, studio: OfStudio) -> Response:
    if "hx-request" in request.headers:
        return await cards(request, studio)
    return RedirectResponse("/models", 303)
