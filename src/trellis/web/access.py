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
from ..studio.chat.api_keys import PREFIX, Keys
from .numbers import set_reader
from .openai_errors import as_openai, speaks_openai

COOKIE = "trellis"
LOGIN_DAYS = 30
MAX_BODY = 2_000_000
"""Bytes in a request's body; a prompt is at most 100,000 characters, which is less than this in any script."""
MAX_FILE = 12_000_000
"""Bytes in a body that is a file for a room, or a room that is brought in."""
FILE_PATHS = ("/files", "/import")
HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")
SAFE = {"GET", "HEAD", "OPTIONS"}
OPEN_PATHS = {"/login", "/healthz", "/readyz"}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
CORS = {
    "access-control-allow-origin": "*",
    "access-control-allow-methods": "GET, POST",
    "access-control-max-age": "600",
    "vary": "Origin, Access-Control-Request-Headers",
}
"""What a page of another site is told at `/v1`, where a key opens it. Any origin, and so never with cookies: browsers
refuse `*` for requests that carry them."""
HEADER_NAMES = re.compile(r"[A-Za-z0-9-]{1,60}( *, *[A-Za-z0-9-]{1,60}){0,40}")


class Guard:
    """One owner's password, and the tokens that stand for it. Tokens are stored as hashes only."""

    def __init__(self, settings: Settings, store: Store) -> None:
        password = settings.password.get_secret_value()
        self._store = store
        self._hasher = PasswordHasher()
        self._hash = self._hasher.hash(password) if password else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._rates = parse("5 per minute"), parse("30 per minute")
        self._one_at_a_time = asyncio.Lock()
        self._valid: dict[str, float] = {}
        self.streams: dict[str, set[asyncio.Event]] = {}

    @property
    def wanted(self) -> bool:
        """Whether this server asks for a password at all."""
        return self._hash is not None

    async def login(self, password: str, client: str) -> str:
        """A new token. Raises Refused for a wrong password or too many tries."""
        async with self._one_at_a_time:  # a hash takes 64 MB while it is made
            if not all(self._limiter.test(rate, "login", who) for rate, who in self._limits(client)):
                raise Refused("Too many attempts.", code="too_many_tries", next_step="Wait a minute.")
            right = self._hash is not None and await asyncio.to_thread(self._matches, password[:1024])
            if not right:
                for rate, who in self._limits(client):
                    self._limiter.hit(rate, "login", who)
        if not right:
            raise Refused("Wrong password.", code="wrong_password", next_step="Try again.", field="password")
        token = secrets.token_urlsafe(32)
        await self._store.write(logins.add_login, _hash(token), time.time())
        return token

    async def knows(self, token: str) -> bool:
        """Whether a token stands for a login that has not ended."""
        if not token:
            return False
        hashed = _hash(token)
        if hashed not in self._valid:
            created = await self._store.read(logins.login_created, hashed)
            if created is None:
                return False
            self._valid[hashed] = created
        return time.time() - self._valid[hashed] < LOGIN_DAYS * 86_400

    async def logout(self, token: str) -> None:
        """End a login and every stream that was opened with it."""
        hashed = _hash(token)
        await self._store.write(logins.delete_login, hashed)
        self._valid.pop(hashed, None)
        for ended in self.streams.pop(hashed, set()):
            ended.set()

    def watch(self, token: str) -> asyncio.Event:
        """An event that is set when the login of a token ends."""
        ended = asyncio.Event()
        self.streams.setdefault(_hash(token), set()).add(ended)
        return ended

    def unwatch(self, token: str, ended: asyncio.Event) -> None:
        watchers = self.streams.get(_hash(token), set())
        watchers.discard(ended)
        if not watchers:
            self.streams.pop(_hash(token), None)

    def _limits(self, client: str) -> list[tuple[RateLimitItem, str]]:
        """Wrong passwords are counted for each client, and for all of them together."""
        return [(self._rates[0], client), (self._rates[1], "everyone")]

    def _matches(self, password: str) -> bool:
        try:
            return self._hasher.verify(self._hash or "", password.encode("utf-8", "replace"))
        except VerifyMismatchError:
            return False


