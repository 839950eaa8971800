"""Access checks: Host, Origin, login and API keys.

Plain ASGI, outside the application, so that a refused request costs nothing and streams are not buffered.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import Refused, shorten
from ..settings import Settings, is_loopback
from ..studio.chat import KEY_PREFIX, ApiKeys
from .login_guard import LoginGuard, cookie_token
from .numbers import set_reader
from .openai_errors import is_openai_path
from .response_headers import preflight_headers, send_error, send_response, with_cors, with_security_headers

MAX_BODY = 2_000_000
"""The largest request body in bytes; 100,000 characters of a prompt are less in any script."""
MAX_FILE = 12_000_000
"""The largest body that is an attachment or an import."""
LARGE_BODY_PATH_SUFFIXES = ("/files", "/import")
HOST_PATTERN = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
PUBLIC_PATHS = {"/login", "/healthz", "/readyz"}


class AccessMiddleware:
    """The outermost layer: refused requests reach nothing else."""

    def __init__(self, app: ASGIApp, settings: Settings, guard: LoginGuard, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys
        self._allowed_hosts = settings.host_names
        self._allows_any_ip = not is_loopback(settings.host)
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        set_reader(headers.get("accept-language", ""))
        is_openai_request = scope["type"] == "http" and is_openai_path(scope["path"])
        key: str | None = None
        try:
            self._check_host(headers)
            if is_openai_request and is_preflight(scope, headers):
                await send_response(send, 200, b"", preflight_headers(headers))
                return
            if is_openai_request and (sent_key := bearer_token(headers)):
                # A browser never sends a key by itself, so requests with one may come from any site.
                scope["trellis.key"] = key = await self._keys.find_key_id(sent_key)
                if key is not None:
                    send = with_cors(send)
                elif self._guard.requires_password or sent_key.startswith(KEY_PREFIX) or is_cross_origin(headers):
                    # Any page may read that its key is invalid, and nothing else.
                    await send_error(scope, with_cors(send), 401, invalid_api_key_error())
                    return
            if key is None and (scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS):
                check_origin(headers)
            check_content_length(headers, MAX_FILE if scope["path"].endswith(LARGE_BODY_PATH_SUFFIXES) else MAX_BODY)
        except Refused as error:
            await send_error(scope, send, {"bad_host": 400, "too_large": 413}.get(error.code, 403), error)
            return
        if key is not None:
            await self._app(scope, receive, with_security_headers(scope, send))
            return
        token = cookie_token(headers)
        if is_openai_request and self._guard.requires_password and not await self._guard.is_valid_token(token):
            await send_error(scope, send, 401, invalid_api_key_error())
            return
        is_open = scope["path"] in PUBLIC_PATHS or scope["path"].startswith("/static/")
        if self._guard.requires_password and not is_open and not await self._guard.is_valid_token(token):
            await self._require_login(scope, headers, send)
            return
        if self._guard.requires_password:
            await self._run_until_logout(scope, receive, with_security_headers(scope, send), token)
        else:
            await self._app(scope, receive, with_security_headers(scope, send))

    def _check_host(self, headers: Headers) -> None:
        """Refuse foreign names: they mean that another site's name was pointed at this server (DNS rebinding)."""
        if len(headers.getlist("host")) == 1:
            name = host_name(headers["host"])
            if name in self._allowed_hosts or (self._allows_any_ip and _is_ip_address(name)):
                return
        raise Refused(
            f"“{shorten(headers.get('host', ''))}” is not a name of this server.",
            code="bad_host",
            next_step="Use the address printed at startup, or add the name to TRELLIS_ALLOWED_HOSTS.",
        )

    async def _require_login(self, scope: Scope, headers: Headers, send: Send) -> None:
        wants_page = "text/html" in headers.get("accept", "") and "hx-request" not in headers
        if scope["type"] == "http" and wants_page and scope["method"] == "GET":
            location = f"/login?next={quote(scope['path'])}".encode("latin-1")
            await send_response(send, 303, b"", [(b"location", location), (b"content-type", b"text/plain")])
            return
        error = Refused("You are not logged in.", code="login_required", next_step="Log in at /login.")
        await send_error(scope, send, 401, error)

    async def _run_until_logout(self, scope: Scope, receive: Receive, send: Send, token: str) -> None:
        """Run a request, but no longer than its login lasts."""
        logout_event = self._guard.add_logout_event(token)
        request_task = asyncio.ensure_future(_run_app(self._app, scope, receive, send))
        logout_wait = asyncio.create_task(logout_event.wait())
        try:
            await asyncio.wait({request_task, logout_wait}, return_when=asyncio.FIRST_COMPLETED)
            if not request_task.done() and (scope["type"] == "websocket" or scope["method"] in SAFE_METHODS):
                request_task.cancel()  # reading is cut off; an action that has begun is finished
            await asyncio.wait({request_task})
            if not request_task.cancelled():
                request_task.result()
        finally:
            logout_wait.cancel()
            request_task.cancel()
            self._guard.remove_logout_event(token, logout_event)


async def _run_app(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def check_origin(headers: Headers) -> None:
    """Refuse changes that another site's page sends. Programs send neither header."""
    if is_cross_origin(headers):
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        raise Refused(
            f"This request came from another site (“{shorten(origin or site or '')}”).",
            code="foreign_origin",
            next_step="Use Trellis' own pages.",
        )


def is_cross_origin(headers: Headers) -> bool:
    """Return whether a page of another site sent this."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None and site not in {"same-origin", "none"}:
        return True
    return origin is not None and origin_host(origin) not in _host_variants(headers.get("host", "").lower(), origin)


def is_preflight(scope: Scope, headers: Headers) -> bool:
    """Return whether this is a CORS preflight request (Fetch standard)."""
    return bool(scope["method"] == "OPTIONS" and headers.get("origin") and headers.get("access-control-request-method"))


def invalid_api_key_error() -> Refused:
    return Refused(
        "An API key of this studio is required.",
        code="invalid_api_key",
        next_step="Create one on the Connections page and send it as “Authorization: Bearer …”.",
    )


def _host_variants(host: str, origin: str) -> set[str]:
    """Return a Host with and without the default port of the scheme, which a proxy may have added."""
    port = ":443" if origin.lower().startswith("https:") else ":80"
    return {host, host.removesuffix(port)}


def check_content_length(headers: Headers, limit: int = MAX_BODY) -> None:
    """Refuse a body whose length is too large, unread. Without a length it is cut off while it is read."""
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdecimal() or int(length[:18]) > limit:
        raise Refused(
            f"The request is too large: “{shorten(length, 20)}” bytes, the limit is {limit}.",
            code="too_large",
            next_step="Send less at a time.",
        )


def origin_host(origin: str) -> str | None:
    """Return host and port of an origin in lower case; None for an invalid one."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def host_name(host: str) -> str:
    """Return the name in a Host header in lower case, without the port; empty for an invalid one."""
    found = HOST_PATTERN.fullmatch(host.strip().lower())
    return found[1] if found else ""


def bearer_token(headers: Headers) -> str:
    """Return the key in an Authorization header; empty where there is none."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
