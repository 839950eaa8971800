"""Engines as processes: started by command, or forked off one that has the libraries in memory already."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from .worker import Engine

KEPT_LOGS = 50
MESSAGE = 65536
GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Where a GPU's driver is, engines are not forked: a driver that has been asked anything does not survive that."""


class ProcessEngine:
    """An engine that is a child of this process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def wait(self, timeout: float) -> int | None:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        self._process.kill()


class ForkedEngine:
    """An engine that is a child of the process that forked it, which tells how it ended."""

    def __init__(self, pid: int, forks: Forks) -> None:
        self._pid = pid
        self._forks = forks
        self._created = _created(pid)

    @property
    def pid(self) -> int | None:
        return self._pid

    def wait(self, timeout: float) -> int | None:
        deadline = time.monotonic() + timeout
        if self._forks.wait(self._pid, timeout) is None and not self._forks.alive:
            while self._lives() and time.monotonic() < deadline:  # nobody is left to say with which code
                time.sleep(0.01)
        return self._forks.wait(self._pid, 0)

    def kill(self) -> None:
        if self._forks.wait(self._pid, 0) is None and self._lives():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, 9)

    def _lives(self) -> bool:
        return self._created is not None and _created(self._pid) == self._created


class Forks:
    """The process that forks engines, as long as it lives."""

    def __init__(self, log: Path) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far, log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "trellis.engine", "--forks", "--fd", str(far.fileno())],
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._control = near
        self._started: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._codes: dict[int, int] = {}
        self._change = threading.Condition()
        self.alive = True
        threading.Thread(target=self._listen, name="forks", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, arguments: list[str], sock: socket.socket, log: Path) -> ForkedEngine:
        """Start an engine on its end of a socket; not from two threads at once. Raises OSError when that fails."""
        asked = json.dumps({"arguments": arguments, "log": str(log)}).encode()
        socket.send_fds(self._control, [asked], [sock.fileno()])
        if (pid := self._started.get()) is None:
            raise ConnectionError("the process that starts engines has ended")
        return ForkedEngine(pid, self)

    def wait(self, pid: int, timeout: float) -> int | None:
        """The exit code of an engine, or None when it has not ended in time or nobody knows."""
        with self._change:
            self._change.wait_for(lambda: pid in self._codes or not self.alive, timeout)
            return self._codes.get(pid)

    def close(self) -> None:
        """End it at once, also in the middle of its imports. Its engines go on until their own sockets close."""
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        with self._control:
            while message := self._receive():
                if "started" in message:
                    self._started.put(message["started"])
                else:
                    with self._change:
                        self._codes[message["ended"]] = message["code"]
                        self._change.notify_all()
        with self._change:
            self.alive = False
            self._change.notify_all()
        self._started.put(None)

    def _receive(self) -> dict[str, int]:
        try:
            message = self._control.recv(MESSAGE)
        except OSError:
            return {}
        return dict(json.loads(message)) if message else {}


class ProcessSpawner:
    """Starts engines, each with a log of its own. Real ones are forked where that is safe."""

    def __init__(
        self,
        weights: Path,
        logs: Path,
        threads: int = 0,
        fake: bool = False,
        memory_limit: int = 0,
        hub_timeout: float = 60.0,
        cache: int | None = None,
    ) -> None:
        self._logs = logs
        self._arguments = [
            "--weights", str(weights), "--threads", str(threads), "--memory-limit", str(memory_limit),
            "--hub-timeout", str(hub_timeout), *([] if cache is None else ["--cache", str(cache)]),
            *(["--fake"] if fake else []),
        ]  # fmt: skip
        self._forking = not fake and sys.platform == "linux" and not any(path.exists() for path in GPU_DRIVERS)
        self._forks: Forks | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def __call__(self, sock: socket.socket) -> tuple[Engine, Path | None]:
        """Start an engine on its end of a socket. Raises OSError when that fails."""
        with self._lock:
            log = self._new_log()
            if not self._forking:
                return self._run(sock, log), log
            try:
                return self._ready().fork(self._arguments, sock, log), log
            except ConnectionError:  # it was killed: once more, with another
                if self._closed:
                    raise
                return self._ready().fork(self._arguments, sock, log), log

    def warm(self) -> None:
        """Import what engines need now, in another process, so that the first model need not wait for it."""
        with self._lock:
            if self._forking:
                self._logs.mkdir(parents=True, exist_ok=True)
                self._ready()

    def close(self) -> None:
        """Start nothing any more. Whoever waits for an engine is let go, so this takes no lock."""
        self._closed = True
        if self._forks:
            self._forks.close()

    def _ready(self) -> Forks:
        if self._closed:
            raise ConnectionError("the studio is ending")
        if self._forks is None or not self._forks.alive:
            if self._forks:
                self._forks.close()
            self._forks = Forks(self._logs / "forks.log")
        return self._forks

    def _run(self, sock: socket.socket, log: Path) -> ProcessEngine:
        command = [sys.executable, "-m", "trellis.engine", "--fd", str(sock.fileno()), *self._arguments]
        with log.open("wb") as output:
            return ProcessEngine(
                subprocess.Popen(  # noqa: S603 - our own interpreter and module
                    command,
                    pass_fds=[sock.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )

    def _new_log(self) -> Path:
        self._logs.mkdir(parents=True, exist_ok=True)
        for old in sorted(self._logs.glob("engine-*.log"), key=lambda file: file.stat().st_mtime)[:-KEPT_LOGS]:
            old.unlink(missing_ok=True)
        return self._logs / f"engine-{os.getpid()}-{next(self._numbers)}.log"


def _created(pid: int) -> float | None:
    """When a process began; None when it is not there or only waits to be buried."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
