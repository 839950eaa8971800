"""The workbench, and its parts that are fetched again as the tree grows."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ....errors import Invalid, shorten
from ....messages import CHOICE, Choice, Written
from ....studio.review.journal import describe
from ....studio.steering.last_pick import report_of
from ....studio.steering.session import Session
from ....text_rules import PROMPT_LIMIT
from ...api.steering import Name, OfSession, OfStudio, Words
from ...render import render_of
from .setup import LAST
from .tree_layout import curve, grow

router = APIRouter(include_in_schema=False)

TREE_ROWS = 60
"""Nodes that the tree shows unless all are requested."""


class Sent(BaseModel):
    """A form of the workbench. `request` makes a repeated request idempotent."""

    model_config = ConfigDict(extra="forbid")
    request: str = Field(min_length=8, max_length=64, default_factory=lambda: secrets.token_hex(12))


class ChooseForm(Sent):
    offer: str = Field(max_length=100)
    choice: str = Field("", max_length=200)
    written: str = Field("", max_length=PROMPT_LIMIT)
    marked: list[int] = Field([], max_length=8)
    order: str = Field("", max_length=40)

    def said(self) -> Choice:
        """Return the choice as the API takes it. Raises Invalid.

        `good` means that all ticked answers are good; `ranked`, that they were ticked best first.
        """
        try:
            if self.written:
                return Written(written=self.written)
            if self.choice in ("good", "ranked"):
                order = [int(index) for index in self.order.split(",") if index.isdecimal()] or self.marked
                if not order:
                    raise self._refusal("nothing is ticked.", "Tick the answers first.")
                if self.choice == "ranked":
                    return CHOICE.validate_python({"ranking": order})
                return CHOICE.validate_python(order[0] if len(order) == 1 else order)
            return CHOICE.validate_python(int(self.choice) if self.choice.isdecimal() else self.choice)
        except ValidationError:
            said = f"“{shorten(self.choice)}” is not a choice."
            raise self._refusal(said, "Use the buttons under the prompt.") from None

    def _refusal(self, what: str, next_step: str) -> Invalid:
        return Invalid(f"choice: {what}", field="choice", next_step=next_step)


class GotoForm(Sent):
    node: str = Field(max_length=100)


class PromptForm(Sent):
    text: Words


class RenameForm(Sent):
    name: Name


class NodeForm(Sent):
    node: str = Field(max_length=100)
    name: str = Field("", max_length=200)


@router.get("/steer/{session}")
async def page(
    request: Request, session: OfSession, studio: OfStudio, view: Literal["answers", "tree", "figures"] = "answers"
) -> HTMLResponse:
    """Show the workbench."""
    session.warm()
    values = await side_values(session)
    state = session.state()
    response = render_of(request).page(
        "steering/page.html",
        place="steer",
        state=state,
        view=view,
        after=studio.hub.last(session.topic),
        request_id=secrets.token_hex(12),
        **values,
    )
    secure = request.url.scheme == "https"
    response.set_cookie(LAST, session.id, max_age=90 * 86_400, httponly=True, samesite="lax", secure=secure)
    return response


@router.get("/steer/{session}/side/{part}")
async def side(
    request: Request, session: OfSession, part: Literal["tree", "figures"], all: Annotated[bool, Query()] = False
) -> HTMLResponse:
    """Return the current tree or metrics."""
    values = await side_values(session, all)
    page = render_of(request).page
    if all:  # rendering hundreds of rows would block the event loop
        return await asyncio.to_thread(page, f"steering/_{part}.html", state=session.state(), **values)
    return page(f"steering/_{part}.html", state=session.state(), **values)


async def side_values(session: Session, all: bool = False) -> dict[str, Any]:
    path = session.tree.path(session.tree.head_id)
    made = [node.metrics for node in path if node.metrics]
    return {
        "plant": grow(session.tree, None if all else TREE_ROWS),
        "labels": await session.labels(),
        "head_name": session.tree.head.name,
        "describe": describe,
        "report": report_of(path),
        "drift_curve": curve([0.0, *(metrics.drift for metrics in made)], 200, 40),
        "share_curve": curve([metrics.share_after for metrics in made], 200, 40),
    }


def answered(request: Request, session: Session) -> Response:
    """Respond to an action: nothing for a script, which follows the event stream; a redirect for a plain form."""
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


@router.post("/steer/{session}/name")
async def name_node(request: Request, session: OfSession, form: Annotated[NodeForm, Form()]) -> Response:
    """Name a node, or remove its name."""
    await session.name_node(form.node, form.name.strip())
    return answered(request, session)


@router.post("/steer/{session}/delete")
async def delete(session: str, studio: OfStudio) -> Response:
    await studio.steering.delete(session)
    return RedirectResponse("/", 303)
