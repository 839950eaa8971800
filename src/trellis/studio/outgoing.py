"""Where the studio may connect to: every address is looked up, checked, and then the one that is used.

A name that points at this computer or its network would let a page make the studio ask for what its user cannot see
(server-side request forgery). It does not know what is asked.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from ..errors import Invalid, Refused, TrellisError, shorten

NAT64 = ipaddress.ip_network("64:ff9b::/96")
PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

Permits = Callable[[str, Address], bool]
"""Whether a server, as `host:port`, may have a private address."""


@dataclass(frozen=True)
class Place:
    """A checked address: connect to `address`, and call the server by its name."""

    scheme: str
    host: str
    port: int
    path: str
    address: Address

    @property
    def url(self) -> str:
        """With the address in place of the name, so that nobody looks the name up again."""
        there = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{self.scheme}://{there}:{self.port}{self.path}"

    @property
    def name(self) -> str:
        """As a Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True)
class Found:
    """Where the name of a server leads, not checked yet."""

    parts: SplitResult
    host: str
    port: int
    addresses: list[Address]

    @property
    def server(self) -> str:
        return f"{self.host}:{self.port}"


async def checked(url: str, own: Collection[str], permits: Permits | None = None) -> Place:
    """A place that may be connected to. `own` are servers, as `host:port`, that may have private addresses; `permits`
    says of others whether a person has permitted them.

    Raises Invalid for what is not an address, Refused for one that is not allowed, TrellisError where there is none.
    """
    found = await resolved(url)
    for address in found.addresses:
        if never(address):
            raise Refused(
                f"“{shorten(found.host)}” is at {address}, where no server of models can be.",
                code="forbidden_address", field="url", next_step="Check the address.",
            )  # fmt: skip
        allowed = found.server in own or (permits is not None and permits(found.server, address))
        if not (allowed or is_public(address)):
            raise Refused(
                f"“{shorten(found.host)}” is at {address}, which is this computer or its own network.",
                code="private_address", field="url", details={"server": found.server}, next_step="If it is a server of "
                "yours, add it on the page “Connections” in a browser on the computer that runs the studio, or start "
                f"the studio with TRELLIS_LOCAL_SERVERS={shorten(found.server)}.",
            )  # fmt: skip
    parts = found.parts
    return Place(parts.scheme, found.host, found.port, parts.path.rstrip("/"), found.addresses[0])


async def resolved(url: str) -> Found:
    """Look up a server. Raises Invalid for what is not an address, TrellisError where there is none."""
    parts = parsed(url)
    port = parts.port or PORTS[parts.scheme]
    try:
        host = str(parts.hostname) if ":" in str(parts.hostname) else str(parts.hostname).encode("idna").decode()
    except UnicodeError:
        raise Invalid(
            f"url: “{shorten(parts.hostname)}” isn't a valid server name.", field="url", next_step="Check the address."
        ) from None
    try:
        looked_up = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise TrellisError(
            f"There is no server called “{shorten(host)}”.", code="network", field="url",
            next_step="Check the address.",
        ) from None  # fmt: skip
    addresses = dict.fromkeys(ipaddress.ip_address(str(each[4][0]).split("%")[0]) for each in looked_up)
    return Found(parts, host, port, list(addresses))


def server_of(url: str) -> str:
    """A server as `host:port`, as permissions name it. Raises Invalid."""
    parts = parsed(url)
    host = str(parts.hostname)
    with suppress(UnicodeError):
        host = host if ":" in host else host.encode("idna").decode()
    return f"{host}:{parts.port or PORTS[parts.scheme]}"


def parsed(url: str) -> SplitResult:
    """Raises Invalid for what is not the address of a server."""
    try:
        parts = urlsplit(url.strip())
        good = parts.scheme in PORTS and parts.hostname and not parts.username and not parts.password
        good = bool(good and not parts.query and not parts.fragment and (parts.port is None or parts.port > 0))
    except ValueError:
        good = False
    if not good or any(ord(letter) < 33 for letter in url.strip()):
        raise Invalid(
            f"url: must be an address such as “https://example.org/v1”, got “{shorten(url)}”.", field="url",
            next_step="Type it with http or https, without a key in it.",
        )  # fmt: skip
    return parts


def plain(address: Address) -> Address:
    """An IPv4 address that stands in an IPv6 one, by itself."""
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inside is None and address in NAT64:
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return inside or address
    return address


def is_public(address: Address) -> bool:
    each = plain(address)
    return each.is_global and not each.is_multicast and not each.is_reserved


def never(address: Address) -> bool:
    """What no server of models has: link-local, where clouds keep their secrets, multicast, and no address at all."""
    each = plain(address)
    return each.is_link_local or each.is_multicast or each.is_unspecified
