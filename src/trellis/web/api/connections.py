"""The JSON API of connections: API keys, and external providers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import AfterValidator, Field
from starlette.responses import Response

from ...text_rules import require_storable
from ..rate_limits import enforce_rate_limit
from .steering import Name, RequestBody, StudioDep

router = APIRouter(prefix="/api", tags=["connections"])

ShortText = Annotated[str, Field(max_length=500), AfterValidator(require_storable)]


class NewKey(RequestBody):
    name: Name


class NewProvider(RequestBody):
    name: Annotated[
        str, Field(min_length=1, max_length=60, pattern=r"^[^/@\s][^/@]*$"), AfterValidator(require_storable)
    ]
    url: ShortText
    key: ShortText = ""
    models: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field([], max_length=500)
    sees: bool = False


@router.get("/keys")
async def keys(studio: StudioDep) -> list[dict[str, Any]]:
    """The API keys of `/v1`, each by its first characters only."""
    return await studio.api_keys.list_keys()


@router.post("/keys", status_code=201, dependencies=[Depends(enforce_rate_limit)])
async def create_key(body: NewKey, studio: StudioDep) -> dict[str, Any]:
    """Create an API key. `key` is shown this once."""
    about, secret = await studio.api_keys.create(body.name.strip())
    return about | {"key": secret}


@router.delete("/keys/{key}", status_code=204)
async def revoke_key(key: str, studio: StudioDep) -> Response:
    await studio.api_keys.revoke(key)
    return Response(status_code=204)


@router.get("/remotes")
async def providers(studio: StudioDep) -> list[dict[str, Any]]:
    """External providers, without their keys."""
    return await studio.providers.list_providers()


@router.post("/remotes", status_code=201, dependencies=[Depends(enforce_rate_limit)])
async def add_provider(body: NewProvider, studio: StudioDep) -> dict[str, Any]:
    """Add a server with an OpenAI-compatible API. Without `models`, the server is asked for its list."""
    return await studio.providers.add(body.name.strip(), body.url, body.key.strip(), body.models, body.sees)


@router.delete("/remotes/{remote}", status_code=204)
async def delete_provider(remote: str, studio: StudioDep) -> Response:
    await studio.providers.delete(remote)
    return Response(status_code=204)
