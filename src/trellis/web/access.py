"""Who asks, and from where: Host, Origin, login, and the headers that hold a browser to our own files.

Plain ASGI, outside everything else, so that a refused request costs nothing and a stream is not buffered.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import re
import secrets
import time
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote, urlsplit

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import Refused, TrellisError, shorten
from ..settings import Settings, is_loopback
from ..store import logins
from ..store.store import Store
from ..studio.chat.api_keys import KEY_PREFIX, ApiKeys
from .numbers import set_reader
from .openai_errors import is_openai_path, to_openai_error

LOGIN_COOKIE = "trellis"
LOGIN_DAYS = 30
MAX_BODY = 2_000_000
"""Bytes in a request's body; a prompt is at most 100,000 characters, which is less than this in any script."""
MAX_FILE = 12_000_000
"""Bytes in a body that is a file for a room, or a room that is brought in."""
LARGE_BODY_PATH_SUFFIXES = ("/files", "/import")
HOST_PATTERN = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
PUBLIC_PATHS = {"/login", "/healthz", "/readyz"}

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
CORS_HEADERS = {
    "access-control-allow-origin": "*",
    "access-control-allow-methods": "GET, POST",
    "access-control-max-age": "600",
    "vary": "Origin, Access-Control-Request-Headers",
}
"""What a page of another site is told at `/v1`, where a key opens it. Any origin, and so never with cookies: browsers
refuse `*` for requests that carry them."""
HEADER_NAMES_PATTERN = re.compile(r"[A-Za-z0-9-]{1,60}( *, *[A-Za-z0-9-]{1,60}){0,40}")


class LoginGuard:
    """One owner's password, and the tokens that stand for it. Tokens are stored as hashes only."""

    def __init__(self, settings: Settings, store: Store) -> None:
        password = settings.password.get_secret_value()
        self._store = store
        self._hasher = PasswordHasher()
        self._password_hash = self._hasher.hash(password) if password else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._rates = parse("5 per minute"), parse("30 per minute")
        self._login_lock = asyncio.Lock()
        self._login_times: dict[str, float] = {}
        self.logout_events: dict[str, set[asyncio.Event]] = {}

    @property
    def requires_password(self) -> bool:
        """Whether this server asks for a password at all."""
        return self._password_hash is not None

    async def login(self, password: str, client: str) -> str:
        """A new token. Raises Refused for a wrong password or too many tries."""
        async with self._login_lock:  # a hash takes 64 MB while it is made
            if not all(self._limiter.test(rate, "login", who) for rate, who in self._rate_limits(client)):
                raise Refused("Too many attempts.", code="too_many_tries", next_step="Wait a minute.")
            is_correct = self._password_hash is not None and await asyncio.to_thread(
                self._password_matches, password[:1024]
            )
            if not is_correct:
                for rate, who in self._rate_limits(client):
                    self._limiter.hit(rate, "login", who)
        if not is_correct:
            raise Refused("Wrong password.", code="wrong_password", next_step="Try again.", field="password")
        token = secrets.token_urlsafe(32)
        await self._store.write(logins.add_login, _hash_token(token), time.time())
        return token

    async def is_valid_token(self, token: str) -> bool:
        """Whether a token stands for a login that has not ended."""
        if not token:
            return False
        hashed = _hash_token(token)
        if hashed not in self._login_times:
            created = await self._store.read(logins.login_created, hashed)
            if created is None:
                return False
            self._login_times[hashed] = created
        return time.time() - self._login_times[hashed] < LOGIN_DAYS * 86_400

    async def logout(self, token: str) -> None:
        """End a login and every stream that was opened with it."""
        hashed = _hash_token(token)
        await self._store.write(logins.delete_login, hashed)
        self._login_times.pop(hashed, None)
        for logout_event in self.logout_events.pop(hashed, set()):
            logout_event.set()

    def add_logout_event(self, token: str) -> asyncio.Event:
        """An event that is set when the login of a token ends."""
        logout_event = asyncio.Event()
        self.logout_events.setdefault(_hash_token(token), set()).add(logout_event)
        return logout_event

    def remove_logout_event(self, token: str, logout_event: asyncio.Event) -> None:
        watchers = self.logout_events.get(_hash_token(token), set())
        watchers.discard(logout_event)
        if not watchers:
            self.logout_events.pop(_hash_token(token), None)

    def _rate_limits(self, client: str) -> list[tuple[RateLimitItem, str]]:
        """Wrong passwords are counted for each client, and for all of them together."""
        return [(self._rates[0], client), (self._rates[1], "everyone")]

    def _password_matches(self, password: str) -> bool:
        try:
            return self._hasher.verify(self._password_hash or "", password.encode("utf-8", "replace"))
        except VerifyMismatchError:
            return False


