"""The addresses a server can be reached at, and the QR code for a phone. It opens no connection."""

from __future__ import annotations

import io
import ipaddress
import socket
from collections.abc import Iterable

import psutil

WILDCARD_HOSTS = {"0.0.0.0", "::"}  # noqa: S104 - compared with, not listened on


def http_url(host: str, port: int) -> str:
    """Return the URL of a host; IPv6 addresses get brackets."""
    host = host.strip("[]")
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def local_url(host: str, port: int) -> str:
    """Return the URL for a browser on this computer; a wildcard address becomes loopback."""
    return http_url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host), port)  # noqa: S104


def network_urls(host: str, port: int) -> list[str]:
    """Return the URLs for other devices, the default route's first; empty when only this computer has access."""
    plain = host.strip("[]")
    if plain in WILDCARD_HOSTS:
        found = reachable_addresses(machine_addresses(), include_ipv6=plain == "::", preferred=outbound_address())
        return [http_url(address, port) for address in found]
    try:
        is_loopback = ipaddress.ip_address(plain).is_loopback
    except ValueError:
        is_loopback = plain == "localhost"
    return [] if is_loopback else [http_url(plain, port)]


def reachable_addresses(addresses: Iterable[str], *, include_ipv6: bool, preferred: str = "") -> list[str]:
    """Return the addresses that other devices can use: neither loopback nor link-local."""
    found = []
    for address in dict.fromkeys(addresses):
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            continue  # a MAC address, or one with a zone id, which URLs cannot carry
        if not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified) and (
            include_ipv6 or parsed.version == 4
        ):
            found.append(address)
    return sorted(found, key=lambda address: (address != preferred, ":" in address))


def machine_addresses() -> list[str]:
    """Return all addresses of network interfaces that are up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return [each.address for name, found in psutil.net_if_addrs().items() if name in up for each in found]


def outbound_address() -> str:
    """Return the source address of the default route, or an empty string. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: connecting UDP only looks up the route
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def qr_code(url: str) -> str:
    """Return a URL as a QR code of half blocks, light on dark, with the quiet zone that scanners need."""
    import segno

    out = io.StringIO()
    segno.make(url, micro=False, error="m").terminal(out, border=2, compact=True)
    return out.getvalue()
