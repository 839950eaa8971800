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

from ..messages import Cancel, Cancelled, Event, EventFrame, QueuePosition, RequestFrame, SetPriority
from .known_errors import explain_error
from .parallel import lower_thread_priority

Steps = Generator[Event | None, None, Event]
"""A handler's work: yields an event to send, or None where it may be paused; returns the last event."""

INTERACTIVE_PRIORITY = 0
"""The priority of what somebody waits for; anything with a higher number can wait."""

BATCH_PRIORITY = 0.5
"""The priority of what is worked on together: after who waits for a click, before all that can wait."""

BATCH_MAX_WAIT = 0.1
"""Seconds after which what is worked on together has a step even while somebody waits: text goes on at the speed at
which it is read."""

BACKGROUND_MAX_WAIT = 0.5
"""Seconds after which what can wait has a step even while people talk."""

Handler = Callable[[Any], Steps]

RequestEvents = list[tuple[int, Event, bool]]
"""Events of several requests: each with its request's number, and whether it is the last."""


class RequestBatch(Protocol):
    """Requests that are worked on together: each step is one for all of them. Any thread may let one join or leave."""

    def join(self, number: int, owner: str, request: Any) -> None: ...

    def leave(self, number: int) -> None:
        """One is not wanted any more. The next step says so of it, if it is there."""

    @property
    def has_work(self) -> bool:
        """Whether there is anything to do."""

    def step(self) -> RequestEvents: ...

    def abort(self) -> list[int]:
        """Forget all of them, after a step that failed. Returns their numbers."""


@dataclass(eq=False)
class Task:
    """A request. `turn` is when it would begin if every owner had a machine of their own, in requests."""

    id: int
    priority: float
    virtual_start: int
    arrival: int
    work: Steps | RequestBatch
    continues_turn: bool = False
    is_started: bool = False
    is_running: bool = False
    is_cancelled: bool = False
    queue_position: int | None = None
    last_step_time: float = field(default_factory=time.monotonic)

    @property
    def has_work(self) -> bool:
        """Whether it has work to do: what is done together is there also when nobody takes part."""
        return isinstance(self.work, Generator) or self.work.has_work

    @property
    def current_priority(self) -> float:
        """How urgent it is by now."""
        is_overdue = not isinstance(self.work, Generator) and time.monotonic() - self.last_step_time > BATCH_MAX_WAIT
        return INTERACTIVE_PRIORITY if is_overdue else self.priority

    @property
    def sort_key(self) -> tuple[float, bool, int, int]:
        """What is begun is ended first; owners take turns."""
        return self.current_priority, not self.is_started, self.virtual_start, self.arrival