class Access:
    """The outermost layer: what does not pass here reaches nothing."""

    def __init__(self, app: ASGIApp, settings: Settings, guard: Guard, keys: Keys) -> None:
        self._app = app
        self._keys = keys
        self._names = settings.host_names
        self._any_address = not is_loopback(settings.host)
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        set_reader(headers.get("accept-language", ""))
        for_programs = scope["type"] == "http" and speaks_openai(scope["path"])
        key: str | None = None
        try:
            self._check_host(headers)
            if for_programs and is_preflight(scope, headers):
                await respond(send, 200, b"", preflight(headers))
                return
            if for_programs and (given := bearer(headers)):
                # A key is nothing that a browser sends by itself, so whoever sends one may come from any site.
                scope["trellis.key"] = key = await self._keys.owner(given)
                if key is not None:
                    send = with_cors(send)
                elif self._guard.wanted or given.startswith(PREFIX) or is_foreign(headers):
                    # The page that sent it may read that it is none; nothing else is said to it.
                    await refuse(scope, with_cors(send), 401, wrong_key())
                    return
            if key is None and (scope["type"] == "websocket" or scope["method"] not in SAFE):
                check_origin(headers)
            check_length(headers, MAX_FILE if scope["path"].endswith(FILE_PATHS) else MAX_BODY)
        except Refused as error:
            await refuse(scope, send, {"bad_host": 400, "too_large": 413}.get(error.code, 403), error)
            return
        if key is not None:
            await self._app(scope, receive, with_headers(scope, send))
            return
        token = cookie_token(headers)
        if for_programs and self._guard.wanted and not await self._guard.knows(token):
            await refuse(scope, send, 401, wrong_key())
            return
        is_open = scope["path"] in OPEN_PATHS or scope["path"].startswith("/static/")
        if self._guard.wanted and not is_open and not await self._guard.knows(token):
            await self._ask_to_log_in(scope, headers, send)
            return
        if self._guard.wanted:
            await self._until_logout(scope, receive, with_headers(scope, send), token)
        else:
            await self._app(scope, receive, with_headers(scope, send))

    def _check_host(self, headers: Headers) -> None:
        """A foreign name in Host means that another site's name was pointed at this server (DNS rebinding)."""
        if len(headers.getlist("host")) == 1:
            name = host_name(headers["host"])
            if name in self._names or (self._any_address and _is_address(name)):
                return
        raise Refused(
            f"“{shorten(headers.get('host', ''))}” is not a name of this server.",
            code="bad_host",
            next_step="Use the address printed at startup, or add the name to TRELLIS_ALLOWED_HOSTS.",
        )

    async def _ask_to_log_in(self, scope: Scope, headers: Headers, send: Send) -> None:
        wants_page = "text/html" in headers.get("accept", "") and "hx-request" not in headers
        if scope["type"] == "http" and wants_page and scope["method"] == "GET":
            location = f"/login?next={quote(scope['path'])}".encode("latin-1")
            await respond(send, 303, b"", [(b"location", location), (b"content-type", b"text/plain")])
            return
        error = Refused("You are not logged in.", code="login_required", next_step="Log in at /login.")
        await refuse(scope, send, 401, error)

    async def _until_logout(self, scope: Scope, receive: Receive, send: Send, token: str) -> None:
        """Run a request, but no longer than the login that it came with."""
        ended = self._guard.watch(token)
        running = asyncio.ensure_future(_run(self._app, scope, receive, send))
        out = asyncio.create_task(ended.wait())
        try:
            await asyncio.wait({running, out}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done() and (scope["type"] == "websocket" or scope["method"] in SAFE):
                running.cancel()  # what only reads is cut off; an action that has begun is let finish
            await asyncio.wait({running})
            if not running.cancelled():
                running.result()
        finally:
            out.cancel()
            running.cancel()
            self._guard.unwatch(token, ended)


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def check_origin(headers: Headers) -> None:
    """A change must come from our own pages, or from a program (which sends neither header)."""
    if is_foreign(headers):
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        raise Refused(
            f"This request came from another site (“{shorten(origin or site or '')}”).",
            code="foreign_origin",
            next_step="Use Trellis' own pages.",
        )


def is_foreign(headers: Headers) -> bool:
    """Whether a page of another site sent this."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None and site not in {"same-origin", "none"}:
        return True
    return origin is not None and origin_name(origin) not in _names_of(headers.get("host", "").lower(), origin)


def is_preflight(scope: Scope, headers: Headers) -> bool:
    """Whether a browser asks if a page may send something (the CORS protocol of the Fetch standard)."""
    return bool(scope["method"] == "OPTIONS" and headers.get("origin") and headers.get("access-control-request-method"))


def preflight(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Yes: what is sent is looked at when it comes. The headers that were asked for may be sent, a key among them."""
    asked = headers.get("access-control-request-headers", "")
    allowed = asked if HEADER_NAMES.fullmatch(asked.strip()) else "authorization, content-type"
    told = CORS | {"access-control-allow-headers": allowed}
    return [(name.encode(), value.encode()) for name, value in told.items()]


def wrong_key() -> Refused:
    return Refused(
        "An API key of this studio is required.",
        code="invalid_api_key",
        next_step="Create one on the Connections page and send it as “Authorization: Bearer …”.",
    )


def _names_of(host: str, origin: str) -> set[str]:
    """A Host as an Origin may write it: with the scheme's own port, which a proxy may have added, and without."""
    port = ":443" if origin.lower().startswith("https:") else ":80"
    return {host, host.removesuffix(port)}


def check_length(headers: Headers, most: int = MAX_BODY) -> None:
    """A body that says it is too large is refused unread; one that does not say is cut off where it is read."""
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdecimal() or int(length[:18]) > most:
        raise Refused(
            f"The request is too large: “{shorten(length, 20)}” bytes, the limit is {most}.",
            code="too_large",
            next_step="Send less at a time.",
        )


def origin_name(origin: str) -> str | None:
    """Host and port of an origin, lower case; None for what is not one."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def host_name(host: str) -> str:
    """The name in a Host header: lower case, without the port. Empty for what is not a host and a port."""
    found = HOST.fullmatch(host.strip().lower())
    return found[1] if found else ""


def bearer(headers: Headers) -> str:
    """The key in an Authorization header; empty where there is none."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def cookie_token(headers: Headers) -> str:
    try:
        cookie = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookie[COOKIE].value if COOKIE in cookie else ""


def with_headers(scope: Scope, send: Send) -> Send:
    """Adds the security headers to every response; pages are never kept by caches, static files by version are."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            for name, value in HEADERS.items():
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


async def refuse(scope: Scope, send: Send, status: int, error: TrellisError) -> None:
    """Answer before the application is reached, in the shape that is expected at that path."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": error.code})
        return
    shaped = as_openai(error, status) if speaks_openai(scope["path"]) else {"error": error.as_json()}
    body = json.dumps(shaped).encode()
    await respond(send, status, body, [(b"content-type", b"application/json")])


async def respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    safe = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *safe, length]})
    await send({"type": "http.response.body", "body": body})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
