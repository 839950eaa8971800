"""Security headers, CORS at `/v1`, and responses sent before the application is reached."""

from __future__ import annotations

import json
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Scope, Send

from ..errors import TrellisError
from .openai_errors import is_openai_path, to_openai_error

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
"""CORS for `/v1`, where a key is required. Any origin, so never with cookies: browsers refuse `*` for requests that
carry them."""
HEADER_NAMES_PATTERN = re.compile(r"[A-Za-z0-9-]{1,60}( *, *[A-Za-z0-9-]{1,60}){0,40}")


def preflight_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Allow a preflight request and the headers that it asks for, a key among them; the request itself is checked
    later."""
    asked = headers.get("access-control-request-headers", "")
    allowed = asked if HEADER_NAMES_PATTERN.fullmatch(asked.strip()) else "authorization, content-type"
    response_headers = CORS_HEADERS | {"access-control-allow-headers": allowed}
    return [(name.encode(), value.encode()) for name, value in response_headers.items()]


def with_security_headers(scope: Scope, send: Send) -> Send:
    """Add the security headers to a response. Pages are never cached; versioned static files are."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
        await send(message)

    return wrapped


def with_cors(send: Send) -> Send:
    """Allow pages of any site to read a response."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers["access-control-allow-origin"] = "*"
            headers["cross-origin-resource-policy"] = "cross-origin"
        await send(message)

    return wrapped


async def send_error(scope: Scope, send: Send, status: int, error: TrellisError) -> None:
    """Send an error before the application is reached, in the shape of its path."""
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
