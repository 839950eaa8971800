"""Where steering begins: the first page with the sessions, and the form of all options."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from pydantic import TypeAdapter, ValidationError
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ...errors import Invalid, TrellisError
from ...params import SessionConfig, invalid_from
from ...studio.presets import all_presets, preset
from ...studio.studio import Studio
from ..api.steering import Name, OfStudio
from ..failures import status_of
from ..limits import expensive
from ..render import render_of
from .forms import as_sent, config_of, errors_of, flat, groups_of, named, nested, shown

router = APIRouter(include_in_schema=False)

NAME: TypeAdapter[str] = TypeAdapter(Name)
LAST = "trellis_last"
SHOWN = 40
"""Sessions on the first page before a person asks for all."""


@router.get("/")
async def start(request: Request, studio: OfStudio, q: str = "", all: bool = False) -> HTMLResponse:
    """Start with the demo, or go on where you were."""
    sessions = await studio.steering.sessions()
    words = q.lower().split()[:10]
    found = [each for each in sessions if all_in(words, f"{each['name']} {each['model']}")]
    last = next((each for each in sessions if each["id"] == request.cookies.get(LAST)), None)
    template = "setup/_sessions.html" if "hx-request" in request.headers else "setup/start.html"
    return render_of(request).page(
        template,
        place="steer",
        sessions=found if all else found[:SHOWN],
        found=len(found),
        total=len(sessions),
        q=q[:200],
        last=last,
        request_id=secrets.token_hex(12),
    )


def all_in(words: list[str], text: str) -> bool:
    return all(word in text.lower() for word in words)


@router.get("/new")
async def new(request: Request, studio: OfStudio, preset: str = "", clone: str = "", model: str = "") -> HTMLResponse:
    """The form of all options: from the defaults, a preset, or the settings of an earlier session."""
    values, title = await _beginning(studio, preset, clone)
    if model:
        values["model"] = model[:200]
    typed = "model" if model or clone else ""  # which no preset changes
    return await form_page(request, studio, values, under=preset, cloned=title, typed=typed)


@router.post("/new")
async def apply_preset(request: Request, studio: OfStudio) -> HTMLResponse:
    """The form with a preset under what a person has set: all that is not as the form had it before."""
    sent = await sent_by(request)
    name, typed, under, chosen = (sent.pop(each, "") for each in ("name", "typed", "under", "preset"))
    sent.pop("request", "")
    before, now = await _beginning(studio, under, ""), shown(sent)
    had = flat(SessionConfig().model_dump(mode="json")) | before[0]
    edited = {*typed.split(","), *(each for each, value in now.items() if as_sent(value) != as_sent(had.get(each)))}
    kept = {each: value for each, value in now.items() if each in edited or each.startswith("dataset.")}
    values = flat(preset(chosen).config) | kept
    return await form_page(request, studio, values, name=name, typed=",".join(edited & now.keys()), under=chosen)


@router.post("/new/preview")
async def preview(request: Request, studio: OfStudio) -> HTMLResponse:
    """The first prompts of what the form names: for an open page a part of it, else the whole form again."""
    await expensive(request)
    sent = await sent_by(request)
    name, typed, under, _ = (sent.pop(each, "") for each in ("name", "typed", "under", "request"))
    found: dict[str, Any] | None = None
    problem: TrellisError | None = None
    try:
        dataset = SessionConfig.parse({"dataset": nested(sent).get("dataset", {})}).dataset
        found = await studio.datasets.preview(dataset)
    except TrellisError as error:
        problem = error
    if "hx-request" in request.headers:
        said = problem.as_json() if problem else None
        return render_of(request).page("setup/_preview.html", preview=found, problem=said)
    return await form_page(
        request, studio, shown(sent), error=problem, preview=found, name=name, typed=typed, under=under
    )


@router.post("/steer")
async def begin(request: Request, studio: OfStudio) -> Response:
    """Make a session from the form and go to its page."""
    await expensive(request)
    sent = await sent_by(request)
    name = sent.pop("name", "").strip()
    key = sent.pop("request", "")
    typed, under = sent.pop("typed", ""), sent.pop("under", "")
    try:
        chosen = name_from(name)
        session = await studio.steering.create(chosen, nested(sent), key if 8 <= len(key) <= 64 else None)
    except TrellisError as error:
        return await form_page(request, studio, shown(sent), error=error, name=name[:1000], typed=typed, under=under)
    return RedirectResponse(f"/steer/{session.id}", 303)


async def sent_by(request: Request) -> dict[str, str]:
    async with request.form(max_fields=100, max_part_size=100_000) as form:
        return {name: value for name, value in form.items() if isinstance(value, str)}


async def form_page(
    request: Request,
    studio: Studio,
    values: Mapping[str, Any],
    *,
    name: str = "",
    typed: str = "",
    under: str = "",
    cloned: str = "",
    error: TrellisError | None = None,
    preview: dict[str, Any] | None = None,
) -> HTMLResponse:
    """The form, with what was sent and what was wrong with it, when something was.

    `typed` names the options that a person has set, `under` the preset that the others come from.
    """
    known = {
        "model": tuple(await studio.models.catalog.names()),
        "dataset.id": tuple(file["name"] for file in await studio.datasets.files()),
    }
    config = config_of(values)
    check = await studio.steering.check(config)
    wrong = errors_of(error)
    if error:  # all that is wrong at once, not one thing after another
        wrong = named([*check["errors"], *await _dataset_errors(studio, config, error)]) | wrong
    groups = groups_of(values, wrong, known)
    titles = {row.name: (row.title, row.id) for group in groups for row in group.fields}
    options = next((flat(each.config) for each in all_presets() if each.id == under), {})
    return render_of(request).page(
        "setup/new.html",
        status_of(error) if error else 200,
        place="steer",
        groups=groups,
        presets=all_presets(),
        titles=titles,
        preset_set=[title for each, (title, _) in titles.items() if each in options.keys() - typed.split(",")],
        preset_kept=[title for each, (title, _) in titles.items() if each in options and each in typed.split(",")],
        defaults=flat(SessionConfig().model_dump(mode="json")),
        under=under,
        cloned=cloned,
        name=name,
        typed=typed[:2000],
        name_error=wrong.get("name", ""),
        error=error.as_json() if error else None,
        told=error.message if error and not titles.keys() & errors_of(error).keys() else "",
        wrong=[(*titles[name], message) for name, message in wrong.items() if name in titles],
        memory=check["memory"],
        preview=preview,
        problem=None,
        request_id=secrets.token_hex(12),
    )


async def _dataset_errors(studio: Studio, config: dict[str, Any], error: TrellisError) -> list[dict[str, str]]:
    """What is wrong with a file of prompts, which was not looked at before another error was found."""
    dataset = SessionConfig.as_far_as_valid(config).dataset
    if dataset.source != "file" or any(name.startswith("dataset.") for name in errors_of(error)):
        return []  # a data set on the hub may take half a minute
    try:
        await studio.datasets.preview(dataset)
    except Invalid as found:
        return found.fields
    except TrellisError as found:
        return [{"field": found.field or "dataset.id", "message": found.message}]
    return []


async def _beginning(studio: Studio, preset_id: str, clone: str) -> tuple[dict[str, Any], str]:
    if clone:
        session = await studio.steering.session(clone)
        return flat(session.config.model_dump(mode="json")), session.name
    if preset_id:
        return flat(preset(preset_id).config), ""
    return {}, ""


def name_from(sent: str) -> str | None:
    """The name in a form; None where it was left empty. Raises Invalid."""
    try:
        return NAME.validate_python(sent) if sent else None
    except ValidationError as error:
        raise invalid_from(error, prefix="name") from None
