"""The workbench, and the parts of it that are fetched again as the tree grows."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from pydantic import ConfigDict, Field, ValidationError
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ...errors import Invalid, shorten
from ...messages import CHOICE, Choice, Written
from ...params import TypedNumbers
from ...studio.journal import describe
from ...studio.report import report_of
from ...studio.session import Session
from ...texts import PROMPT_LIMIT
from ..api.steering import Name, OfSession, OfStudio, Words
from ..render import render_of
from .plant import curve, grow
from .setup import LAST

router = APIRouter(include_in_schema=False)

TREE_ROWS = 60
"""Nodes that the tree shows before a person asks for all."""


class Sent(TypedNumbers):
    """A form of the workbench. `request` names the action, so that sending it twice does it once."""

    model_config = ConfigDict(extra="forbid")
    request: str = Field(min_length=8, max_length=64, default_factory=lambda: secrets.token_hex(12))


class ChooseForm(Sent):
    offer: str = Field(max_length=100)
    choice: str = Field("", max_length=200)
    written: str = Field("", max_length=PROMPT_LIMIT)
    marked: list[int] = Field([], max_length=8)
    order: str = Field("", max_length=40)

    def said(self) -> Choice:
        """The choice as the API would have it. Raises Invalid.

        `good` calls all that are marked good; `ranked` takes them in the order in which they were marked.
        """
        try:
            if self.written:
                return Written(written=self.written)
            if self.choice in ("good", "ranked"):
                order = [int(index) for index in self.order.split(",") if index.isdecimal()] or self.marked
                if not order:
                    raise self._refusal("nothing is marked.", "Mark the options first.")
                if self.choice == "ranked":
                    return CHOICE.validate_python({"ranking": order})
                return CHOICE.validate_python(order[0] if len(order) == 1 else order)
            return CHOICE.validate_python(int(self.choice) if self.choice.isdecimal() else self.choice)
        except ValidationError:
            said = f"“{shorten(self.choice)}” is not a choice."
            raise self._refusal(said, "Press one of the buttons under the prompt.") from None

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
    """The workbench."""
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
    """The tree or the figures, as they are now."""
    values = await side_values(session, all)
    page = render_of(request).page
    if all:  # hundreds of rows take longer than the event loop may be held
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


@router.post("/steer/{session}/name")
async def name_node(request: Request, session: OfSession, form: Annotated[NodeForm, Form()]) -> Response:
    """Give a node a name, or take it away."""
    await session.name_node(form.node, form.name.strip())
    return answered(request, session)


@router.post("/steer/{session}/delete")
async def delete(session: str, studio: OfStudio) -> Response:
    await studio.steering.delete(session)
    return RedirectResponse("/", 303)
