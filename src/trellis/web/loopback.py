"""Requests from the computer that runs the studio."""

from __future__ import annotations

from starlette.requests import Request

from ..settings import is_loopback
from .access import host_name

PROXY_HEADER_PREFIXES = (
    "forwarded", "via", "x-forwarded", "x-original-", "x-envoy-", "x-amzn-", "cf-", "tailscale-", "x-arr-",
    "x-proxyuser-ip",
)  # fmt: skip
PROXY_HEADER_SUFFIXES = ("client-ip", "connecting-ip", "real-ip", "remote-ip")
"""Prefixes and suffixes of the headers that proxies and tunnels add."""


def is_local_request(request: Request) -> bool:
    """Return whether a request comes from a loopback address, to a loopback name, without any sign of a proxy: a
    proxy on this computer makes remote requests look local."""
    if any(name.startswith(PROXY_HEADER_PREFIXES) or name.endswith(PROXY_HEADER_SUFFIXES) for name in request.headers):
        return False
    client = request.client.host if request.client else ""
    return is_loopback(client) and is_loopback(host_name(request.headers.get("host", "")))
