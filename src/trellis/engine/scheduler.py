"""The scheduler: requests run as generators, one step at a time, the most urgent first.

A handler yields after every decode step or optimiser step. Between two steps a more urgent request may
run, or the request may be cancelled. Where the engine can work on several at once, each lane is a thread that does
one step after another of whatever comes next; what is less urgent rests while somebody waits. It does not know models.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..messages import Cancel, Cancelled, Down, Event, Queued, Up, Urge
from .known_errors import explained
from .parallel import stand_back

Steps = Generator[Event | None, None, Event]
"""A handler's work: yields an event to send, or None where it may be paused; returns the last event."""

WAITED_FOR = 0
"""The priority of what somebody waits for; anything with a higher number can wait."""

TALKED_TO = 0.5
"""The priority of what is worked on together: after who waits for a click, before all that can wait."""

PATIENCE = 0.1
"""Seconds after which what is worked on together has a step even while somebody waits: text goes on at the speed at
which it is read."""

LENIENCE = 0.5
"""Seconds after which what can wait has a step even while people talk."""

Handler = Callable[[Any], Steps]

Told = list[tuple[int, Event, bool]]
"""Events of several requests: each with its request's number, and whether it is the last."""


class Together(Protocol):
    """Requests that are worked on together: each step is one for all of them. Any thread may let one join or leave."""

    def join(self, number: int, owner: str, request: Any) -> None: ...

    def leave(self, number: int) -> None:
        """One is not wanted any more. The next step says so of it, if it is there."""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""

    def step(self) -> Told: ...

    def give_up(self) -> list[int]:
        """Forget all of them, after a step that failed. Returns their numbers."""


@dataclass(eq=False)
class Task:
    """A request. `turn` is when it would begin if every owner had a machine of their own, in requests."""

    id: int
    urgency: float
    turn: int
    number: int
    steps: Steps | Together
    goes_on: bool = False
    begun: bool = False
    running: bool = False
    cancelled: bool = False
    place: int | None = None
    stepped: float = field(default_factory=time.monotonic)

    @property
    def wanted(self) -> bool:
        """Whether it has work to do: what is done together is there also when nobody takes part."""
        return isinstance(self.steps, Generator) or self.steps.wanted

    @property
    def urgent(self) -> float:
        """How urgent it is by now."""
        overdue = not isinstance(self.steps, Generator) and time.monotonic() - self.stepped > PATIENCE
        return WAITED_FOR if overdue else self.urgency

    @property
    def order(self) -> tuple[float, bool, int, int]:
        """What is begun is ended first; owners take turns."""
        return self.urgent, not self.begun, self.turn, self.number


