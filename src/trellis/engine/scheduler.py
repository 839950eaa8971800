"""The scheduler: requests run as generators, one step at a time, the most urgent first.

A handler yields after every decode step or optimizer step. Between two steps a more urgent request may run, or the
request may be cancelled. If the engine can work on several requests at once, each lane is a thread that runs steps in
turn; background work pauses while somebody waits. The scheduler does not know models.
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
"""Priority of requests that somebody waits for; higher numbers are background work."""

BATCH_PRIORITY = 0.5
"""Priority of the chat batch: after requests that somebody waits for, before background work."""

BATCH_MAX_WAIT = 0.1
"""After this many seconds without a step, the chat batch gets one although somebody waits: text keeps flowing at
reading speed."""

BACKGROUND_MAX_WAIT = 0.5
"""After this many seconds without a step, background work gets one although a chat is running."""

Handler = Callable[[Any], Steps]

RequestEvents = list[tuple[int, Event, bool]]
"""Events of several requests: request id, event, and whether it is the request's last."""


class RequestBatch(Protocol):
    """Requests processed as one batch: each step advances all of them. `join` and `leave` are thread-safe."""

    def join(self, number: int, owner: str, request: Any) -> None: ...

    def leave(self, number: int) -> None:
        """Cancel a request. The next step reports it as cancelled if it was in the batch."""

    @property
    def has_work(self) -> bool:
        """Whether there is anything to do."""

    def step(self) -> RequestEvents: ...

    def abort(self) -> list[int]:
        """Drop all requests after a failed step. Returns their ids."""


@dataclass(eq=False)
class Task:
    """A request, or a batch. `virtual_start` is its start if every owner had a machine of their own, in requests."""

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
        """Whether it has work to do; a batch may be empty."""
        return isinstance(self.work, Generator) or self.work.has_work

    @property
    def current_priority(self) -> float:
        """Its priority now: an overdue batch is interactive."""
        is_overdue = not isinstance(self.work, Generator) and time.monotonic() - self.last_step_time > BATCH_MAX_WAIT
        return INTERACTIVE_PRIORITY if is_overdue else self.priority

    @property
    def sort_key(self) -> tuple[float, bool, int, int]:
        """Started tasks first, then owners in turn."""
        return self.current_priority, not self.is_started, self.virtual_start, self.arrival


class Scheduler:
    """Runs handlers for the frames it receives. `send` raises OSError when the web process is gone; `lanes` says how
    many requests may run concurrently. Thread-safe."""

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
        """Accept a frame."""
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
        """Start-time fair queuing (Goyal, Vin and Cheng 1996) with equal cost for all requests: owners with many
        requests come after owners with few, and nobody starves."""
        is_alone = not any(task.priority == priority for task in self._tasks)
        if is_alone:  # forget what was consumed while nobody else waited
            self._next_starts = {who: start for who, start in self._next_starts.items() if who[1] != priority}
        turn = max(self._virtual_time, self._next_starts.get((owner, priority), 0))
        self._next_starts[owner, priority] = turn + 1
        return turn

    def close(self) -> None:
        """Accept no more frames."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def run(self) -> None:
        """Run lanes in this thread and others until all work is done and no more can arrive."""
        with self._changed:
            self._start_lanes()
        self._run_lane(is_first_lane=True)
        for thread in self._extra_lanes:
            thread.join()

    def _run_lane(self, is_first_lane: bool) -> None:
        while (task := self._wait_for_task(is_first_lane)) is not None:
            last = False
            # Send while the task is held, so that its events keep their order.
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
        """Return the next task to step, marked as running; None when there will be no more."""
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
        """Tell queued requests their position if it improved: a continued turn may take a lane that another request was
        next for, and a worse position is not reported."""
        with self._queue_report_lock:  # two threads must report in the order in which they looked
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
        """Return background work that has had no step for long: endless chats must not starve it."""
        now = time.monotonic()
        starved = [
            each for each in free if each.priority > BATCH_PRIORITY and now - each.last_step_time > BACKGROUND_MAX_WAIT
        ]
        return min(starved, key=lambda each: each.sort_key, default=None)

    def _start_lanes(self) -> None:
        """Start an extra thread per lane, at low scheduling priority. The first thread is reserved for interactive
        requests, so that these need not wait for the end of a background step."""
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
        """Run one step. Returns request id, event, and whether it is the last."""
        try:
            if not isinstance(task.work, Generator):
                return [*task.work.step()]
            if task.is_cancelled:
                task.work.close()
                return [(task.id, Cancelled(), True)]
            return [(task.id, next(task.work), False)]
        except StopIteration as stop:
            return [(task.id, stop.value, True)]
        except Exception as error:  # noqa: BLE001 - the engine's loop; unknown errors are logged
            event = explain_error(error)
            numbers = [task.id] if isinstance(task.work, Generator) else task.work.abort()
            return [(number, event, True) for number in numbers]

    def _send(self, request: int, event: Event, last: bool) -> None:
        try:
            with self._send_lock:
                self._send_frame(EventFrame(id=request, last=last, body=event))
        except OSError:  # the web process is gone, so nobody needs the work
            with self._changed:
                self._tasks.clear()
                self._is_closing = True
