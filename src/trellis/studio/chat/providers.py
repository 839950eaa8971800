"""External providers: servers that speak the OpenAI API, each with an address and a key.

Keys are kept in the database and sent to their server alone: never to a page, a log or an export.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from ...errors import Invalid, TrellisError, shorten
from ...store import providers as rows
from ...store.store import Store
from ..egress import host_and_port, parse_url, resolve_url
from .local_servers import LocalServers
from .provider_client import ProviderClient
from .provider_target import OptionNames, ProviderTarget
from .target import ChatTarget


class Providers:
    """The providers that were added. `own_servers` may have private addresses, and so may those that `local_servers`
    permits."""

    def __init__(self, store: Store, own_servers: Collection[str], local_servers: LocalServers) -> None:
        self._store, self._local_servers = store, local_servers
        self._client = ProviderClient(own_servers, local_servers)
        self._option_names: OptionNames = {}

    async def close(self) -> None:
        await self._client.close()

    async def list_providers(self) -> list[dict[str, Any]]:
        return [_provider_json(row) for row in await self._store.read(rows.list_providers)]

    async def add(
        self, name: str, url: str, secret: str, models: list[str], supports_pictures: bool, allow_private: bool = False
    ) -> dict[str, Any]:
        """Add a server; without `models`, ask it for its list. Raise Invalid, Refused or TrellisError.
        `allow_private` permits a private address from now on: the caller has made sure that a person at this
        computer wants it."""
        if "/" in name:
            raise Invalid(
                f"name: can't contain “/”, got “{shorten(name)}”.", field="name", next_step="Choose another name."
            )
        if unprintable := next((each for each in (name, *models) if not each.isprintable()), None):
            raise Invalid(
                f"name: “{shorten(unprintable)}” contains invisible characters.",
                field="name",
                next_step="Type it by hand.",
            )
        url = url.strip().rstrip("/")
        parse_url(url)
        if not all(32 < ord(letter) < 127 for letter in secret):
            raise Invalid("key: contains invalid characters.", field="key", next_step="Paste only the key.")
        with self._local_servers.permit_temporarily(
            await resolve_url(url) if allow_private else None
        ) as private_server:
            url, model_names = (url, models) if models else await self._discover_models(url, secret)
            await self._client.require_allowed(url)
            row = {
                "id": f"o{secrets.token_hex(8)}", "name": name, "url": url, "secret": secret, "models": model_names,
                "sees": int(supports_pictures), "created": time.time(),
            }  # fmt: skip
            if private_server:
                await asyncio.to_thread(self._local_servers.save, private_server)
            await self._store.write(rows.save_provider, row)
        return _provider_json(row)

    async def delete(self, provider_id: str) -> None:
        """Delete a server, and the permission of its address unless another server uses it."""
        await self._store.write(rows.delete_provider, provider_id)
        remaining_servers = {host_and_port(row["url"]) for row in await self._store.read(rows.list_providers)}
        await asyncio.to_thread(self._local_servers.retain_only, remaining_servers)

    async def _discover_models(self, url: str, secret: str) -> tuple[str, list[str]]:
        """Return the URL that has the API, as typed or with /v1, and its models."""
        try:
            return url, await self._client.list_models(url, secret)
        except TrellisError as error:
            if error.code not in ("remote_error", "redirected") or urlsplit(url).path:
                raise
            try:
                return f"{url}/v1", await self._client.list_models(f"{url}/v1", secret)
            except TrellisError as second:
                raise second if second.code == "wrong_key" else error from None

    async def find(self, name: str) -> ChatTarget | None:
        """Return the target called `remote:<server>/<model>`; None where there is none."""
        server, _, model = name.removeprefix("remote:").partition("/")
        row = await self._store.read(rows.provider_by_name, server)
        return ProviderTarget(self._client, self._option_names, row, model) if row and model else None


def _provider_json(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"], "name": row["name"], "url": row["url"], "has_key": bool(row["secret"]),
        "models": row["models"], "sees": bool(row["sees"]),
    }  # fmt: skip