class Loop:
    """Runs handlers for the frames that it is given. `send` raises OSError when nobody listens any more; `lanes` says
    how many requests may be worked on at once. Safe to use from any thread."""

    def __init__(
        self,
        send: Callable[[Up], None],
        handlers: Mapping[type, Handler],
        lanes: Callable[[], int] = lambda: 1,
        together: Mapping[type, Together] | None = None,
    ) -> None:
        self._frames_out = send
        self._handlers = handlers
        self._lanes = lanes
        self._together = together or {}
        self._tasks = [Task(0, TALKED_TO, -1, -1, each, begun=True) for each in self._together.values()]
        self._arrivals = itertools.count()
        self._turn = 0
        self._turns: dict[tuple[str, int], int] = {}
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._telling = threading.Lock()
        self._others: list[threading.Thread] = []
        self._ending = False

    def take(self, down: Down) -> None:
        """A frame has come."""
        with self._changed:
            if isinstance(down.body, Cancel):
                for task in self._named(down.body.request):
                    task.cancelled = True
                for each in self._together.values():
                    each.leave(down.body.request)
            elif isinstance(down.body, Urge):
                for task in self._named(down.body.request):
                    task.urgency = down.body.priority
            elif type(down.body) in self._together:
                self._together[type(down.body)].join(down.id, down.owner, down.body)
            else:
                steps = self._handlers[type(down.body)](down.body)
                turn = self._turn - 1 if down.goes_on else self._turn_of(down.owner, down.priority)
                self._tasks.append(Task(down.id, down.priority, turn, next(self._arrivals), steps, down.goes_on))
            self._changed.notify_all()
        self._tell_places()

    def _turn_of(self, owner: str, urgency: int) -> int:
        """Start-time fair queuing (Goyal, Vin and Cheng 1996), all requests taken for equally long: who has asked for
        much already comes after who has not, and nobody is put off for ever."""
        alone = not any(task.urgency == urgency for task in self._tasks)
        if alone:  # what was had while nobody else waited is forgotten
            self._turns = {who: turn for who, turn in self._turns.items() if who[1] != urgency}
        turn = max(self._turn, self._turns.get((owner, urgency), 0))
        self._turns[owner, urgency] = turn + 1
        return turn

    def end(self) -> None:
        """No more frames come."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def run(self) -> None:
        """Work in this thread, and as many others as there are lanes, until all is done and no more can come."""
        with self._changed:
            self._open_lanes()
        self._work(first=True)
        for thread in self._others:
            thread.join()

    def _work(self, first: bool) -> None:
        while (task := self._wait(first)) is not None:
            last = False
            # Sent while the task is held, so that its events leave in their order.
            for number, event, last in self._step(task):
                if event is not None:
                    self._send(number, event, last)
            last = last and isinstance(task.steps, Generator)
            with self._changed:
                task.running = False
                task.stepped = time.monotonic()
                if last and task in self._tasks:
                    self._tasks.remove(task)
                self._open_lanes()
                self._changed.notify_all()
            if last:
                self._tell_places()

    def _wait(self, first: bool) -> Task | None:
        """The next task to do a step of, held by whoever asked; None when there will be none any more."""
        with self._changed:
            while (task := self._next(first)) is None:
                if self._ending and not any(task.wanted or task.running for task in self._tasks):
                    return None
                self._changed.wait()
            task.running = True
            if not task.begun:
                task.begun = True
                self._turn = max(self._turn, task.turn)
                for owner in [owner for owner, turn in self._turns.items() if turn <= self._turn]:
                    del self._turns[owner]
            return task

    def _tell_places(self) -> None:
        """Tell who waits for a turn their place, where it is a better one: who goes on with a turn may take a lane that
        another one was next for, and nobody is sent back for that."""
        with self._telling:  # two threads must not tell in another order than they looked in
            with self._changed:
                waited_for = [each for each in self._tasks if each.urgency <= WAITED_FOR]
                turns = [task for task in waited_for if not task.begun and not task.goes_on]
                at_once = max(0, self._lanes() - (len(waited_for) - len(turns)))
                told = []
                for place, task in enumerate(sorted(turns, key=lambda task: task.order)[at_once:], start=1):
                    if task.place is None or place < task.place:
                        task.place = place
                        told.append((task.id, Queued(place=place)))
            for request, queued in told:
                self._send(request, queued, last=False)

    def _next(self, first: bool) -> Task | None:
        free = [task for task in self._tasks if not task.running and task.wanted]
        if not free:
            return None
        task = min(free, key=lambda task: (not task.cancelled, task.order))
        if task.cancelled:
            return task
        if not isinstance(task.steps, Generator) and task.urgent > WAITED_FOR:
            task = self._next_that_waited_long(free) or task
        if task.urgent > WAITED_FOR:
            kept_free = first and bool(self._others) and task.urgency > TALKED_TO
            if kept_free or any(each.urgency <= WAITED_FOR for each in self._tasks):
                return None
        alike = sum(each.running and each.urgency <= task.urgency for each in self._tasks)
        return task if alike < self._lanes() or task.urgent <= WAITED_FOR < task.urgency else None

    def _next_that_waited_long(self, free: list[Task]) -> Task | None:
        """What can wait and has had no step for long: people who talk without an end must not keep it for ever."""
        now = time.monotonic()
        waited = [each for each in free if each.urgency > TALKED_TO and now - each.stepped > LENIENCE]
        return min(waited, key=lambda each: each.order, default=None)

    def _open_lanes(self) -> None:
        """Where there are several lanes, each has a thread that leaves the processor to whoever else wants it; the
        first thread is kept for what is waited for, which so need not wait for the end of a step that is not."""
        lanes = self._lanes()
        while lanes > 1 and len(self._others) < lanes:
            thread = threading.Thread(target=self._work_aside, name=f"lane {len(self._others) + 1}", daemon=True)
            self._others.append(thread)
            thread.start()

    def _work_aside(self) -> None:
        stand_back()
        self._work(first=False)

    def _named(self, request: int) -> list[Task]:
        return [task for task in self._tasks if task.id == request]

    def _step(self, task: Task) -> list[tuple[int, Event | None, bool]]:
        """What is to be sent, each with the number of its request and whether it is that one's last."""
        try:
            if not isinstance(task.steps, Generator):
                return [*task.steps.step()]
            if task.cancelled:
                task.steps.close()
                return [(task.id, Cancelled(), True)]
            return [(task.id, next(task.steps), False)]
        except StopIteration as stop:
            return [(task.id, stop.value, True)]
        except Exception as error:  # noqa: BLE001 - the engine's loop; what it does not know is logged
            said = explained(error)
            numbers = [task.id] if isinstance(task.steps, Generator) else task.steps.give_up()
            return [(number, said, True) for number in numbers]

    def _send(self, request: int, event: Event, last: bool) -> None:
        try:
            with self._sending:
                self._frames_out(Up(id=request, last=last, body=event))
        except OSError:  # nobody listens: there is nobody to work for
            with self._changed:
                self._tasks.clear()
                self._ending = True
