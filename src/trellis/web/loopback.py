"""Whether a request was made by somebody at the computer on which the studio runs."""

from __future__ import annotations

from starlette.requests import Request

from ..settings import is_loopback
from .access import host_name

PROXY_HEADER_PREFIXES = (
    "forwarded", "via", "x-forwarded", "x-original-", "x-envoy-", "x-amzn-", "cf-", "tailscale-", "x-arr-",
    "x-proxyuser-ip",
)  # fmt: skip
PROXY_HEADER_SUFFIXES = ("client-ip", "connecting-ip", "real-ip", "remote-ip")
"""How the names of headers begin, or end, by which proxies and tunnels say for whom they ask."""


def is_local_request(request: Request) -> bool:
    """A connection from a loopback address, to a loopback name, that no proxy forwarded: a proxy on this computer makes
    requests of people elsewhere look local, so that any sign of one counts against it."""
    if any(name.startswith(PROXY_HEADER_PREFIXES) or name.endswith(PROXY_HEADER_SUFFIXES) for name in request.headers):
        return False
    client = request.client.host if request.client else ""
    return is_loopback(client) and is_loopback(host_name(request.headers.get("host", "")))
