"""The page of connections: keys for programs that talk to the studio, and servers that the studio talks to."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from pydantic import Field, ValidationError
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ....errors import Refused, TrellisError
from ....params import invalid_from
from ....studio.studio import Studio
from ...api.connections import NewRemote
from ...api.steering import Name, OfStudio
from ...error_responses import status_of
from ...loopback import is_from_this_computer
from ...rate_limits import expensive
from ...render import render_of
from ..steering.workbench import Sent
from .rooms import done_before

router = APIRouter(include_in_schema=False)


class KeyForm(Sent):
    name: Name


class RemoteForm(Sent):
    name: str = Field(max_length=60)
    url: str = Field(max_length=500)
    key: str = Field("", max_length=500)
    models: str = Field("", max_length=20_000)
    sees: bool = False
    permit: bool = False
    """Whether the server may be in a private network, which only a person at this computer may say."""


@router.get("/connections")
async def page(request: Request, studio: OfStudio) -> HTMLResponse:
    return await show(request, studio)


async def show(
    request: Request,
    studio: Studio,
    *,
    made: str = "",
    error: TrellisError | None = None,
    sent: dict[str, Any] | None = None,
) -> HTMLResponse:
    return render_of(request).page(
        "connections/page.html",
        status_of(error) if error else 200,
        place="chat",
        keys=await studio.keys.all(),
        remotes=await studio.remotes.all(),
        made=made,
        done=done_before(request),
        may_permit=is_from_this_computer(request),
        address=str(request.base_url).rstrip("/"),
        error=error.as_json() if error else None,
        sent=sent or {"name": "", "url": "", "models": "", "sees": False, "permit": False, "had_key": False},
        request_id=secrets.token_hex(12),
    )


@router.post("/connections/keys")
async def make_key(request: Request, studio: OfStudio, form: Annotated[KeyForm, Form()]) -> Response:
    """The key is shown on the page that answers, and nowhere else."""
    await expensive(request)
    try:
        _, secret = await studio.keys.make(form.name.strip())
    except TrellisError as error:
        return await show(request, studio, error=error)
    return await show(request, studio, made=secret)


@router.post("/connections/keys/{key}/revoke")
async def revoke_key(studio: OfStudio, key: str) -> Response:
    await studio.keys.revoke(key)
    return RedirectResponse("/connections?done=revoked", 303)


@router.post("/connections/remotes")
async def add_remote(request: Request, studio: OfStudio, form: Annotated[RemoteForm, Form()]) -> Response:
    await expensive(request)
    names = [line.strip() for line in form.models.replace(",", "\n").splitlines() if line.strip()]
    sent = form.model_dump(exclude={"key"}) | {"had_key": bool(form.key)}
    try:
        if form.permit and not is_from_this_computer(request):
            raise Refused(
                "Servers in its local network can only be allowed from the computer that runs the studio.",
                code="not_local", field="url",
                next_step="Open this page there, at “localhost” or “127.0.0.1”.",
            )  # fmt: skip
        body = checked(form, names)
        await studio.remotes.add(body.name.strip(), body.url, body.key.strip(), body.models, body.sees, form.permit)
    except TrellisError as error:
        return await show(request, studio, error=error, sent=sent)
    return RedirectResponse("/connections?done=added", 303)


def checked(form: RemoteForm, names: list[str]) -> NewRemote:
    """Raises Invalid."""
    try:
        return NewRemote(name=form.name.strip(), url=form.url, key=form.key, models=names, sees=form.sees)
    except ValidationError as error:
        raise invalid_from(error) from None


@router.post("/connections/remotes/{remote}/delete")
async def delete_remote(studio: OfStudio, remote: str) -> Response:
    await studio.remotes.delete(remote)
    return RedirectResponse("/connections?done=removed", 303)
