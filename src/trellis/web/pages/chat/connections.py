"""The page of connections: keys for programs that talk to the studio, and servers that the studio talks to."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from pydantic import Field, ValidationError
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ....errors import Refused, TrellisError
from ....options import invalid_from
from ....studio.studio import Studio
from ...api.connections import NewProvider
from ...api.steering import Name, StudioDep
from ...error_responses import status_of
from ...loopback import is_local_request
from ...rate_limits import enforce_rate_limit
from ...render import get_renderer
from ..steering.workbench import ActionForm
from .rooms import done_before

router = APIRouter(include_in_schema=False)


class KeyForm(ActionForm):
    name: Name


class ProviderForm(ActionForm):
    name: str = Field(max_length=60)
    url: str = Field(max_length=500)
    key: str = Field("", max_length=500)
    models: str = Field("", max_length=20_000)
    sees: bool = False
    permit: bool = False
    """Whether the server may be in a private network, which only a person at this computer may say."""


@router.get("/connections")
async def page(request: Request, studio: StudioDep) -> HTMLResponse:
    return await render_page(request, studio)


async def render_page(
    request: Request,
    studio: Studio,
    *,
    new_key: str = "",
    error: TrellisError | None = None,
    form_values: dict[str, Any] | None = None,
) -> HTMLResponse:
    return get_renderer(request).html_response(
        "connections/page.html",
        status_of(error) if error else 200,
        place="chat",
        keys=await studio.api_keys.list_keys(),
        remotes=await studio.providers.list_providers(),
        made=new_key,
        done=done_before(request),
        may_permit=is_local_request(request),
        address=str(request.base_url).rstrip("/"),
        error=error.as_json() if error else None,
        sent=form_values or {"name": "", "url": "", "models": "", "sees": False, "permit": False, "had_key": False},
        request_id=secrets.token_hex(12),
    )


@router.post("/connections/keys")
async def create_key(request: Request, studio: StudioDep, form: Annotated[KeyForm, Form()]) -> Response:
    """The key is shown on the page that answers, and nowhere else."""
    await enforce_rate_limit(request)
    try:
        _, secret = await studio.api_keys.create(form.name.strip())
    except TrellisError as error:
        return await render_page(request, studio, error=error)
    return await render_page(request, studio, new_key=secret)


@router.post("/connections/keys/{key}/revoke")
async def revoke_key(studio: StudioDep, key: str) -> Response:
    await studio.api_keys.revoke(key)
    return RedirectResponse("/connections?done=revoked", 303)


@router.post("/connections/remotes")
async def add_provider(request: Request, studio: StudioDep, form: Annotated[ProviderForm, Form()]) -> Response:
    await enforce_rate_limit(request)
    names = [line.strip() for line in form.models.replace(",", "\n").splitlines() if line.strip()]
    form_values = form.model_dump(exclude={"key"}) | {"had_key": bool(form.key)}
    try:
        if form.permit and not is_local_request(request):
            raise Refused(
                "Servers in its local network can only be allowed from the computer that runs the studio.",
                code="not_local", field="url",
                next_step="Open this page there, at “localhost” or “127.0.0.1”.",
            )  # fmt: skip
        body = validate_form(form, names)
        await studio.providers.add(body.name.strip(), body.url, body.key.strip(), body.models, body.sees, form.permit)
    except TrellisError as error:
        return await render_page(request, studio, error=error, form_values=form_values)
    return RedirectResponse("/connections?done=added", 303)


def validate_form(form: ProviderForm, names: list[str]) -> NewProvider:
    """Parse the form. Raise Invalid."""
    try:
        return NewProvider(name=form.name.strip(), url=form.url, key=form.key, models=names, sees=form.sees)
    except ValidationError as error:
        raise invalid_from(error) from None


@router.post("/connections/remotes/{remote}/delete")
async def delete_provider(studio: StudioDep, remote: str) -> Response:
    await studio.providers.delete(remote)
    return RedirectResponse("/connections?done=removed", 303)
