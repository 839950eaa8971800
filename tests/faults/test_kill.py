"""kill -9 at random moments, of the server, of the engine, or of both: nothing acknowledged is lost or doubled."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server import Server, new_session, wait_ready

API = "/api/steering/sessions"
WHOLE = {
    "fake": {"adapter_config.json", "adapter_model.safetensors", "weights.json"},
    "real": {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "weights.json"},
}


class Person(threading.Thread):
    """Chooses, skips and undoes as fast as the studio lets them, or with a page open after reading for up to so long;
    writes down what was acknowledged."""

    def __init__(
        self, server: Server, session: str, dice: random.Random, round_number: int, reading: float = 0.0
    ) -> None:
        super().__init__(daemon=True)
        self.server, self.session, self.dice, self.round = server, session, dice, round_number
        self.reading = reading
        self.acknowledged: list[dict[str, Any]] = []
        self.foreseen = 0
        """Choices that were whole when they were acknowledged, options and all."""
        self.unforeseen = 0
        self.stopped = False
        if reading:
            threading.Thread(target=self.look, daemon=True).start()

    def look(self) -> None:
        """A page: what is looked at is foreseen."""
        events = f"{self.server.url}{API}/{self.session}/events"
        with contextlib.suppress(httpx.TransportError), httpx.stream("GET", events, timeout=None) as stream:
            for _ in stream.iter_bytes():
                if self.stopped:
                    return

    def until_foreseen(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.foreseen and self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)

    def run(self) -> None:
        with contextlib.suppress(httpx.TransportError), self.server.client() as client:
            for number in itertools.count():
                if self.stopped:
                    return
                self.act(client, f"round {self.round}, action {number}")

    def act(self, client: httpx.Client, key: str) -> None:
        state = client.get(f"{API}/{self.session}").json()
        if state["status"] != "ready":
            return
        if self.reading:
            # Who finds nothing ready reads longer: on a slow machine too, some choices are foreseen.
            time.sleep(self.dice.uniform(0, self.reading) * (1 + self.unforeseen))
        if state["can_undo"] and self.dice.random() < 0.15:
            client.post(f"{API}/{self.session}/undo", headers={"Idempotency-Key": key})
            return
        choice = self.dice.choice([0, 1, 2, 3, "none", "skip"])
        said = {"offer": state["offer"]["id"], "choice": choice}
        answer = client.post(f"{API}/{self.session}/choose", json=said, headers={"Idempotency-Key": key})
        if answer.status_code == 202:
            self.acknowledged.append(said | {"node": state["head"]["node"], "key": key})
            if self.reading and client.get(f"{API}/{self.session}").json()["status"] == "ready":
                self.foreseen += 1
            else:
                self.unforeseen += 1


def processes_end(pids: list[int], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.monotonic() < deadline, f"engines outlive their server: {alive}"
        time.sleep(0.02)


def equals(line: dict[str, Any]) -> list[int]:
    """The options that were chosen because one of them was: all that are word for word the same, and no other."""
    shown = list(zip(line["options"], line["finish"], strict=True))
    chosen: list[int] = line["choice"]
    assert sorted(chosen) == [index for index, each in enumerate(shown) if each == shown[chosen[0]]], line
    return chosen


def check(client: httpx.Client, server: Server, session: str, acknowledged: list[dict[str, Any]], kind: str) -> None:
    """No acknowledged choice is missing or doubled, and every node has weights that load."""
    wait_ready(client, session, 60)
    tree = client.get(f"{API}/{session}/tree").json()
    edges = [(node["parent"], json.dumps(node["choice"])) for node in tree["nodes"]]
    raw = [json.loads(line) for line in client.get(f"{API}/{session}/choices").text.splitlines()]
    assert len(raw) == len(tree["nodes"]) - 1
    assert len(set(edges)) == len(edges), "a choice was learned from twice"
    meant = {(line["parent"], each) for line in raw if isinstance(line["choice"], list) for each in equals(line)}
    for said in acknowledged:
        kept = (said["node"], json.dumps(said["choice"])) in edges or (said["node"], said["choice"]) in meant
        assert kept, f"an acknowledged choice is missing: {said}"
    for folder in (server.save_dir / "weights").iterdir():
        if not folder.name.startswith("."):
            assert {file.name for file in folder.iterdir()} == WHOLE[kind], folder
    # every node answers, from its own weights
    for node in tree["nodes"] if kind == "real" else tree["nodes"][-5:]:
        body = {"prompt": "What is rain?", "node": node["id"], "sampling": {"max_new_tokens": 2}}
        assert client.post(f"{API}/{session}/sample", json=body).status_code == 200


def hit(server: Server, what: str) -> None:
    """Kill, and see that nothing is left running that should not be."""
    engines = server.engine_pids()
    if what in ("engine", "both"):
        for pid in engines:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if what in ("server", "both"):
        server.kill()
        processes_end(engines)
        server.start()


def storm(save_dir: Path, kind: str, rounds: int, longest: float, reading: float = 0.0) -> None:
    dice = random.Random(20)
    server = Server(save_dir, fake=kind == "fake")
    acknowledged: list[dict[str, Any]] = []
    foreseen = 0
    try:
        with server.client() as client:
            session = new_session(client, control_prompt="", max_new_tokens=24)["id"]
        for number in range(rounds):
            person = Person(server, session, dice, number, reading)
            person.start()
            if reading:  # however slow the machine is: the hit falls among choices that were foreseen
                person.until_foreseen(180)
            time.sleep(dice.uniform(0.01, longest))
            hit(server, dice.choice(["server", "engine", "both"]))
            person.stopped = True
            person.join(60)
            assert not person.is_alive()
            acknowledged += person.acknowledged
            foreseen += person.foreseen
            with server.client() as client:
                wait_ready(client, session, 60)
        with server.client() as client:
            check(client, server, session, acknowledged, kind)
    finally:
        server.stop()
    assert len(acknowledged) >= rounds / 3, "the test did nothing"
    assert not reading or foreseen >= rounds / 3, "nothing was foreseen"
    assert "Traceback" not in server.output, server.output


@pytest.mark.slow
def test_nothing_is_lost_whatever_is_killed_when(tmp_path: Path) -> None:
    storm(tmp_path, "fake", rounds=20, longest=0.4)


@pytest.mark.slow
@pytest.mark.engine
def test_nothing_is_lost_with_the_real_engine(tmp_path: Path) -> None:
    storm(tmp_path, "real", rounds=4, longest=2.0)


@pytest.mark.slow
def test_nothing_of_what_was_foreseen_is_lost_whatever_is_killed_when(tmp_path: Path) -> None:
    storm(tmp_path, "fake", rounds=10, longest=0.8, reading=0.5)


@pytest.mark.slow
@pytest.mark.engine
def test_nothing_of_what_was_foreseen_is_lost_with_the_real_engine(tmp_path: Path) -> None:
    storm(tmp_path, "real", rounds=4, longest=4.0, reading=4.0)


def test_a_second_studio_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        with pytest.raises(AssertionError, match="Another Trellis server is using"):
            Server(tmp_path)
    finally:
        server.stop()


def test_a_folder_that_cannot_be_written_loses_nothing_and_is_told(tmp_path: Path) -> None:
    """The folder of weights cannot be written for a while: the choice waits, and is learned from when it can."""
    server = Server(tmp_path)
    try:
        with server.client() as client:
            state = new_session(client)
            weights = tmp_path / "weights"
            aside = tmp_path / "aside"
            weights.rename(aside)
            weights.write_text("a file stands where the folder was")
            client.post(f"{API}/{state['id']}/choose", json={"offer": state["offer"]["id"], "choice": 0})
            failed: dict[str, Any] = {}
            for _ in range(500):
                failed = client.get(f"{API}/{state['id']}").json()
                if failed["status"] == "failed":
                    break
                time.sleep(0.01)
            assert failed["error"]["code"] == "disk_write"
            weights.unlink()
            aside.rename(weights)
            client.post(f"{API}/{state['id']}/resume")
            assert wait_ready(client, state["id"])["head"]["step"] == 1
    finally:
        server.stop()
