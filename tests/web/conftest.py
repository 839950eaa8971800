from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server import Server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Shared by many tests, which start more in a minute than one person may.
    server = Server(tmp_path_factory.mktemp("save"), TRELLIS_RATE_LIMIT="0")
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.output, server.output


@pytest.fixture
def quiet_client(tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of a server of its own, where no session of another test is at work with a model."""
    server = Server(tmp_path)
    with server.client() as client:
        yield client
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
