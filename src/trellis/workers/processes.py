"""Engines as processes: started by command, or forked from a process that has already imported the libraries."""

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

MAX_LOGS = 50
MAX_MESSAGE_BYTES = 65536
GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""If a GPU driver is present, engines are not forked: an initialized driver does not survive a fork."""


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
    """An engine that is a child of the fork server, which reports its exit code."""

    def __init__(self, pid: int, fork_server: ForkServer) -> None:
        self._pid = pid
        self._fork_server = fork_server
        self._creation_time = _process_creation_time(pid)

    @property
    def pid(self) -> int | None:
        return self._pid

    def wait(self, timeout: float) -> int | None:
        deadline = time.monotonic() + timeout
        if self._fork_server.wait(self._pid, timeout) is None and not self._fork_server.is_alive:
            while self._is_running() and time.monotonic() < deadline:  # nobody is left to report the exit code
                time.sleep(0.01)
        return self._fork_server.wait(self._pid, 0)

    def kill(self) -> None:
        if self._fork_server.wait(self._pid, 0) is None and self._is_running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, 9)

    def _is_running(self) -> bool:
        return self._creation_time is not None and _process_creation_time(self._pid) == self._creation_time


class ForkServer:
    """The process that forks engines, as long as it lives."""

    def __init__(self, log: Path) -> None:
        our_end, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with server_end, log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "trellis.engine", "--forks", "--fd", str(server_end.fileno())],
                pass_fds=[server_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._control = our_end
        self._started_pids: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._exit_codes: dict[int, int] = {}
        self._change = threading.Condition()
        self.is_alive = True
        threading.Thread(target=self._listen, name="forks", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, arguments: list[str], sock: socket.socket, log: Path) -> ForkedEngine:
        """Start an engine on its end of a socket; not thread-safe. Raises OSError on failure."""
        asked = json.dumps({"arguments": arguments, "log": str(log)}).encode()
        socket.send_fds(self._control, [asked], [sock.fileno()])
        if (pid := self._started_pids.get()) is None:
            raise ConnectionError("the process that starts engines has ended")
        return ForkedEngine(pid, self)

    def wait(self, pid: int, timeout: float) -> int | None:
        """Return the exit code of an engine; None if it has not ended in time or the code is unknown."""
        with self._change:
            self._change.wait_for(lambda: pid in self._exit_codes or not self.is_alive, timeout)
            return self._exit_codes.get(pid)

    def close(self) -> None:
        """Kill it at once, even in the middle of its imports. Its engines run until their own sockets close."""
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        with self._control:
            while message := self._receive():
                if "started" in message:
                    self._started_pids.put(message["started"])
                else:
                    with self._change:
                        self._exit_codes[message["ended"]] = message["code"]
                        self._change.notify_all()
        with self._change:
            self.is_alive = False
            self._change.notify_all()
        self._started_pids.put(None)

    def _receive(self) -> dict[str, int]:
        try:
            message = self._control.recv(MAX_MESSAGE_BYTES)
        except OSError:
            return {}
        return dict(json.loads(message)) if message else {}


class ProcessSpawner:
    """Starts engines, each with its own log. Real ones are forked where that is safe."""

    def __init__(
        self,
        weights: Path,
        logs: Path,
        threads: int = 0,
        fake: bool = False,
        memory_limit: int = 0,
        hub_timeout: float = 60.0,
        cache_bytes: int | None = None,
    ) -> None:
        self._logs = logs
        self._arguments = [
            "--weights", str(weights), "--threads", str(threads), "--memory-limit", str(memory_limit),
            "--hub-timeout", str(hub_timeout), *([] if cache_bytes is None else ["--cache", str(cache_bytes)]),
            *(["--fake"] if fake else []),
        ]  # fmt: skip
        self._can_fork = not fake and sys.platform == "linux" and not any(path.exists() for path in GPU_DRIVERS)
        self._fork_server: ForkServer | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def __call__(self, sock: socket.socket) -> tuple[Engine, Path | None]:
        """Start an engine on its end of a socket. Raises OSError on failure."""
        with self._lock:
            log = self._new_log_file()
            if not self._can_fork:
                return self._run_process(sock, log), log
            try:
                return self._running_fork_server().fork(self._arguments, sock, log), log
            except ConnectionError:  # the fork server was killed: retry with a new one
                if self._closed:
                    raise
                return self._running_fork_server().fork(self._arguments, sock, log), log

    def preload(self) -> None:
        """Import the libraries in another process now, so that the first model need not wait for it."""
        with self._lock:
            if self._can_fork:
                self._logs.mkdir(parents=True, exist_ok=True)
                self._running_fork_server()

    def close(self) -> None:
        """Start no more engines. Takes no lock, so that callers waiting for an engine are released."""
        self._closed = True
        if self._fork_server:
            self._fork_server.close()

    def _running_fork_server(self) -> ForkServer:
        if self._closed:
            raise ConnectionError("the studio is ending")
        if self._fork_server is None or not self._fork_server.is_alive:
            if self._fork_server:
                self._fork_server.close()
            self._fork_server = ForkServer(self._logs / "forks.log")
        return self._fork_server

    def _run_process(self, sock: socket.socket, log: Path) -> ProcessEngine:
        command = [sys.executable, "-m", "trellis.engine", "--fd", str(sock.fileno()), *self._arguments]
        with log.open("wb") as output:
            return ProcessEngine(
                subprocess.Popen(  # noqa: S603 - our own interpreter and module
                    command, pass_fds=[sock.fileno()], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
            )

    def _new_log_file(self) -> Path:
        self._logs.mkdir(parents=True, exist_ok=True)
        for old in sorted(self._logs.glob("engine-*.log"), key=lambda file: file.stat().st_mtime)[:-MAX_LOGS]:
            old.unlink(missing_ok=True)
        return self._logs / f"engine-{os.getpid()}-{next(self._numbers)}.log"


def _process_creation_time(pid: int) -> float | None:
    """Return the start time of a process; None if it is gone or a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
