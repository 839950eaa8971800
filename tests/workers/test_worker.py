"""Engines in processes of their own: they say why they ended, and never outlive their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import until
from trellis.errors import EngineDied, EngineError, WeightsMissing
from trellis.messages import (
    AdapterCreated,
    CreateAdapter,
    Learn,
    Learned,
    Lesson,
    Load,
    Loaded,
    Offer,
    Offered,
    Option,
    Prompt,
    Status,
)
from trellis.options import Adapter, Learning, Sampling
from trellis.workers.exit_codes import explain_exit
from trellis.workers.processes import ProcessSpawner
from trellis.workers.worker import Spawn, Worker

pytestmark = pytest.mark.anyio


@pytest.fixture
def spawn(tmp_path: Path) -> Spawn:
    return ProcessSpawner(tmp_path / "weights", tmp_path / "logs", 1, fake=True)


def ended(pid: int) -> bool:
    """An orphan may wait to be buried by a parent that it was given."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


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
    assert not worker.is_alive
    with pytest.raises(EngineDied):
        await worker.ask(Status())
    await until(lambda: len(deaths) == 1)


async def test_an_engine_that_does_not_listen_is_killed_when_it_is_stopped(spawn: Spawn) -> None:
    worker = await Worker.start(spawn)
    await worker.ask(Status())
    assert worker.pid
    os.kill(worker.pid, signal.SIGSTOP)
    await worker.stop(grace_seconds=0.2)
    assert not psutil.pid_exists(worker.pid)


def test_an_engine_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
import asyncio, os, signal
from pathlib import Path
from trellis.messages import Status
from trellis.workers.processes import ProcessSpawner
from trellis.workers.worker import Worker
async def main():
    worker = await Worker.start(ProcessSpawner(Path({str(tmp_path)!r}), Path({str(tmp_path)!r}), 1, fake=True))
    await worker.ask(Status())
    print(worker.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(500):
        if ended(pid):
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


async def test_whoever_is_told_of_a_death_is_told_after_the_owner_of_the_worker() -> None:
    """Else a retry is handed the same dead engine again, and three quick tries count as three deaths."""

    class SlowToReap:
        pid = None

        def wait(self, timeout: float) -> int | None:
            time.sleep(0.2)
            return -signal.SIGKILL

        def kill(self) -> None:
            pass

    worker = await Worker.start(lambda engine_end: (SlowToReap(), None))  # its end of the socket is closed at once
    deaths: list[EngineError] = []
    worker.on_death = deaths.append
    for _ in range(3):
        with pytest.raises(EngineDied, match="was killed"):
            await worker.ask(Status())
        assert len(deaths) == 1


async def test_an_engine_that_cannot_be_started_is_told_about() -> None:
    def spawn(sock: socket.socket) -> object:
        raise OSError("no such program")

    with pytest.raises(EngineDied, match="no such program"):
        await Worker.start(spawn)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "said"),
    [(-signal.SIGKILL, "ran out of memory"), (137, "ran out of memory"), (-signal.SIGSEGV, "SIGSEGV"),
     (-signal.SIGABRT, "SIGABRT"), (1, "exit code 1: ImportError: no torch"), (None, "The engine stopped")],
)  # fmt: skip
def test_an_exit_becomes_a_sentence_with_a_next_step(tmp_path: Path, code: int | None, said: str) -> None:
    log = tmp_path / "engine.log"
    log.write_text("Traceback\nImportError: no torch\n")
    error = explain_exit(code, log)
    assert said in error.message
    assert str(log) in error.next_step
    assert explain_exit(code, None).next_step


@pytest.mark.engine
async def test_real_engines_are_forked_and_say_how_they_ended(tmp_path: Path) -> None:
    spawn = ProcessSpawner(tmp_path / "weights", tmp_path / "logs", 1)
    spawn.preload()
    try:
        first, second = await Worker.start(spawn), await Worker.start(spawn)
        await asyncio.gather(first.ask(Status()), second.ask(Status()))
        assert first.pid
        assert second.pid
        (forks,) = {psutil.Process(pid).ppid() for pid in (first.pid, second.pid)}
        assert psutil.Process(forks).ppid() == os.getpid()
        deaths: list[EngineError] = []
        first.on_death = deaths.append
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: len(deaths) == 1)
        assert "was killed" in str(deaths[0])

        os.kill(forks, signal.SIGKILL)  # what it forked goes on, and ends in order
        await second.ask(Status())
        await second.stop()
        assert ended(second.pid)

        third = await Worker.start(spawn)
        await third.ask(Status())
        assert third.pid
        assert psutil.Process(third.pid).ppid() != forks
        await third.stop(grace_seconds=2)
        assert not psutil.pid_exists(third.pid)
        logs = [file.read_text() for file in (tmp_path / "logs").glob("engine-*.log")]
        assert len(logs) == 3
        assert not any("Traceback" in log for log in logs)
    finally:
        spawn.close()


