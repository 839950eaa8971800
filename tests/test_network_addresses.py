"""Where a studio can be reached, as it is printed: addresses that others can use, and a QR code that says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tests.server import Server
from trellis import cli, network_addresses

MACHINE = [
    "127.0.0.1", "::1", "192.168.1.7", "10.8.0.2", "169.254.3.4", "fe80::1%eth0", "fe80::1", "2001:db8::7",
    "02:42:ac:11:00:02", "192.168.1.7",
]  # fmt: skip


def test_only_addresses_that_others_can_use_are_told_the_way_out_first() -> None:
    assert network_addresses.reachable_addresses(MACHINE, include_ipv6=False) == ["192.168.1.7", "10.8.0.2"]
    assert network_addresses.reachable_addresses(MACHINE, include_ipv6=False, preferred="10.8.0.2") == [
        "10.8.0.2",
        "192.168.1.7",
    ]
    assert network_addresses.reachable_addresses(MACHINE, include_ipv6=True)[-1] == "2001:db8::7"
    assert network_addresses.reachable_addresses(["127.0.0.1"], include_ipv6=False) == []


@pytest.mark.parametrize(
    ("host", "local", "network"),
    [
        ("127.0.0.1", "http://127.0.0.1:80", []),
        ("localhost", "http://localhost:80", []),
        ("::1", "http://[::1]:80", []),
        ("192.168.1.7", "http://192.168.1.7:80", ["http://192.168.1.7:80"]),
        ("fd00::1", "http://[fd00::1]:80", ["http://[fd00::1]:80"]),
        ("studio.example", "http://studio.example:80", ["http://studio.example:80"]),
        ("0.0.0.0", "http://127.0.0.1:80", ["http://192.168.1.7:80", "http://10.8.0.2:80"]),
        ("::", "http://[::1]:80", ["http://192.168.1.7:80", "http://10.8.0.2:80", "http://[2001:db8::7]:80"]),
    ],
)
def test_the_address_for_all_interfaces_is_never_one_to_go_to(
    monkeypatch: pytest.MonkeyPatch, host: str, local: str, network: list[str]
) -> None:
    monkeypatch.setattr(network_addresses, "machine_addresses", lambda: MACHINE)
    monkeypatch.setattr(network_addresses, "outbound_address", lambda: "192.168.1.7")
    assert network_addresses.local_url(host, 80) == local
    assert network_addresses.network_urls(host, 80) == network


def test_a_machine_knows_its_own_addresses() -> None:
    assert "127.0.0.1" in network_addresses.machine_addresses()
    assert network_addresses.outbound_address() in ["", *network_addresses.machine_addresses()]


def printed(monkeypatch: pytest.MonkeyPatch, local: str, network: list[str], qr: bool) -> str:
    console = Console(record=True, width=60, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    monkeypatch.setattr(cli, "console", console)
    cli._print_addresses(local, network, qr)
    console.file.close()
    return console.export_text()


def test_an_address_with_brackets_is_printed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(monkeypatch, "http://[fd00::1]:80", ["http://[fd00::1]:80", "http://[b]:81"], False)
    assert "http://[fd00::1]:80" in text
    assert "http://[b]:81" in text


def modules_of(code: str) -> list[list[bool]]:
    """The dark modules of a QR code of half blocks."""
    rows = []
    for line in code.rstrip("\n").split("\n"):
        rows.append([letter in " ▄" for letter in line])
        rows.append([letter in " ▀" for letter in line])
    return rows


def test_the_code_is_that_of_the_first_address_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import segno

    text = printed(monkeypatch, "http://127.0.0.1:80", ["http://192.168.1.7:80", "http://10.8.0.2:80"], True)
    drawn = "\n".join(line for line in text.splitlines() if set(line) & set("█▀▄"))
    matrix = segno.make("http://192.168.1.7:80", micro=False, error="m").matrix
    expected = [[bool(dark) for dark in row] for row in matrix]
    quiet = 2
    rows = modules_of(drawn)
    inner = [row[quiet : quiet + len(expected)] for row in rows[quiet : quiet + len(expected)]]
    assert inner == expected


def test_without_an_address_for_others_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(printed(monkeypatch, "http://127.0.0.1:80", [], True).split())
    assert "No QR code: this address works on this computer only. Set TRELLIS_PASSWORD and add --host 0.0.0.0." in text
    assert "█" not in text


def test_a_studio_for_all_interfaces_prints_addresses_that_can_be_opened(tmp_path: Path) -> None:
    server = Server(tmp_path, command=("--host", "0.0.0.0"), TRELLIS_PASSWORD="secret")
    try:
        assert server.url.startswith("http://127.0.0.1:")
        assert "0.0.0.0" not in server.output
    finally:
        server.stop()
