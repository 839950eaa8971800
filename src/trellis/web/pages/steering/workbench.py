"""The workbench, and its parts that are fetched again as the tree grows."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from pydantic import ConfigDict, Field, ValidationError
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ....errors import Invalid, shorten
from ....messages import CHOICE, Choice, Written
from ....options import TypedNumbers
from ....studio.review import describe_choice
from ....studio.steering import Session, last_pick_report
from ....text_rules import PROMPT_LIMIT
from ...api.steering import Name, PromptText, SessionDep, StudioDep
from ...render import get_renderer
from .setup import LAST_SESSION_COOKIE
from .tree_layout import layout_tree, polyline_points

router = APIRouter(include_in_schema=False)

TREE_NODES_SHOWN = 60
"""Nodes that the tree shows unless all are requested."""


class ActionForm(TypedNumbers):
    """A form of the workbench. `request` makes a repeated request idempotent."""

    model_config = ConfigDict(extra="forbid")
    request: str = Field(min_length=8, max_length=64, default_factory=lambda: secrets.token_hex(12))


class ChooseForm(ActionForm):
    offer: str = Field(max_length=100)
    choice: str = Field("", max_length=200)
    written: str = Field("", max_length=PROMPT_LIMIT)
    marked: list[int] = Field([], max_length=8)
    order: str = Field("", max_length=40)

    def parse_choice(self) -> Choice:
        """Return the choice as the API accepts it. Raise Invalid.

        `good` means that all ticked answers are good; `ranked`, that they were ticked best first.
        """
        try:
            if self.written:
                return Written(written=self.written)
            if self.choice in ("good", "ranked"):
                order = [int(index) for index in self.order.split(",") if index.isdecimal()] or self.marked
                if not order:
                    raise self._invalid_choice("nothing is ticked.", "Tick the answers first.")
                if self.choice == "ranked":
                    return CHOICE.validate_python({"ranking": order})
                return CHOICE.validate_python(order[0] if len(order) == 1 else order)
            return CHOICE.validate_python(int(self.choice) if self.choice.isdecimal() else self.choice)
        except ValidationError:
            problem = f"“{shorten(self.choice)}” is not a choice."
            raise self._invalid_choice(problem, "Use the buttons under the prompt.") from None

    def _invalid_choice(self, problem: str, next_step: str) -> Invalid:
        return Invalid(f"choice: {problem}", field="choice", next_step=next_step)


class GotoForm(ActionForm):
    node: str = Field(max_length=100)


class PromptForm(ActionForm):
    text: PromptText


class RenameForm(ActionForm):
    name: Name


class NodeNameForm(ActionForm):
    node: str = Field(max_length=100)
    name: str = Field("", max_length=200)


@router.get("/steer/{session}")
async def page(
    request: Request, session: SessionDep, studio: StudioDep, view: Literal["answers", "tree", "figures"] = "answers"
) -> HTMLResponse:
    """Show the workbench."""
    session.preload_model()
    values = await side_context(session)
    state = session.state()
    response = get_renderer(request).html_response(
        "steering/page.html",
        place="steer",
        state=state,
        view=view,
        after=studio.hub.last_event_id(session.topic),
        request_id=secrets.token_hex(12),
        **values,
    )
    secure = request.url.scheme == "https"
    response.set_cookie(
        LAST_SESSION_COOKIE, session.id, max_age=90 * 86_400, httponly=True, samesite="lax", secure=secure
    )
    return response


@router.get("/steer/{session}/side/{part}")
async def side_panel(
    request: Request, session: SessionDep, part: Literal["tree", "figures"], all: Annotated[bool, Query()] = False
) -> HTMLResponse:
    """Return the current tree or metrics."""
    values = await side_context(session, all)
    page = get_renderer(request).html_response
    if all:  # rendering hundreds of rows would block the event loop
        return await asyncio.to_thread(page, f"steering/_{part}.html", state=session.state(), **values)
    return page(f"steering/_{part}.html", state=session.state(), **values)


async def side_context(session: Session, all: bool = False) -> dict[str, Any]:
    path = session.tree.path(session.tree.head_id)
    made = [node.metrics for node in path if node.metrics]
    return {
        "plant": layout_tree(session.tree, None if all else TREE_NODES_SHOWN),
        "labels": await session.nodes.labels(),
        "head_name": session.tree.head.name,
        "describe": describe_choice,
        "report": last_pick_report(path),
        "drift_curve": polyline_points([0.0, *(metrics.drift for metrics in made)], 200, 40),
        "share_curve": polyline_points([metrics.share_after for metrics in made], 200, 40),
    }


def action_response(request: Request, session: Session) -> Response:
    """Respond to an action: nothing for a script, which follows the event stream; a redirect for a plain form."""
    if "hx-request" in request.headers:
        return Response(status_code=204)
    return RedirectResponse(f"/steer/{session.id}", 303)


@router.post("/steer/{session}/choose")
async def choose(request: Request, session: SessionDep, form: Annotated[ChooseForm, Form()]) -> Response:
    await session.commands.choose(form.offer, form.parse_choice(), form.request)
    return action_response(request, session)


@router.post("/steer/{session}/skip")
async def skip(request: Request, session: SessionDep, form: Annotated[ActionForm, Form()]) -> Response:
    await session.commands.skip(form.request)
    return action_response(request, session)


@router.post("/steer/{session}/undo")
async def undo(request: Request, session: SessionDep, form: Annotated[ActionForm, Form()]) -> Response:
    await session.commands.undo(form.request)
    return action_response(request, session)


@router.post("/steer/{session}/redo")
async def redo(request: Request, session: SessionDep, form: Annotated[ActionForm, Form()]) -> Response:
    await session.commands.redo(form.request)
    return action_response(request, session)


@router.post("/steer/{session}/goto")
async def goto(request: Request, session: SessionDep, form: Annotated[GotoForm, Form()]) -> Response:
    await session.commands.go_to(form.node, form.request)
    return action_response(request, session)


@router.post("/steer/{session}/prompt")
async def prompt(request: Request, session: SessionDep, form: Annotated[PromptForm, Form()]) -> Response:
    await session.commands.replace_prompt(form.text, form.request)
    return action_response(request, session)


@router.post("/steer/{session}/resume")
async def resume(request: Request, session: SessionDep) -> Response:
    await session.commands.resume()
    return action_response(request, session)


@router.post("/steer/{session}/rename")
async def rename(request: Request, session: SessionDep, form: Annotated[RenameForm, Form()]) -> Response:
    await session.commands.rename(form.name)
    return action_response(request, session)


@router.post("/steer/{session}/name")
async def name_node(request: Request, session: SessionDep, form: Annotated[NodeNameForm, Form()]) -> Response:
    """Name a node, or remove its name."""
    await session.commands.name_node(form.node, form.name.strip())
    return action_response(request, session)


@router.post("/steer/{session}/delete")
async def delete(session: str, studio: StudioDep) -> Response:
    await studio.steering.delete(session)
    return RedirectResponse("/", 303)
