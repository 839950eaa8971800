"""The real server, started as a user starts it, in a process that a test may kill."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ADDRESS = re.compile(r"http://\S+:\d+")


class Server:
    """`trellis` on a free port over a save folder of the test's own."""

    def __init__(
        self,
        save_dir: Path,
        *,
        fake: bool = True,
        port: int = 0,
        command_prefix: tuple[str, ...] = (),
        command: tuple[str, ...] = (),
        **environment: str,
    ) -> None:
        self._command_prefix, self._command = command_prefix, command
        self.save_dir = save_dir
        self._environment = os.environ | {"TRELLIS_FAKE_ENGINE": "1" if fake else "0", "COLUMNS": "200"} | environment
        self._port = port
        self.start()

    def start(self) -> None:
        """Start, and wait until the address has been printed and answers."""
        started = time.perf_counter()
        command = [
            *self._command_prefix,
            sys.executable,
            "-m",
            "trellis",
            *self._command,
            "--no-open",
            "--port",
            str(self._port),
        ]
        command += ["--save-dir", str(self.save_dir)]
        self.process = subprocess.Popen(command, env=self._environment, stderr=subprocess.PIPE, text=True)
        self.output = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.output += line
            if found := ADDRESS.search(line):
                self.url = found[0]
                break
        else:
            self.process.wait(10)
            self.process.stderr.close()
            raise AssertionError(f"the server did not start: {self.output}")
        self._reader = threading.Thread(target=self._read_output, daemon=True)
        self._reader.start()
        self._port = int(self.url.rsplit(":", 1)[1])
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{self.url}/healthz")
                break
            if time.perf_counter() - started > 20:
                self.process.kill()
                raise AssertionError(f"the server does not answer: {self.output}")
            time.sleep(0.01)
        self.seconds_to_start = time.perf_counter() - started

    def _read_output(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.output += line

    def kill(self) -> None:
        """kill -9, as a power cut would."""
        self.process.kill()
        self._wait_for_exit()

    def stop(self) -> int:
        """End it as Ctrl-C does. Returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._wait_for_exit()
        return self.process.returncode

    def _wait_for_exit(self) -> None:
        self.process.wait(10)
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def engine_pids(self) -> list[int]:
        """The process ids of its engines: its children, and the children of the one that forks engines."""
        import psutil

        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    found += child.children() if "--forks" in child.cmdline() else [child]
        return [process.pid for process in found]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, **options)


def new_session(client: httpx.Client, **config: Any) -> dict[str, Any]:
    response = client.post("/api/steering/sessions", json={"config": config})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return wait_ready(client, made["id"])


def wait_ready(client: httpx.Client, session: str, seconds: float = 30) -> dict[str, Any]:
    """The state of a session once a person can choose. Fails when it does not come to that."""
    deadline = time.monotonic() + seconds
    while True:
        state: dict[str, Any] = client.get(f"/api/steering/sessions/{session}").json()
        assert state["status"] != "failed", state["error"]
        if state["status"] == "ready":
            return state
        assert time.monotonic() < deadline, f"not ready in time: {state['status']}"
        time.sleep(0.01)


def wait_failed(client: httpx.Client, session: str) -> dict[str, Any]:
    """The state of a session once it has failed."""
    deadline = time.monotonic() + 60
    while True:
        state: dict[str, Any] = client.get(f"/api/steering/sessions/{session}").json()
        if state["status"] == "failed":
            return state
        assert time.monotonic() < deadline, state["status"]
        time.sleep(0.05)


def read_events(response: httpx.Response) -> Iterator[tuple[str, str, Any]]:
    """(id, name, data) of each event of a stream."""
    event: dict[str, str] = {}
    for line in response.iter_lines():
        if line == "":
            if "data" in event:
                yield event.get("id", ""), event.get("event", "message"), json.loads(event["data"])
            event = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            event[name] = event.get(name, "") + value.removeprefix(" ")