class AccessMiddleware:
    """The outermost layer: what does not pass here reaches nothing."""

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
                # A key is nothing that a browser sends by itself, so whoever sends one may come from any site.
                scope["trellis.key"] = key = await self._keys.find_key_id(sent_key)
                if key is not None:
                    send = with_cors(send)
                elif self._guard.requires_password or sent_key.startswith(KEY_PREFIX) or is_cross_origin(headers):
                    # The page that sent it may read that it is none; nothing else is said to it.
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
        """A foreign name in Host means that another site's name was pointed at this server (DNS rebinding)."""
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
        """Run a request, but no longer than the login that it came with."""
        logout_event = self._guard.add_logout_event(token)
        request_task = asyncio.ensure_future(_run_app(self._app, scope, receive, send))
        logout_wait = asyncio.create_task(logout_event.wait())
        try:
            await asyncio.wait({request_task, logout_wait}, return_when=asyncio.FIRST_COMPLETED)
            if not request_task.done() and (scope["type"] == "websocket" or scope["method"] in SAFE_METHODS):
                request_task.cancel()  # what only reads is cut off; an action that has begun is let finish
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
    """A change must come from our own pages, or from a program (which sends neither header)."""
    if is_cross_origin(headers):
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        raise Refused(
            f"This request came from another site (“{shorten(origin or site or '')}”).",
            code="foreign_origin",
            next_step="Use Trellis' own pages.",
        )


def is_cross_origin(headers: Headers) -> bool:
    """Whether a page of another site sent this."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None and site not in {"same-origin", "none"}:
        return True
    return origin is not None and origin_host(origin) not in _host_variants(headers.get("host", "").lower(), origin)


def is_preflight(scope: Scope, headers: Headers) -> bool:
    """Whether a browser asks if a page may send something (the CORS protocol of the Fetch standard)."""
    return bool(scope["method"] == "OPTIONS" and headers.get("origin") and headers.get("access-control-request-method"))


def preflight_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Yes: what is sent is looked at when it comes. The headers that were asked for may be sent, a key among them."""
    asked = headers.get("access-control-request-headers", "")
    allowed = asked if HEADER_NAMES_PATTERN.fullmatch(asked.strip()) else "authorization, content-type"
    response_headers = CORS_HEADERS | {"access-control-allow-headers": allowed}
    return [(name.encode(), value.encode()) for name, value in response_headers.items()]


def invalid_api_key_error() -> Refused:
    return Refused(
        "An API key of this studio is required.",
        code="invalid_api_key",
        next_step="Create one on the Connections page and send it as “Authorization: Bearer …”.",
    )


def _host_variants(host: str, origin: str) -> set[str]:
    """A Host as an Origin may write it: with the scheme's own port, which a proxy may have added, and without."""
    port = ":443" if origin.lower().startswith("https:") else ":80"
    return {host, host.removesuffix(port)}


def check_content_length(headers: Headers, limit: int = MAX_BODY) -> None:
    """A body that says it is too large is refused unread; one that does not say is cut off where it is read."""
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdecimal() or int(length[:18]) > limit:
        raise Refused(
            f"The request is too large: “{shorten(length, 20)}” bytes, the limit is {limit}.",
            code="too_large",
            next_step="Send less at a time.",
        )


def origin_host(origin: str) -> str | None:
    """Host and port of an origin, lower case; None for what is not one."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def host_name(host: str) -> str:
    """The name in a Host header: lower case, without the port. Empty for what is not a host and a port."""
    found = HOST_PATTERN.fullmatch(host.strip().lower())
    return found[1] if found else ""


def bearer_token(headers: Headers) -> str:
    """The key in an Authorization header; empty where there is none."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def cookie_token(headers: Headers) -> str:
    try:
        cookie = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookie[LOGIN_COOKIE].value if LOGIN_COOKIE in cookie else ""


def with_security_headers(scope: Scope, send: Send) -> Send:
    """Adds the security headers to every response; pages are never kept by caches, static files by version are."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
        await send(message)

    return wrapped


def with_cors(send: Send) -> Send:
    """Adds to a response that a page of any site may read it."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers["access-control-allow-origin"] = "*"
            headers["cross-origin-resource-policy"] = "cross-origin"
        await send(message)

    return wrapped


async def send_error(scope: Scope, send: Send, status: int, error: TrellisError) -> None:
    """Answer before the application is reached, in the shape that is expected at that path."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": error.code})
        return
    payload = to_openai_error(error, status) if is_openai_path(scope["path"]) else {"error": error.as_json()}
    body = json.dumps(payload).encode()
    await send_response(send, status, body, [(b"content-type", b"application/json")])


async def send_response(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    safe = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *safe, length]})
    await send({"type": "http.response.body", "body": body})


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
