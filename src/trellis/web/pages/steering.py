"""The pages of steering: the start, the workbench, and the parts of it that are fetched again as the tree grows."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ...errors import Invalid, NotFound, TrellisError, shorten
from ...messages import CHOICE, Choice, Written
from ...params import PROMPT_LIMIT, SessionConfig, invalid_from
from ...studio.journal import describe
from ...studio.session import Session
from ...studio.studio import Studio
from ..api.steering import Name, OfSession, OfStudio, Words
from ..failures import status_of
from ..render import Render
from .plant import curve, grow

router = APIRouter(include_in_schema=False)

NAME: TypeAdapter[str] = TypeAdapter(Name)
FORM_GROUPS = ("Model", "Prompts", "Answers", "Learning", "Adapter")


class Sent(BaseModel):
    """A form of the workbench. `request` names the action, so that sending it twice does it once."""

    model_config = ConfigDict(extra="forbid")
    request: str = Field(min_length=8, max_length=64, default_factory=lambda: secrets.token_hex(12))


class ChooseForm(Sent):
    offer: str = Field(max_length=100)
    choice: str = Field("", max_length=200)
    written: str = Field("", max_length=PROMPT_LIMIT)

    def said(self) -> Choice:
        """The choice as the API would have it. Raises Invalid."""
        try:
            if self.written:
                return Written(written=self.written)
            return CHOICE.validate_python(int(self.choice) if self.choice.isdecimal() else self.choice)
        except ValidationError:
            raise Invalid(
                f"choice: “{shorten(self.choice)}” is not a choice.",
                field="choice",
                next_step="Press one of the buttons under the prompt.",
            ) from None


class GotoForm(Sent):
    node: str = Field(max_length=100)


class PromptForm(Sent):
    text: Words


class RenameForm(Sent):
    name: Name


def render_of(request: Request) -> Render:
    render: Render = request.app.state.render
    return render


@router.get("/")
async def start(request: Request, studio: OfStudio) -> HTMLResponse:
    """Start with the demo, or go on where you were."""
    return await start_page(request, studio)


async def start_page(
    request: Request,
    studio: Studio,
    sent: dict[str, str] | None = None,
    name: str = "",
    error: TrellisError | None = None,
) -> HTMLResponse:
    """The first page; with what was sent and what was wrong with it, when something was."""
    known = [model["id"] for model in await studio.models.list()]
    return render_of(request).page(
        "steering/start.html",
        status_of(error) if error else 200,
        place="steer",
        sessions=await studio.steering.sessions(),
        groups=form_groups(known, sent or {}, error),
        name=name,
        error=error.as_json() if error else None,
    )


@router.post("/steer")
async def begin(request: Request, studio: OfStudio) -> Response:
    """Make a session from the form and go to its page."""
    async with request.form(max_fields=100, max_part_size=100_000) as form:
        sent = {name: value for name, value in form.items() if isinstance(value, str)}
    name = sent.pop("name", "").strip()
    key = sent.pop("request", "")
    config = {option: value for option, value in sent.items() if value.strip() or option.endswith("_prompt")}
    try:
        session = await studio.steering.create(name_from(name), config, key if 8 <= len(key) <= 64 else None)
    except (Invalid, NotFound) as error:
        return await start_page(request, studio, sent, name[:1000], error)
    return RedirectResponse(f"/steer/{session.id}", 303)


def name_from(sent: str) -> str | None:
    """The name in a form; None where it was left empty. Raises Invalid."""
    try:
        return NAME.validate_python(sent) if sent else None
    except ValidationError as error:
        raise invalid_from(error, prefix="name") from None


@router.get("/steer/{session}")
async def page(request: Request, session: OfSession, studio: OfStudio) -> HTMLResponse:
    """The workbench."""
    session.warm()
    values = await side_values(session)
    state = session.state()
    return render_of(request).page(
        "steering/page.html",
        place="steer",
        state=state,
        after=studio.hub.last(session.topic),
        request_id=secrets.token_hex(12),
        **values,
    )


@router.get("/steer/{session}/side/{part}")
async def side(request: Request, session: OfSession, part: str) -> HTMLResponse:
    """The tree or the figures, as they are now."""
    template = "steering/_tree.html" if part == "tree" else "steering/_figures.html"
    return render_of(request).page(template, state=session.state(), **await side_values(session))


async def side_values(session: Session) -> dict[str, Any]:
    path = session.tree.path(session.tree.head_id)
    made = [node.metrics for node in path if node.metrics]
    return {
        "plant": grow(session.tree),
        "labels": await session.labels(),
        "describe": describe,
        "drift_curve": curve([0.0, *(metrics.drift for metrics in made)], 200, 40),
        "share_curve": curve([metrics.share_after for metrics in made], 200, 40),
    }


def answered(request: Request, session: Session) -> Response:
    """After an action: nothing for a script (the stream tells), back to the page for a plain form."""
    if "hx-request" in request.headers:
        return Response(status_code=204)
    return RedirectResponse(f"/steer/{session.id}", 303)


@router.post("/steer/{session}/choose")
async def choose(request: Request, session: OfSession, form: Annotated[ChooseForm, Form()]) -> Response:
    await session.choose(form.offer, form.said(), form.request)
    return answered(request, session)


@router.post("/steer/{session}/skip")
async def skip(request: Request, session: OfSession, form: Annotated[Sent, Form()]) -> Response:
    await session.skip(form.request)
    return answered(request, session)


@router.post("/steer/{session}/undo")
async def undo(request: Request, session: OfSession, form: Annotated[Sent, Form()]) -> Response:
    await session.undo(form.request)
    return answered(request, session)


@router.post("/steer/{session}/redo")
async def redo(request: Request, session: OfSession, form: Annotated[Sent, Form()]) -> Response:
    await session.redo(form.request)
    return answered(request, session)


@router.post("/steer/{session}/goto")
async def goto(request: Request, session: OfSession, form: Annotated[GotoForm, Form()]) -> Response:
    await session.goto(form.node, form.request)
    return answered(request, session)


@router.post("/steer/{session}/prompt")
async def prompt(request: Request, session: OfSession, form: Annotated[PromptForm, Form()]) -> Response:
    await session.prompt(form.text, form.request)
    return answered(request, session)


@router.post("/steer/{session}/resume")
async def resume(request: Request, session: OfSession) -> Response:
    await session.resume()
    return answered(request, session)


@router.post("/steer/{session}/rename")
async def rename(request: Request, session: OfSession, form: Annotated[RenameForm, Form()]) -> Response:
    await session.rename(form.name)
    return answered(request, session)


@router.post("/steer/{session}/delete")
async def delete(session: str, studio: OfStudio) -> Response:
    await studio.steering.delete(session)
    return RedirectResponse("/", 303)


def form_groups(
    models: list[str], sent: dict[str, str], error: TrellisError | None
) -> list[tuple[str, list[dict[str, Any]]]]:
    """The options of a session as a form shows them, from the rows in params.py, with what was sent and refused."""
    refused = error.fields if isinstance(error, Invalid) else []
    wrong = {entry["field"].removeprefix("config."): entry["message"] for entry in refused}
    if error and error.field:
        wrong.setdefault(error.field.removeprefix("config."), error.message)
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in FORM_GROUPS}
    for name, field in SessionConfig.model_fields.items():
        about = field.json_schema_extra
        if not isinstance(about, dict) or name == "dataset":
            continue
        limits = {key: getattr(rule, key) for rule in field.metadata for key in ("ge", "le", "gt", "lt")
                  if hasattr(rule, key)}  # fmt: skip
        whole = field.annotation is int
        text = field.annotation is str
        groups[str(about["group"])].append(
            {
                "name": name, "title": field.title, "help": field.description, "default": field.default,
                "value": sent.get(name, field.default), "error": wrong.get(name, ""),
                "choices": models if name == "model" else [],
                "unit": about["unit"], "advanced": about["advanced"], "text": text,
                "long": name.endswith("_prompt"), "min": limits.get("ge", limits.get("gt")),
                "max": limits.get("le", limits.get("lt")), "step": "1" if whole else "any",
            }
        )  # fmt: skip
    return list(groups.items())
