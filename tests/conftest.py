"""What tests share: engines behind a thread or a process, a studio over a real database, a real server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.processor import describe_processor
from trellis.blobs import Blobs
from trellis.engine.fake import FakeEngine
from trellis.engine.scheduler import Scheduler
from trellis.engine.transport import Transport
from trellis.settings import Settings
from trellis.store.store import Store, migrate
from trellis.studio.steering.session import Session
from trellis.studio.studio import Studio
from trellis.workers.worker import Engine, Spawn

hypothesis.settings.register_profile("trellis", deadline=None)  # how long a case takes is never what a test is about
hypothesis.settings.load_profile("trellis")


def pytest_report_header() -> str:
    return f"processor: {describe_processor()}"


class ThreadEngine:
    """An engine on a thread of the test: the same socket, the same frames, no process."""

    pid = None

    def __init__(self, sock: socket.socket, engine: Any) -> None:
        self._wire = Transport(sock)
        self._loop = Scheduler(self._wire.send, engine.handlers(), lambda: engine.lanes, engine.batches())
        self._wire.listen(self._loop.receive, on_close=self._loop.close)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run()
        except SystemExit:
            pass  # how a test lets its engine die
        finally:
            self._wire.close()

    def wait(self, timeout: float) -> int | None:
        self._thread.join(timeout)
        return None if self._thread.is_alive() else 0

    def kill(self) -> None:
        self._wire.close()


def thread_spawner(engine: Callable[[], Any]) -> Spawn:
    def spawn(sock: socket.socket) -> tuple[Engine, Path | None]:
        return ThreadEngine(sock.dup(), engine()), None

    return spawn


@pytest.fixture
def fake_spawn(tmp_path: Path) -> Spawn:
    return thread_spawner(lambda: FakeEngine(Blobs(tmp_path / "weights")))


@asynccontextmanager
async def open_studio(folder: Path, spawn: Spawn, **settings: Any) -> AsyncIterator[Studio]:
    chosen = Settings(save_dir=folder, **settings)
    migrate(chosen.database)
    studio = Studio(Store(chosen.database), spawn, chosen)
    await studio.open()
    try:
        yield studio
    finally:
        await studio.close()


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait until something holds. Fails the test when it does not in time."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not (found := condition()):
        assert asyncio.get_running_loop().time() < deadline, "it did not happen in time"
        await asyncio.sleep(0.002)
    return found


async def ready(session: Session, seconds: float = 20.0) -> dict[str, Any]:
    """The state of a session once its options are whole. Fails the test when the session fails."""

    def done() -> bool:
        assert session.error is None, session.error
        return session.status == "ready"

    await until(done, seconds)
    return session.state()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import make_llama

    return make_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
