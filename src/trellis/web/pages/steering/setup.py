"""Where steering begins: the first page with the sessions, and the form of all options."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from pydantic import TypeAdapter, ValidationError
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ....errors import Invalid, TrellisError
from ....options import SessionConfig, invalid_from
from ....studio.steering import all_presets, get_preset
from ....studio.studio import Studio
from ...api.steering import Name, StudioDep
from ...error_responses import status_of
from ...rate_limits import enforce_rate_limit
from ...render import get_renderer
from .options_form import (
    as_sent,
    config_from_form,
    config_from_values,
    errors_by_option,
    flatten_config,
    group_fields,
    messages_by_option,
    values_from_form,
)

router = APIRouter(include_in_schema=False)

NAME_ADAPTER: TypeAdapter[str] = TypeAdapter(Name)
LAST_SESSION_COOKIE = "trellis_last"
SESSIONS_SHOWN = 40
"""Sessions on the first page before a person asks for all."""


@router.get("/")
async def start(request: Request, studio: StudioDep, q: str = "", all: bool = False) -> HTMLResponse:
    """Render the first page: start with the demo, or continue a session."""
    sessions = await studio.steering.list_sessions()
    words = q.lower().split()[:10]
    found = [each for each in sessions if contains_all(words, f"{each['name']} {each['model']}")]
    last = next((each for each in sessions if each["id"] == request.cookies.get(LAST_SESSION_COOKIE)), None)
    template = "setup/_sessions.html" if "hx-request" in request.headers else "setup/start.html"
    return get_renderer(request).html_response(
        template,
        place="steer",
        sessions=found if all else found[:SESSIONS_SHOWN],
        found=len(found),
        total=len(sessions),
        q=q[:200],
        last=last,
        request_id=secrets.token_hex(12),
    )


def contains_all(words: list[str], text: str) -> bool:
    return all(word in text.lower() for word in words)


@router.get("/new")
async def new(request: Request, studio: StudioDep, preset: str = "", clone: str = "", model: str = "") -> HTMLResponse:
    """The form of all options: from the defaults, a preset, or the settings of an earlier session."""
    values, title = await _initial_values(studio, preset, clone)
    if model:
        values["model"] = model[:200]
    typed = "model" if model or clone else ""  # which no preset changes
    return await render_form_page(request, studio, values, under=preset, cloned_name=title, typed=typed)


@router.post("/new")
async def apply_preset(request: Request, studio: StudioDep) -> HTMLResponse:
    """The form with a preset under what a person has set: all that is not as the form had it before."""
    sent = await read_form(request)
    name, typed, under, chosen = (sent.pop(each, "") for each in ("name", "typed", "under", "preset"))
    sent.pop("request", "")
    before, now = await _initial_values(studio, under, ""), values_from_form(sent)
    had = flatten_config(SessionConfig().model_dump(mode="json")) | before[0]
    edited = {*typed.split(","), *(each for each, value in now.items() if as_sent(value) != as_sent(had.get(each)))}
    kept = {each: value for each, value in now.items() if each in edited or each.startswith("dataset.")}
    values = flatten_config(get_preset(chosen).config) | kept
    return await render_form_page(request, studio, values, name=name, typed=",".join(edited & now.keys()), under=chosen)


@router.post("/new/preview")
async def preview(request: Request, studio: StudioDep) -> HTMLResponse:
    """The first prompts of what the form names: for an open page a part of it, else the whole form again."""
    await enforce_rate_limit(request)
    sent = await read_form(request)
    name, typed, under, _ = (sent.pop(each, "") for each in ("name", "typed", "under", "request"))
    found: dict[str, Any] | None = None
    problem: TrellisError | None = None
    try:
        dataset = SessionConfig.parse({"dataset": config_from_form(sent).get("dataset", {})}).dataset
        found = await studio.datasets.preview(dataset)
    except TrellisError as error:
        problem = error
    if "hx-request" in request.headers:
        problem_json = problem.as_json() if problem else None
        return get_renderer(request).html_response("setup/_preview.html", preview=found, problem=problem_json)
    return await render_form_page(
        request, studio, values_from_form(sent), error=problem, preview=found, name=name, typed=typed, under=under
    )


@router.post("/steer")
async def create_session(request: Request, studio: StudioDep) -> Response:
    """Make a session from the form and go to its page."""
    await enforce_rate_limit(request)
    sent = await read_form(request)
    name = sent.pop("name", "").strip()
    key = sent.pop("request", "")
    typed, under = sent.pop("typed", ""), sent.pop("under", "")
    try:
        chosen = parse_name(name)
        session = await studio.steering.create(chosen, config_from_form(sent), key if 8 <= len(key) <= 64 else None)
    except TrellisError as error:
        return await render_form_page(
            request, studio, values_from_form(sent), error=error, name=name[:1000], typed=typed, under=under
        )
    return RedirectResponse(f"/steer/{session.id}", 303)


async def read_form(request: Request) -> dict[str, str]:
    async with request.form(max_fields=100, max_part_size=100_000) as form:
        return {name: value for name, value in form.items() if isinstance(value, str)}


async def render_form_page(
    request: Request,
    studio: Studio,
    values: Mapping[str, Any],
    *,
    name: str = "",
    typed: str = "",
    under: str = "",
    cloned_name: str = "",
    error: TrellisError | None = None,
    preview: dict[str, Any] | None = None,
) -> HTMLResponse:
    """The form, with what was sent and what was wrong with it, when something was.

    `typed` names the options that a person has set, `under` the preset that the others come from.
    """
    known = {
        "model": tuple(await studio.models.catalog.list_names()),
        "dataset.id": tuple(file["name"] for file in await studio.datasets.list_files()),
    }
    config = config_from_values(values)
    check = await studio.steering.check_config(config)
    wrong = errors_by_option(error)
    if error:  # all that is wrong at once, not one thing after another
        wrong = messages_by_option([*check["errors"], *await _dataset_errors(studio, config, error)]) | wrong
    groups = group_fields(values, wrong, known)
    titles = {row.name: (row.title, row.id) for group in groups for row in group.fields}
    options = next((flatten_config(each.config) for each in all_presets() if each.id == under), {})
    return get_renderer(request).html_response(
        "setup/new.html",
        status_of(error) if error else 200,
        place="steer",
        groups=groups,
        presets=all_presets(),
        titles=titles,
        preset_set=[title for each, (title, _) in titles.items() if each in options.keys() - typed.split(",")],
        preset_kept=[title for each, (title, _) in titles.items() if each in options and each in typed.split(",")],
        defaults=flatten_config(SessionConfig().model_dump(mode="json")),
        under=under,
        cloned=cloned_name,
        name=name,
        typed=typed[:2000],
        name_error=wrong.get("name", ""),
        error=error.as_json() if error else None,
        told=error.message if error and not titles.keys() & errors_by_option(error).keys() else "",
        wrong=[(*titles[name], message) for name, message in wrong.items() if name in titles],
        memory=check["memory"],
        preview=preview,
        problem=None,
        request_id=secrets.token_hex(12),
    )


async def _dataset_errors(studio: Studio, config: dict[str, Any], error: TrellisError) -> list[dict[str, str]]:
    """Return the error of a prompt file, which is not checked once another error was found."""
    dataset = SessionConfig.from_valid_fields(config).dataset
    if dataset.source != "file" or any(name.startswith("dataset.") for name in errors_by_option(error)):
        return []  # a data set on the hub may take half a minute
    try:
        await studio.datasets.preview(dataset)
    except Invalid as found:
        return found.fields
    except TrellisError as found:
        return [{"field": found.field or "dataset.id", "message": found.message}]
    return []


async def _initial_values(studio: Studio, preset_id: str, clone: str) -> tuple[dict[str, Any], str]:
    if clone:
        session = await studio.steering.session(clone)
        return flatten_config(session.config.model_dump(mode="json")), session.name
    if preset_id:
        return flatten_config(get_preset(preset_id).config), ""
    return {}, ""


def parse_name(sent: str) -> str | None:
    """Return the name in a form; None if it is empty. Raise Invalid."""
    try:
        return NAME_ADAPTER.validate_python(sent) if sent else None
    except ValidationError as error:
        raise invalid_from(error, prefix="name") from None
