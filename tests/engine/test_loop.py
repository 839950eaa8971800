"""The scheduler without a model: who goes first, what cancelling does, and what each kind of failure becomes."""

from __future__ import annotations

import errno
import queue
from typing import Any

import pytest

from trellis.engine.loop import Loop
from trellis.errors import WeightsMissing
from trellis.messages import Cancel, Delta, Down, Plant, Status, StatusReport, Up
from trellis.params import Adapter


class Script:
    """A wire that plays frames in and keeps what comes out. A frame may be a function, called when it is read."""

    def __init__(self, *frames: Any) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for frame in frames:
            self.inbox.put(frame)
        self.sent: list[Up] = []
        self.broken = False

    def receive(self, wait: bool) -> Down | None:
        if self.inbox.empty():
            return None
        frame: Down | None = self.inbox.get()
        return frame

    def send(self, up: Up) -> None:
        if self.broken:
            raise OSError("gone")
        self.sent.append(up)


PLANT = Plant(adapter=Adapter(), seed=1)
REPORT = StatusReport(model=None, resident_bytes=1)


def down(number: int, body: Any, priority: int = 0) -> Down:
    return Down(id=number, priority=priority, body=body)


def steps(wire: Script, log: list[str], count: int, during: Any = None) -> Any:
    def handler(request: Plant) -> Any:
        try:
            for step in range(count):
                log.append(f"{request.seed}.{step}")
                if during and step == 1:
                    during()
                yield Delta(texts={0: str(step)})
            return REPORT
        finally:
            log.append(f"{request.seed} ends")

    return handler


def status(request: Status) -> Any:
    yield None
    return REPORT


def run(wire: Script, handlers: Any) -> list[tuple[int, str, bool]]:
    Loop(wire, handlers).run()  # type: ignore[arg-type]
    return [(up.id, up.body.type, up.last) for up in wire.sent]


def test_requests_of_the_same_urgency_go_one_after_the_other() -> None:
    wire, log = Script(down(1, PLANT), down(2, PLANT.model_copy(update={"seed": 2}))), []
    run(wire, {Plant: steps(wire, log, 2)})
    assert log == ["1.0", "1.1", "1 ends", "2.0", "2.1", "2 ends"]


def test_a_more_urgent_request_overtakes_between_two_steps() -> None:
    wire: Script = Script(down(1, PLANT, priority=1))
    log: list[str] = []
    urgent = lambda: wire.inbox.put(down(9, Status()))  # noqa: E731
    sent = run(wire, {Plant: steps(wire, log, 4, urgent), Status: status})
    assert [(number, last) for number, _, last in sent] == [
        (1, False), (1, False), (9, True), (1, False), (1, False), (1, True)
    ]  # fmt: skip


def test_a_cancelled_request_ends_at_its_next_step_and_lets_go_of_what_it_held() -> None:
    wire: Script = Script(down(1, PLANT))
    log: list[str] = []
    cancel = lambda: wire.inbox.put(down(5, Cancel(request=1)))  # noqa: E731
    sent = run(wire, {Plant: steps(wire, log, 100, cancel)})
    assert sent[-1] == (1, "cancelled", True)
    assert log == ["1.0", "1.1", "1 ends"]


def test_cancelling_what_is_not_there_is_nothing() -> None:
    wire = Script(down(5, Cancel(request=77)), down(6, Status()))
    assert run(wire, {Status: status}) == [(6, "status_report", True)]


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (MemoryError(), "out_of_memory"),
        (OutOfMemoryError(), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left"), "disk_full"),
        (OSError(errno.EACCES, "Permission denied", "/weights"), "disk_write"),
        (WeightsMissing("w1"), "weights_missing"),
        (RuntimeError("shapes differ"), "engine_bug"),
    ],
)
def test_a_failure_ends_its_request_and_not_the_engine(raised: Exception, code: str) -> None:
    def failing(request: Plant) -> Any:
        yield None
        raise raised

    wire = Script(down(1, PLANT), down(2, Status()))
    Loop(wire, {Plant: failing, Status: status}).run()  # type: ignore[arg-type, dict-item]
    failed, answered = wire.sent
    assert (failed.id, failed.last, failed.body.type) == (1, True, "failed")
    assert failed.body.code == code  # type: ignore[union-attr]
    assert failed.body.next_step  # type: ignore[union-attr]
    assert (answered.id, answered.body) == (2, REPORT)


def test_when_nobody_listens_the_work_is_dropped() -> None:
    wire: Script = Script(down(1, PLANT))
    log: list[str] = []
    wire.broken = True
    assert run(wire, {Plant: steps(wire, log, 100)}) == []
    assert log[0] == "1.0"
    assert len(log) <= 2