def test_closing_lets_go_of_whoever_waits_for_an_engine(tmp_path: Path) -> None:
    spawn = ProcessSpawner(tmp_path / "weights", tmp_path / "logs", 1)
    spawn.preload()
    near, far = socket.socketpair()
    with near, far, ThreadPoolExecutor() as pool:
        waiting = pool.submit(spawn, far)  # what forks is still importing
        time.sleep(0.2)
        spawn.close()
        with pytest.raises(ConnectionError):
            waiting.result(30)
        with pytest.raises(ConnectionError):
            spawn(far)
    assert not any("--forks" in child.cmdline() for child in psutil.Process().children())


def learning(weights: str, choice: Any, keep: bool = True) -> Learn:
    """A choice among three answers, with two earlier ones beside it."""
    texts = ("The sea is wide.", "Hm, no.", "I would rather not say anything about that.")
    options = tuple(Option(text=text, tokens=(), finish="stop", logprob=-1.0) for text in texts)
    lessons = [
        Lesson(prompt=Prompt(text=prompt), options=options, choice=which, temperature=1.0)
        for prompt, which in (("Why?", choice), ("What is rain?", 0), ("Tell me more.", 2))
    ]
    return Learn(
        weights=weights, lesson=lessons[0], replay=tuple(lessons[1:]), learning=Learning(learning_rate=1e-3),
        context_length=256, keep=keep,
    )  # fmt: skip


@pytest.mark.engine
async def test_however_many_cores_an_engine_has_it_learns_the_same_to_the_bit(tmp_path: Path, tiny_llama: Path) -> None:
    made: list[list[bytes]] = []
    for threads in (1, 2, 3):
        folder = tmp_path / str(threads) / "weights"
        spawn = ProcessSpawner(folder, tmp_path / "logs", threads)
        worker = await Worker.start(spawn)
        try:
            loaded = await worker.ask(Load(path=str(tiny_llama)))
            assert isinstance(loaded, Loaded)
            assert loaded.lanes == threads
            planted = await worker.ask(CreateAdapter(adapter=Adapter(lora_rank=2), seed=1))
            assert isinstance(planted, AdapterCreated)
            alone = await worker.ask(learning(planted.weights, 1))  # on all cores
            others = (worker.ask(learning(planted.weights, choice)) for choice in (0, 2, "none"))
            learned = [alone, *await asyncio.gather(*others)]  # each on one
        finally:
            await worker.stop()
            spawn.close()
        made.append([])
        for each in learned:
            assert isinstance(each, Learned)
            for name in ("adapter_model", "optimizer"):
                made[-1].append((folder / each.weights / f"{name}.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]
    assert len(set(made[0])) == 8


@pytest.mark.engine
@pytest.mark.parametrize(("cache", "there"), [(None, True), (1, False)])
async def test_an_engine_keeps_as_much_in_memory_as_it_was_given(
    tmp_path: Path, tiny_llama: Path, cache: int | None, there: bool
) -> None:
    spawn = ProcessSpawner(tmp_path / "weights", tmp_path / "logs", 1, cache_bytes=cache)
    worker = await Worker.start(spawn)
    try:
        await worker.ask(Load(path=str(tiny_llama)))
        planted = await worker.ask(CreateAdapter(adapter=Adapter(lora_rank=2), seed=1))
        assert isinstance(planted, AdapterCreated)
        made: list[str] = []
        for choice in range(3):
            learned = await worker.ask(learning(planted.weights, choice, keep=False))
            assert isinstance(learned, Learned)
            made.append(learned.weights)
        offer = Offer(
            weights=made[0], prompt=Prompt(text="Why?"), sampling=Sampling(max_new_tokens=2), group_size=1, seed=1,
            context_length=256,
        )  # fmt: skip
        if there:
            assert isinstance(await worker.ask(offer), Offered)
        else:
            with pytest.raises(WeightsMissing):
                await worker.ask(offer)
    finally:
        await worker.stop()
        spawn.close()


@pytest.mark.engine
def test_what_forks_engines_ends_with_its_parent(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from trellis.workers.processes import ProcessSpawner
spawn = ProcessSpawner(Path({str(tmp_path)!r}), Path({str(tmp_path)!r}))
spawn.preload()
print(spawn._fork_server.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 60
    while not ended(pid):
        assert time.monotonic() < deadline, "it outlived its parent"
        time.sleep(0.05)