class Scheduler:
    """Runs handlers for the frames that it is given. `send` raises OSError when nobody listens any more; `lanes` says
    how many requests may be worked on at once. Safe to use from any thread."""

    def __init__(
        self,
        send: Callable[[EventFrame], None],
        handlers: Mapping[type, Handler],
        lanes: Callable[[], int] = lambda: 1,
        batches: Mapping[type, RequestBatch] | None = None,
    ) -> None:
        self._send_frame = send
        self._handlers = handlers
        self._lanes = lanes
        self._batches = batches or {}
        self._tasks = [Task(0, BATCH_PRIORITY, -1, -1, each, is_started=True) for each in self._batches.values()]
        self._arrivals = itertools.count()
        self._virtual_time = 0
        self._next_starts: dict[tuple[str, int], int] = {}
        self._changed = threading.Condition()
        self._send_lock = threading.Lock()
        self._queue_report_lock = threading.Lock()
        self._extra_lanes: list[threading.Thread] = []
        self._is_closing = False

    def receive(self, frame: RequestFrame) -> None:
        """A frame has come."""
        with self._changed:
            if isinstance(frame.body, Cancel):
                for task in self._tasks_of(frame.body.request):
                    task.is_cancelled = True
                for each in self._batches.values():
                    each.leave(frame.body.request)
            elif isinstance(frame.body, SetPriority):
                for task in self._tasks_of(frame.body.request):
                    task.priority = frame.body.priority
            elif type(frame.body) in self._batches:
                self._batches[type(frame.body)].join(frame.id, frame.owner, frame.body)
            else:
                steps = self._handlers[type(frame.body)](frame.body)
                virtual_start = (
                    self._virtual_time - 1 if frame.continues_turn else self._assign_start(frame.owner, frame.priority)
                )
                self._tasks.append(
                    Task(frame.id, frame.priority, virtual_start, next(self._arrivals), steps, frame.continues_turn)
                )
            self._changed.notify_all()
        self._report_queue_positions()

    def _assign_start(self, owner: str, priority: int) -> int:
        """Start-time fair queuing (Goyal, Vin and Cheng 1996), all requests taken for equally long: who has asked for
        much already comes after who has not, and nobody is put off for ever."""
        is_alone = not any(task.priority == priority for task in self._tasks)
        if is_alone:  # what was had while nobody else waited is forgotten
            self._next_starts = {who: start for who, start in self._next_starts.items() if who[1] != priority}
        turn = max(self._virtual_time, self._next_starts.get((owner, priority), 0))
        self._next_starts[owner, priority] = turn + 1
        return turn

    def close(self) -> None:
        """No more frames come."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def run(self) -> None:
        """Work in this thread, and as many others as there are lanes, until all is done and no more can come."""
        with self._changed:
            self._start_lanes()
        self._run_lane(is_first_lane=True)
        for thread in self._extra_lanes:
            thread.join()

    def _run_lane(self, is_first_lane: bool) -> None:
        while (task := self._wait_for_task(is_first_lane)) is not None:
            last = False
            # Sent while the task is held, so that its events leave in their order.
            for number, event, last in self._step(task):
                if event is not None:
                    self._send(number, event, last)
            last = last and isinstance(task.work, Generator)
            with self._changed:
                task.is_running = False
                task.last_step_time = time.monotonic()
                if last and task in self._tasks:
                    self._tasks.remove(task)
                self._start_lanes()
                self._changed.notify_all()
            if last:
                self._report_queue_positions()

    def _wait_for_task(self, is_first_lane: bool) -> Task | None:
        """The next task to do a step of, held by whoever asked; None when there will be none any more."""
        with self._changed:
            while (task := self._choose_task(is_first_lane)) is None:
                if self._is_closing and not any(task.has_work or task.is_running for task in self._tasks):
                    return None
                self._changed.wait()
            task.is_running = True
            if not task.is_started:
                task.is_started = True
                self._virtual_time = max(self._virtual_time, task.virtual_start)
                for owner in [owner for owner, turn in self._next_starts.items() if turn <= self._virtual_time]:
                    del self._next_starts[owner]
            return task

    def _report_queue_positions(self) -> None:
        """Tell who waits for a turn their place, where it is a better one: who goes on with a turn may take a lane that
        another one was next for, and nobody is sent back for that."""
        with self._queue_report_lock:  # two threads must not tell in another order than they looked in
            with self._changed:
                interactive = [each for each in self._tasks if each.priority <= INTERACTIVE_PRIORITY]
                not_started = [task for task in interactive if not task.is_started and not task.continues_turn]
                free_lanes = max(0, self._lanes() - (len(interactive) - len(not_started)))
                reports = []
                for place, task in enumerate(sorted(not_started, key=lambda task: task.sort_key)[free_lanes:], start=1):
                    if task.queue_position is None or place < task.queue_position:
                        task.queue_position = place
                        reports.append((task.id, QueuePosition(place=place)))
            for request, queued in reports:
                self._send(request, queued, last=False)

    def _choose_task(self, is_first_lane: bool) -> Task | None:
        free = [task for task in self._tasks if not task.is_running and task.has_work]
        if not free:
            return None
        task = min(free, key=lambda task: (not task.is_cancelled, task.sort_key))
        if task.is_cancelled:
            return task
        if not isinstance(task.work, Generator) and task.current_priority > INTERACTIVE_PRIORITY:
            task = self._starved_task(free) or task
        if task.current_priority > INTERACTIVE_PRIORITY:
            is_reserved = is_first_lane and bool(self._extra_lanes) and task.priority > BATCH_PRIORITY
            if is_reserved or any(each.priority <= INTERACTIVE_PRIORITY for each in self._tasks):
                return None
        running = sum(each.is_running and each.priority <= task.priority for each in self._tasks)
        return (
            task if running < self._lanes() or task.current_priority <= INTERACTIVE_PRIORITY < task.priority else None
        )

    def _starved_task(self, free: list[Task]) -> Task | None:
        """What can wait and has had no step for long: people who talk without an end must not keep it for ever."""
        now = time.monotonic()
        starved = [
            each for each in free if each.priority > BATCH_PRIORITY and now - each.last_step_time > BACKGROUND_MAX_WAIT
        ]
        return min(starved, key=lambda each: each.sort_key, default=None)

    def _start_lanes(self) -> None:
        """Where there are several lanes, each has a thread that leaves the processor to whoever else wants it; the
        first thread is kept for what is waited for, which so need not wait for the end of a step that is not."""
        lanes = self._lanes()
        while lanes > 1 and len(self._extra_lanes) < lanes:
            thread = threading.Thread(
                target=self._run_extra_lane, name=f"lane {len(self._extra_lanes) + 1}", daemon=True
            )
            self._extra_lanes.append(thread)
            thread.start()

    def _run_extra_lane(self) -> None:
        lower_thread_priority()
        self._run_lane(is_first_lane=False)

    def _tasks_of(self, request: int) -> list[Task]:
        return [task for task in self._tasks if task.id == request]

    def _step(self, task: Task) -> list[tuple[int, Event | None, bool]]:
        """What is to be sent, each with the number of its request and whether it is that one's last."""
        try:
            if not isinstance(task.work, Generator):
                return [*task.work.step()]
            if task.is_cancelled:
                task.work.close()
                return [(task.id, Cancelled(), True)]
            return [(task.id, next(task.work), False)]
        except StopIteration as stop:
            return [(task.id, stop.value, True)]
        except Exception as error:  # noqa: BLE001 - the engine's loop; what it does not know is logged
            event = explain_error(error)
            numbers = [task.id] if isinstance(task.work, Generator) else task.work.abort()
            return [(number, event, True) for number in numbers]

    def _send(self, request: int, event: Event, last: bool) -> None:
        try:
            with self._send_lock:
                self._send_frame(EventFrame(id=request, last=last, body=event))
        except OSError:  # nobody listens: there is nobody to work for
            with self._changed:
                self._tasks.clear()
                self._is_closing = True
