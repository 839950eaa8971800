"""Requests to external servers that speak the OpenAI API: checked addresses, one client, and errors by name.

It does not know what is asked or how answers are read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from ...errors import Invalid, TrellisError, shorten
from ..egress import CheckedUrl, check_url
from .local_servers import LocalServers
from .openai_completions import MAX_BODY_BYTES, error_message

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS, READ_SECONDS = 10.0, 120.0
MAX_MODELS = 500


class ProviderClient:
    """Sends requests. `own_servers` may have private addresses, and so may those that `local_servers` permits."""

    def __init__(self, own_servers: Collection[str], local_servers: LocalServers) -> None:
        self._own_servers, self._local_servers = own_servers, local_servers
        self._client: httpx.AsyncClient | None = None
        self._client_lock = asyncio.Lock()

    async def close(self) -> None:
        if self._client:
            await self._client.aclose()

    async def require_allowed(self, url: str) -> None:
        """Raise Refused. An unreachable server may be added: its address is checked again before every request."""
        try:
            await check_url(url, self._own_servers, self._local_servers.is_permitted)
        except TrellisError as error:
            if error.code != "network":
                raise

    async def list_models(self, url: str, secret: str) -> list[str]:
        async with self.open_response("GET", url, "/models", secret) as response:
            body = await read_body(response)
        try:
            data = json.loads(body)["data"]
            ids = [each["id"] for each in data]
            names = [each for each in ids if isinstance(each, str) and 0 < len(each) <= 200 and each.isprintable()]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise not_openai_api_error(url) from None
        if not names:
            raise Invalid(
                f"The server at “{shorten(url)}” lists no models.", field="models", next_step="Enter its model names."
            )
        return sorted(names)[:MAX_MODELS]

    async def _get_client(self) -> httpx.AsyncClient:
        """Return the client, made in a thread because loading certificates takes 0.1 s. It keeps no connections
        alive: one must not be reused for another name at the same address."""
        async with self._client_lock:
            if self._client is None:
                self._client = await asyncio.to_thread(_new_client)
            return self._client

    @asynccontextmanager
    async def open_response(
        self, method: str, url: str, path: str, secret: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Open a response with a good status. The address is resolved and checked now and used as it is; redirects
        are not followed. Raise TrellisError."""
        import httpx  # imported late: most studios use no provider

        checked_url = await check_url(url, self._own_servers, self._local_servers.is_permitted)
        headers = {
            "host": checked_url.host_header,
            "accept": "application/json, text/event-stream",
            "accept-encoding": "identity",
        }
        if secret:
            headers["authorization"] = f"Bearer {secret}"
        try:
            client = await self._get_client()
            async with client.stream(
                method, checked_url.url + path, headers=headers, json=body,
                extensions={"sni_hostname": checked_url.host} if checked_url.scheme == "https" else {},
            ) as response:  # fmt: skip
                if response.status_code not in (200, 201):
                    response_text = (await read_body(response, 4000)).decode("utf-8", "replace")
                    raise _status_error(checked_url, response.status_code, response_text, secret)
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise TrellisError(
                f"The server “{shorten(checked_url.host_header)}” {_describe_failure(error)}.", code="network",
                field="url",
                next_step="Check that it is running and that its address is right.",
            ) from None  # fmt: skip


class ProviderError(TrellisError):
    """A server answered with an error of its own; `response_text` has it."""

    def __init__(self, message: str, response_text: str, **more: Any) -> None:
        super().__init__(message, **more)
        self.response_text = response_text


def not_openai_api_error(where: str) -> TrellisError:
    return TrellisError(
        f"The server at “{shorten(where)}” doesn't offer an OpenAI-compatible API.", code="remote_error", field="url",
        next_step="Check the address; it usually ends in /v1.",
    )  # fmt: skip


async def read_body(response: httpx.Response, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > max_bytes:
            return bytes(body[:max_bytes])
    return bytes(body)


def _status_error(checked_url: CheckedUrl, status: int, response_text: str, secret: str) -> TrellisError:
    if 300 <= status < 400:
        return TrellisError(
            f"The server “{shorten(checked_url.host_header)}” redirects to another address; redirects are "
            "not followed.",
            code="redirected", field="url", next_step="Add that address instead.",
        )  # fmt: skip
    if status in (401, 403):
        return TrellisError(
            f"The server “{shorten(checked_url.host_header)}” rejected the key.", code="wrong_key", field="key",
            next_step="Check the key, and add the server again.",
        )  # fmt: skip
    try:
        data = json.loads(response_text)
        server_message = redact(secret, error_message(data) or "") if isinstance(data, dict) else ""
    except (ValueError, RecursionError):
        server_message = ""
    response_text = redact(secret, response_text)
    next_step = "Try again, or check that server's log."
    if status == 404:
        next_step = "Check the address (it usually ends in /v1) and the model name."
    elif status == 429:
        next_step = "Wait a moment, or check your account there."
    return ProviderError(
        f"The server “{shorten(checked_url.host_header)}” answered {status}: "
        f"{shorten(server_message or response_text or 'nothing', 200)}",
        response_text,
        code="remote_error", next_step=next_step,
    )  # fmt: skip


def redact(secret: str, text: str) -> str:
    return text.replace(secret, "…") if secret else text


def _describe_failure(error: Exception) -> str:
    import httpx

    match error:
        case httpx.ConnectTimeout():
            return f"didn't respond within {CONNECT_SECONDS:.0f} seconds"
        case httpx.ConnectError():
            return "can't be reached: nothing is listening at its address and port"
        case httpx.TimeoutException():
            return f"sent nothing for {READ_SECONDS:.0f} seconds"
        case httpx.RemoteProtocolError() | httpx.ReadError():
            return "closed the connection in the middle of its answer"
    return f"can't be reached ({type(error).__name__})"


def _new_client() -> httpx.AsyncClient:
    import httpx

    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False, trust_env=False)
