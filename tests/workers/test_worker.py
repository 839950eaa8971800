"""Engines in processes of their own: they say why they ended, and never outlive their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import until
from trellis.errors import EngineDied, EngineError
from trellis.messages import Load, Status
from trellis.workers.exits import explain_exit
from trellis.workers.worker import Spawn, Worker, process_spawner

pytestmark = pytest.mark.anyio


@pytest.fixture
def spawn(tmp_path: Path) -> Spawn:
    return process_spawner(tmp_path / "weights", tmp_path / "logs", 1, fake=True)


async def test_an_engine_answers_and_stops(spawn: Spawn) -> None:
    worker = await Worker.start(spawn)
    assert worker.pid
    await worker.ask(Load(path="nothing"))
    await worker.stop()
    assert not psutil.pid_exists(worker.pid)


async def test_a_killed_engine_tells_everyone_who_waits(spawn: Spawn) -> None:
    worker = await Worker.start(spawn)
    await worker.ask(Status())
    deaths: list[EngineError] = []
    worker.on_death = deaths.append
    assert worker.pid
    os.kill(worker.pid, signal.SIGSTOP)
    asking = asyncio.gather(*(worker.ask(Status()) for _ in range(3)), return_exceptions=True)
    await asyncio.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    answers = await asyncio.wait_for(asking, 10)
    assert [type(answer) for answer in answers] == [EngineDied] * 3
    assert "was killed" in str(answers[0])
    assert not worker.alive
    with pytest.raises(EngineDied):
        await worker.ask(Status())
    await until(lambda: len(deaths) == 1)


async def test_an_engine_that_does_not_listen_is_killed_when_it_is_stopped(spawn: Spawn) -> None:
    worker = await Worker.start(spawn)
    await worker.ask(Status())
    assert worker.pid
    os.kill(worker.pid, signal.SIGSTOP)
    await worker.stop(patience=0.2)
    assert not psutil.pid_exists(worker.pid)


def test_an_engine_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
import asyncio, os, signal
from pathlib import Path
from trellis.messages import Status
from trellis.workers.worker import Worker, process_spawner
async def main():
    worker = await Worker.start(process_spawner(Path({str(tmp_path)!r}), Path({str(tmp_path)!r}), 1, fake=True))
    await worker.ask(Status())
    print(worker.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(500):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie":
            return
        time.sleep(0.01)
    raise AssertionError("the engine outlived its parent")


async def test_nonsense_on_the_wire_is_a_death_and_not_a_hang() -> None:
    class Babbling:
        pid = None

        def wait(self, timeout: float) -> int | None:
            return 1

        def kill(self) -> None:
            self.far.close()

        def __init__(self, sock: socket.socket) -> None:
            self.far = sock.dup()
            self.far.sendall(b"\x00\x00\x00\x05hello")

    worker = await Worker.start(lambda sock: (Babbling(sock), None))
    with pytest.raises(EngineDied):
        await asyncio.wait_for(worker.ask(Status()), 5)
    await worker.stop()


async def test_an_engine_that_cannot_be_started_is_told_about() -> None:
    def spawn(sock: socket.socket) -> object:
        raise OSError("no such program")

    with pytest.raises(EngineDied, match="no such program"):
        await Worker.start(spawn)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "said"),
    [(-signal.SIGKILL, "ran out of memory"), (137, "ran out of memory"), (-signal.SIGSEGV, "SIGSEGV"),
     (-signal.SIGABRT, "SIGABRT"), (1, "exit code 1: ImportError: no torch"), (None, "The engine ended")],
)  # fmt: skip
def test_an_exit_becomes_a_sentence_with_a_next_step(tmp_path: Path, code: int | None, said: str) -> None:
    log = tmp_path / "engine.log"
    log.write_text("Traceback\nImportError: no torch\n")
    error = explain_exit(code, log)
    assert said in error.message
    assert str(log) in error.next_step
    assert explain_exit(code, None).next_step
