"""The egress guard: every server is resolved, its addresses are checked, and a checked one is connected to.

A name that points at this computer or its network would let a page make the studio request what its user cannot reach
(server-side request forgery). It does not know what is requested.
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
DEFAULT_PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

PermissionCheck = Callable[[str, Address], bool]
"""Whether a server (`host:port`) may have a private address."""


@dataclass(frozen=True)
class CheckedUrl:
    """A checked URL: connect to `address`, but send the host name."""

    scheme: str
    host: str
    port: int
    path: str
    address: Address

    @property
    def url(self) -> str:
        """The URL with the address in place of the name, so that it is not resolved again."""
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def host_header(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True)
class ResolvedUrl:
    """The addresses of a server, not checked yet."""

    parts: SplitResult
    host: str
    port: int
    addresses: list[Address]

    @property
    def server(self) -> str:
        return f"{self.host}:{self.port}"


async def check_url(url: str, own_servers: Collection[str], is_permitted: PermissionCheck | None = None) -> CheckedUrl:
    """Resolve and check a URL. `own_servers` (`host:port`) may have private addresses; `is_permitted` tells of others.

    Raise Invalid for a malformed URL, Refused for a forbidden address, TrellisError for an unknown host.
    """
    lookup = await resolve_url(url)
    for address in lookup.addresses:
        if is_never_allowed(address):
            raise Refused(
                f"“{shorten(lookup.host)}” is at {address}, where no model server can be.",
                code="forbidden_address", field="url", next_step="Check the address.",
            )  # fmt: skip
        is_allowed = lookup.server in own_servers or (is_permitted is not None and is_permitted(lookup.server, address))
        if not (is_allowed or is_public(address)):
            raise Refused(
                f"“{shorten(lookup.host)}” is at {address}, which is this computer or its local network.",
                code="private_address", field="url", details={"server": lookup.server}, next_step="If the server is "
                "yours, add it on the page “API keys & providers” in a browser on the computer that runs the studio, "
                f"or start the studio with TRELLIS_LOCAL_SERVERS={shorten(lookup.server)}.",
            )  # fmt: skip
    parts = lookup.parts
    return CheckedUrl(parts.scheme, lookup.host, lookup.port, parts.path.rstrip("/"), lookup.addresses[0])


async def resolve_url(url: str) -> ResolvedUrl:
    """Resolve a URL. Raise Invalid for a malformed one, TrellisError for an unknown host."""
    parts = parse_url(url)
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    try:
        host = str(parts.hostname) if ":" in str(parts.hostname) else str(parts.hostname).encode("idna").decode()
    except UnicodeError:
        raise Invalid(
            f"url: “{shorten(parts.hostname)}” isn't a valid server name.", field="url", next_step="Check the address."
        ) from None
    try:
        address_infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise TrellisError(
            f"There is no server named “{shorten(host)}”.", code="network", field="url",
            next_step="Check the address.",
        ) from None  # fmt: skip
    addresses = dict.fromkeys(ipaddress.ip_address(str(each[4][0]).split("%")[0]) for each in address_infos)
    return ResolvedUrl(parts, host, port, list(addresses))


def host_and_port(url: str) -> str:
    """Return a server as `host:port`, as permissions name it. Raise Invalid."""
    parts = parse_url(url)
    host = str(parts.hostname)
    with suppress(UnicodeError):
        host = host if ":" in host else host.encode("idna").decode()
    return f"{host}:{parts.port or DEFAULT_PORTS[parts.scheme]}"


def parse_url(url: str) -> SplitResult:
    """Parse the URL of a server. Raise Invalid."""
    try:
        parts = urlsplit(url.strip())
        is_valid = parts.scheme in DEFAULT_PORTS and parts.hostname and not parts.username and not parts.password
        is_valid = bool(is_valid and not parts.query and not parts.fragment and (parts.port is None or parts.port > 0))
    except ValueError:
        is_valid = False
    if not is_valid or any(ord(letter) < 33 for letter in url.strip()):
        raise Invalid(
            f"url: must be an address such as “https://example.org/v1”, got “{shorten(url)}”.", field="url",
            next_step="Begin with http:// or https://, and leave the key out.",
        )  # fmt: skip
    return parts


def unwrap_ipv4(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 one embeds, else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if embedded is None and address in NAT64:
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return embedded or address
    return address


def is_public(address: Address) -> bool:
    unwrapped = unwrap_ipv4(address)
    return unwrapped.is_global and not unwrapped.is_multicast and not unwrapped.is_reserved


def is_never_allowed(address: Address) -> bool:
    """Return whether an address is never a model server: link-local (cloud metadata), multicast or unspecified."""
    unwrapped = unwrap_ipv4(address)
    return unwrapped.is_link_local or unwrapped.is_multicast or unwrapped.is_unspecified
