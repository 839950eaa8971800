"""The scheduler without a model: who goes first, what cancelling does, and what each kind of failure becomes."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.engine import scheduler as loop_module
from trellis.engine.parallel import NICENESS
from trellis.engine.scheduler import Scheduler
from trellis.errors import WeightsMissing
from trellis.messages import (
    Cancel,
    Cancelled,
    CreateAdapter,
    Delta,
    EventFrame,
    QueuePosition,
    RequestFrame,
    SetPriority,
    Status,
    StatusReport,
)
from trellis.options import Adapter


class Script:
    """A loop that is given some frames, and what it sends."""

    def __init__(self, *frames: RequestFrame) -> None:
        self.frames = frames
        self.sent: list[EventFrame] = []
        self.broken = False
        self.loop: Scheduler | None = None

    def send(self, up: EventFrame) -> None:
        if self.broken:
            raise OSError("gone")
        self.sent.append(up)

    def put(self, frame: RequestFrame) -> None:
        """One more, while the loop runs."""
        assert self.loop
        self.loop.receive(frame)

    def run(self, handlers: Any, lanes: int = 1) -> list[tuple[int, str, bool]]:
        self.loop = Scheduler(self.send, handlers, lambda: lanes)
        for frame in self.frames:
            self.loop.receive(frame)
        self.loop.close()
        self.loop.run()
        return [(up.id, up.body.type, up.last) for up in self.told]

    @property
    def told(self) -> list[EventFrame]:
        """All but places in the queue."""
        return [up for up in self.sent if not isinstance(up.body, QueuePosition)]


PLANT = CreateAdapter(adapter=Adapter(), seed=1)
REPORT = StatusReport(model=None, resident_bytes=1)


def down(number: int, body: Any, priority: int = 0, owner: str = "") -> RequestFrame:
    return RequestFrame(id=number, priority=priority, owner=owner, body=body)


def plants(*who: tuple[int, str], priority: int = 0) -> list[RequestFrame]:
    """Requests by number and owner; the number is their seed as well."""
    return [down(number, PLANT.model_copy(update={"seed": number}), priority, owner) for number, owner in who]


def steps(wire: Script, log: list[str], count: int, during: Any = None) -> Any:
    def handler(request: CreateAdapter) -> Any:
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


def test_requests_of_the_same_urgency_go_one_after_the_other() -> None:
    wire, log = Script(down(1, PLANT), down(2, PLANT.model_copy(update={"seed": 2}))), []
    wire.run({CreateAdapter: steps(wire, log, 2)})
    assert log == ["1.0", "1.1", "1 ends", "2.0", "2.1", "2 ends"]


def test_a_more_urgent_request_overtakes_between_two_steps() -> None:
    wire: Script = Script(down(1, PLANT, priority=1))
    log: list[str] = []
    urgent = lambda: wire.put(down(9, Status()))  # noqa: E731
    sent = wire.run({CreateAdapter: steps(wire, log, 4, urgent), Status: status})
    assert [(number, last) for number, _, last in sent] == [
        (1, False), (1, False), (9, True), (1, False), (1, False), (1, True)
    ]  # fmt: skip


def test_a_request_that_becomes_urgent_overtakes_one_that_has_begun() -> None:
    wire: Script = Script(*plants((1, ""), (2, ""), priority=3))
    log: list[str] = []
    urge = lambda: wire.put(down(2, SetPriority(request=2, priority=0)))  # noqa: E731
    wire.run({CreateAdapter: steps(wire, log, 3, urge)})
    assert log == ["1.0", "1.1", "2.0", "2.1", "2.2", "2 ends", "1.2", "1 ends"]


def test_a_cancelled_request_ends_at_its_next_step_and_lets_go_of_what_it_held() -> None:
    wire: Script = Script(down(1, PLANT))
    log: list[str] = []
    cancel = lambda: wire.put(down(5, Cancel(request=1)))  # noqa: E731
    sent = wire.run({CreateAdapter: steps(wire, log, 100, cancel)})
    assert sent[-1] == (1, "cancelled", True)
    assert log == ["1.0", "1.1", "1 ends"]


def test_cancelling_what_is_not_there_is_nothing() -> None:
    wire = Script(down(5, Cancel(request=77)), down(6, Status()))
    assert wire.run({Status: status}) == [(6, "status_report", True)]


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
    def failing(request: CreateAdapter) -> Any:
        yield None
        raise raised

    wire = Script(down(1, PLANT), down(2, Status()))
    wire.run({CreateAdapter: failing, Status: status})
    failed, answered = wire.told
    assert (failed.id, failed.last, failed.body.type) == (1, True, "failed")
    assert failed.body.code == code  # type: ignore[union-attr]
    assert failed.body.next_step  # type: ignore[union-attr]
    assert (answered.id, answered.body) == (2, REPORT)


def test_when_nobody_listens_the_work_is_dropped() -> None:
    wire: Script = Script(down(1, PLANT))
    log: list[str] = []
    wire.broken = True
    assert wire.run({CreateAdapter: steps(wire, log, 100)}) == []
    assert log[0] == "1.0"
    assert len(log) <= 2


def meeting(parties: int, log: list[str]) -> Any:
    """A handler that goes on only when so many of its kind are under way at once."""
    barrier = threading.Barrier(parties, timeout=10)

    def handler(request: CreateAdapter) -> Any:
        for step in range(3):
            barrier.wait()
            yield Delta(texts={0: str(step)})
        log.append(str(request.seed))
        return REPORT

    return handler


def test_each_lane_works_on_a_request_of_its_own() -> None:
    log: list[str] = []
    wire = Script(*(down(number, PLANT.model_copy(update={"seed": number})) for number in range(4)), down(9, Status()))
    sent = wire.run({CreateAdapter: meeting(2, log), Status: status}, lanes=2)
    assert sorted(log) == ["0", "1", "2", "3"]
    for number in range(4):
        assert [kind for at, kind, _ in sent if at == number] == ["delta"] * 3 + ["status_report"]


def test_what_nobody_waits_for_rests_while_somebody_waits() -> None:
    log: list[str] = []
    urgent = threading.Event()

    def waited_for(request: Status) -> Any:
        for _ in range(5):
            log.append("urgent")
            yield None
        urgent.set()
        return REPORT

    def ahead(request: CreateAdapter) -> Any:
        wire.put(down(9, Status()))
        yield None
        log.append("ahead" if urgent.is_set() else "ahead too early")
        return REPORT

    wire = Script(down(1, PLANT, priority=3))
    wire.run({CreateAdapter: ahead, Status: waited_for}, lanes=3)
    assert log == ["urgent"] * 5 + ["ahead"]


def test_somebody_who_waits_does_not_wait_for_the_steps_of_others_to_end() -> None:
    answered = threading.Event()
    log: list[int] = []
    begun = threading.Barrier(2, action=lambda: wire.put(down(9, Status())), timeout=10)

    def ahead(request: CreateAdapter) -> Any:
        log.append(request.seed)
        if request.seed < 3:
            begun.wait()  # both lanes are taken
            assert answered.wait(10)
        yield None
        return REPORT

    def urgent(request: Status) -> Any:
        assert 3 not in log  # what is no more urgent than others has to wait for a lane
        answered.set()
        yield None
        return REPORT

    wire = Script(*(down(number, PLANT.model_copy(update={"seed": number}), 3) for number in (1, 2, 3)))
    sent = wire.run({CreateAdapter: ahead, Status: urgent}, lanes=2)
    assert sent[0] == (9, "status_report", True)
    assert sorted(log) == [1, 2, 3]


def test_a_request_that_is_in_the_middle_of_a_step_is_cancelled_after_it() -> None:
    log: list[str] = []

    def long(request: CreateAdapter) -> Any:
        try:
            wire.put(down(5, Cancel(request=1)))
            yield Delta(texts={0: "told before it is over"})
            log.append("never")
            yield None
            return REPORT
        finally:
            log.append("let go")

    wire = Script(down(1, PLANT))
    assert wire.run({CreateAdapter: long}, lanes=2) == [(1, "delta", False), (1, "cancelled", True)]
    assert log == ["let go"]


def order_of(frames: list[RequestFrame], lanes: int = 1) -> tuple[list[int], Script]:
    """The requests in the order in which they were ended."""
    log: list[str] = []
    wire = Script(*frames)
    wire.run({CreateAdapter: steps(wire, log, 2)}, lanes)
    return [up.id for up in wire.sent if up.last], wire


def test_owners_take_turns_however_much_each_of_them_asks_for() -> None:
    greedy = [(number, "greedy") for number in range(1, 6)]
    order, _ = order_of(plants(*greedy, (6, "late"), (7, "later"), (8, "late")))
    assert order == [1, 6, 7, 2, 8, 3, 4, 5]


def test_who_asked_for_much_is_not_put_off_for_ever() -> None:
    wire, log = Script(*plants((1, "greedy"), (2, "greedy"), (3, "other"))), []

    def handler(request: CreateAdapter) -> Any:
        log.append(request.seed)
        if request.seed in range(3, 9):  # the other one asks again whenever it is served
            wire.put(plants((request.seed + 1, "other"))[0])
        yield None
        return REPORT

    wire.run({CreateAdapter: handler})
    assert log.index(2) <= 3


@given(st.lists(st.sampled_from("abc"), max_size=20))
def test_owners_who_wait_have_been_served_equally_often_give_or_take_one(owners: list[str]) -> None:
    order, _ = order_of(plants(*enumerate(owners)))
    assert sorted(order) == list(range(len(owners)))
    served, waiting = Counter[str](), Counter(owners)
    for number in order:
        served[owners[number]] += 1
        waiting[owners[number]] -= 1
        counts = [served[owner] for owner in +waiting]
        assert not counts or max(counts) - min(counts) <= 1


def test_who_was_served_while_nobody_else_waited_does_not_come_after_others_for_that() -> None:
    wire, log = Script(*plants((1, "a"))), []

    def handler(request: CreateAdapter) -> Any:
        log.append(request.seed)
        yield None
        return REPORT

    loop = Scheduler(wire.send, {CreateAdapter: handler})
    loop.receive(wire.frames[0])
    loop.close()
    loop.run()  # and then, when all is done
    for frame in plants((2, "a"), (3, "b"), (4, "c")):
        loop.receive(frame)
    loop.run()
    assert log == [1, 2, 3, 4]


def test_the_second_half_of_a_turn_comes_before_other_turns() -> None:
    wire, log = Script(*plants((1, "a"), (2, "b"), (3, "c"))), []

    def handler(request: CreateAdapter) -> Any:
        log.append(request.seed)
        if request.seed < 10:
            (again,) = plants((request.seed + 10, "abc"[request.seed - 1]))
            wire.put(again.model_copy(update={"continues_turn": True}))
        yield None
        return REPORT

    wire.run({CreateAdapter: handler})
    assert log == [1, 11, 2, 12, 3, 13]


def test_who_waits_is_told_their_place_and_each_time_it_is_another() -> None:
    _, wire = order_of(plants((1, "a"), (2, "b"), (3, "c"), (4, "a")))
    places = [(up.id, up.body.place) for up in wire.sent if isinstance(up.body, QueuePosition)]
    assert places == [(2, 1), (3, 2), (4, 3), (3, 1), (4, 2), (4, 1)]


def test_nobody_is_told_a_place_where_there_are_lanes_enough_or_nobody_waits() -> None:
    _, wire = order_of(plants((1, "a"), (2, "b")), lanes=2)
    assert not [up for up in wire.sent if isinstance(up.body, QueuePosition)]
    _, wire = order_of(plants((1, "a"), (2, "b"), (3, "c"), priority=3))
    assert not [up for up in wire.sent if isinstance(up.body, QueuePosition)]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux alone")
def test_what_nobody_waits_for_stands_back_and_what_is_waited_for_does_not() -> None:
    niceness: dict[int, int] = {}

    def handler(request: CreateAdapter) -> Any:
        for _ in range(3):
            niceness[request.seed] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            yield None
        return REPORT

    own = os.getpriority(os.PRIO_PROCESS, 0)
    ahead = Script(*plants((1, "a"), (2, "b"), priority=3))
    ahead.run({CreateAdapter: handler}, lanes=2)
    assert niceness == {1: NICENESS, 2: NICENESS}
    alone = Script(*plants((3, "a"), priority=3))
    alone.run({CreateAdapter: handler}, lanes=1)
    assert niceness[3] == own


class Choir:
    """What is done together, for as many steps as each member asks for."""

    def __init__(self, steps: int) -> None:
        self.left: dict[int, int] = {}
        self.steps = steps
        self.gone: list[int] = []
        self.fails = False

    def join(self, number: int, owner: str, request: Any) -> None:
        self.left[number] = self.steps

    def leave(self, number: int) -> None:
        if self.left.pop(number, None) is not None:
            self.gone.append(number)

    @property
    def has_work(self) -> bool:
        return bool(self.left or self.gone)

    def abort(self) -> list[int]:
        numbers, self.left = list(self.left), {}
        return numbers

    def step(self) -> list[tuple[int, Any, bool]]:
        if self.fails:
            raise MemoryError
        told: list[tuple[int, Any, bool]] = [(number, Cancelled(), True) for number in self.gone]
        self.gone = []
        for number in list(self.left):
            self.left[number] -= 1
            done = self.left[number] == 0
            told.append((number, REPORT if done else Delta(texts={}), done))
            if done:
                del self.left[number]
        return told


def sing(*frames: RequestFrame, choir: Choir, lanes: int = 1, handlers: Any = None) -> list[tuple[int, str, bool]]:
    script = Script()
    loop = Scheduler(script.send, handlers or {}, lambda: lanes, {Status: choir})
    for frame in frames:
        loop.receive(frame)
    loop.close()
    loop.run()
    return [(up.id, up.body.type, up.last) for up in script.told]


@pytest.mark.parametrize("lanes", [1, 3])
def test_what_is_done_together_has_one_step_for_all(lanes: int) -> None:
    sent = sing(down(1, Status()), down(2, Status()), choir=Choir(3), lanes=lanes)
    assert [number for number, _, _ in sent] == [1, 2, 1, 2, 1, 2]
    assert [last for *_, last in sent] == [False] * 4 + [True] * 2


def test_one_may_leave_what_is_done_together() -> None:
    sent = sing(down(1, Status()), down(2, Status()), down(9, Cancel(request=1)), choir=Choir(2))
    assert sent == [(1, "cancelled", True), (2, "delta", False), (2, "status_report", True)]


def test_a_failed_step_is_told_to_all_that_took_part() -> None:
    choir = Choir(2)
    choir.fails = True
    sent = sing(down(1, Status()), down(2, Status()), choir=choir)
    assert sent == [(1, "failed", True), (2, "failed", True)]


def test_who_waits_for_a_click_comes_before_what_is_done_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(request: Any) -> Any:
        for _ in range(3):
            yield Delta(texts={})
        return REPORT

    frames = (down(1, Status()), down(2, PLANT), down(3, PLANT, 1))
    sent = [number for number, _, _ in sing(*frames, choir=Choir(3), handlers={CreateAdapter: work})]
    assert sent == [2] * 4 + [1] * 3 + [3] * 4
    monkeypatch.setattr(loop_module, "BATCH_MAX_WAIT", 0.0)
    sent = [number for number, _, _ in sing(*frames, choir=Choir(3), handlers={CreateAdapter: work})]
    assert sent[:2] != [2, 2], "but it never stands still"
    assert Counter(sent) == {1: 3, 2: 4, 3: 4}


def test_people_who_talk_without_an_end_do_not_keep_what_can_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(request: Any) -> Any:
        for _ in range(3):
            yield Delta(texts={})
        return REPORT

    frames = (down(1, Status()), down(3, PLANT, 1))
    assert [number for number, _, _ in sing(*frames, choir=Choir(30), handlers={CreateAdapter: work})] == [1] * 30 + [
        3
    ] * 4
    monkeypatch.setattr(loop_module, "BACKGROUND_MAX_WAIT", 0.0)
    sent = [number for number, _, _ in sing(*frames, choir=Choir(30), handlers={CreateAdapter: work})]
    assert sent.index(3) < 30
    assert Counter(sent) == {1: 30, 3: 4}
