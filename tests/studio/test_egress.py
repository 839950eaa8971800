"""Where the studio may connect to: what is this computer or its network is refused, however it is written."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any

import pytest

from trellis.errors import Invalid, Refused, TrellisError
from trellis.studio.egress import checked, is_public, never, parsed

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("url", [
    "http://127.0.0.1/v1", "http://127.1/v1", "http://2130706433/v1", "http://0x7f000001/v1", "http://0177.0.0.1/",
    "http://localhost:11434", "http://[::1]/v1", "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/",
    "http://10.0.0.1", "http://172.16.0.1", "http://192.168.1.1", "http://169.254.169.254/latest/meta-data",
    "http://[fe80::1]/", "http://[fd00::1]/", "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/", "http://0.0.0.0/",
    "http://[::]/", "http://100.64.0.1/", "http://224.0.0.1/", "http://255.255.255.255/", "http://localhost./",
])  # fmt: skip
async def test_private_addresses_are_refused_however_they_are_written(url: str) -> None:
    with pytest.raises(TrellisError) as refused:
        await checked(url, frozenset())
    assert refused.value.field == "url"
    if not isinstance(refused.value, Refused):
        assert refused.value.code == "network", "or they are no address here at all"


@pytest.mark.parametrize("url", [
    "", "x", "ftp://example.org", "file:///etc/passwd", "http://", "http://user:pass@example.org/", "http://[::1",
    "http://example.org:99999/", "http://example.org/?a=b", "http://example.org/#x", "http://exa mple.org", "gopher://x",
    "http://example.org:0/", "//example.org", "http://example.org\n.evil", "javascript:alert(1)",
])  # fmt: skip
async def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(Invalid) as refused:
        parsed(url)
    assert refused.value.field == "url"


async def test_own_servers_may_be_private_by_name_and_port() -> None:
    place = await checked("http://127.0.0.1:11434/v1/", {"127.0.0.1:11434"})
    assert place.url == "http://127.0.0.1:11434/v1"
    with pytest.raises(Refused):
        await checked("http://127.0.0.1:11435/v1", {"127.0.0.1:11434"})
    with pytest.raises(Refused):
        await checked("http://169.254.169.254:80/", {"169.254.169.254:80"})


async def test_the_address_that_was_checked_is_the_one_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look_up(*arguments: Any, **options: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 443))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    place = await checked("https://example.org/v1", frozenset())
    assert place.url == "https://93.184.216.34:443/v1"
    assert place.name == "example.org"


async def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look_up(*arguments: Any, **options: Any) -> Any:
        return [(socket.AF_INET, 1, 6, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.7")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    with pytest.raises(Refused):
        await checked("http://two.example", frozenset())


def test_public_addresses_are_public() -> None:
    for text in ("93.184.216.34", "2606:2800:220:1::1"):
        assert is_public(ipaddress.ip_address(text))
        assert not never(ipaddress.ip_address(text))
