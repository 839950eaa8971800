"""The JSON API of what is connected: keys for programs that ask here, and servers that are asked."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import AfterValidator, Field
from starlette.responses import Response

from ...text_rules import storable
from ..rate_limits import expensive
from .steering import Body, Name, OfStudio

router = APIRouter(prefix="/api", tags=["connections"])

Short = Annotated[str, Field(max_length=500), AfterValidator(storable)]


class NewKey(Body):
    name: Name


class NewRemote(Body):
    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[^/@\s][^/@]*$"), AfterValidator(storable)]
    url: Short
    key: Short = ""
    models: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field([], max_length=500)
    sees: bool = False


@router.get("/keys")
async def keys(studio: OfStudio) -> list[dict[str, Any]]:
    """Keys of the OpenAI API: what they begin with, never more."""
    return await studio.keys.all()


@router.post("/keys", status_code=201, dependencies=[Depends(expensive)])
async def make_key(body: NewKey, studio: OfStudio) -> dict[str, Any]:
    """A new key. `key` is told this once."""
    about, secret = await studio.keys.make(body.name.strip())
    return about | {"key": secret}


@router.delete("/keys/{key}", status_code=204)
async def revoke_key(key: str, studio: OfStudio) -> Response:
    await studio.keys.revoke(key)
    return Response(status_code=204)


@router.get("/remotes")
async def remotes(studio: OfStudio) -> list[dict[str, Any]]:
    """Servers of models elsewhere, without their keys."""
    return await studio.remotes.all()


@router.post("/remotes", status_code=201, dependencies=[Depends(expensive)])
async def add_remote(body: NewRemote, studio: OfStudio) -> dict[str, Any]:
    """Add a server that speaks the OpenAI API. Its models are asked for where none are named."""
    return await studio.remotes.add(body.name.strip(), body.url, body.key.strip(), body.models, body.sees)


@router.delete("/remotes/{remote}", status_code=204)
async def delete_remote(remote: str, studio: OfStudio) -> Response:
    await studio.remotes.delete(remote)
    return Response(status_code=204)
