"""The scheduler: requests run as generators, one step at a time, the most urgent first.

A handler yields after every decode step or optimiser step. Between two steps a more urgent request may
run, or the request may be cancelled. It does not know models.
"""

from __future__ import annotations

import errno
import itertools
import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import TrellisError
from ..messages import Cancel, Cancelled, Down, Event, Failed, Up, Urge
from .wire import Wire

log = logging.getLogger(__name__)

Steps = Generator[Event | None, None, Event]
"""A handler's work: yields an event to send, or None where it may be paused; returns the last event."""

Handler = Callable[[Any], Steps]


@dataclass
class Task:
    id: int
    order: tuple[int, int]
    steps: Steps


class Loop:
    """Runs handlers for the frames of one wire until its far end is gone."""

    def __init__(self, wire: Wire, handlers: Mapping[type, Handler]) -> None:
        self._wire = wire
        self._handlers = handlers
        self._tasks: list[Task] = []
        self._arrivals = itertools.count()

    def run(self) -> None:
        while True:
            while down := self._wire.receive(wait=not self._tasks):
                self._take(down)
            if not self._tasks:
                return
            task = min(self._tasks, key=lambda task: task.order)
            event, last = self._step(task)
            if last:
                self._tasks.remove(task)
            if event is not None:
                self._send(task.id, event, last)

    def _take(self, down: Down) -> None:
        if isinstance(down.body, Cancel):
            self._cancel(down.body.request)
            return
        if isinstance(down.body, Urge):
            self._urge(down.body)
            return
        steps = self._handlers[type(down.body)](down.body)
        self._tasks.append(Task(down.id, (down.priority, next(self._arrivals)), steps))

    def _urge(self, urge: Urge) -> None:
        for task in self._tasks:
            if task.id == urge.request:
                task.order = (urge.priority, task.order[1])

    def _cancel(self, request: int) -> None:
        for task in self._tasks:
            if task.id == request:
                self._tasks.remove(task)
                task.steps.close()
                self._send(request, Cancelled(), last=True)
                return

    def _step(self, task: Task) -> tuple[Event | None, bool]:
        try:
            return next(task.steps), False
        except StopIteration as stop:
            return stop.value, True
        except TrellisError as error:
            return failed(error), True
        except OSError as error:
            return failed(disk_trouble(error)), True
        except MemoryError:
            return failed(out_of_memory("this computer's memory")), True
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
                return failed(out_of_memory("the device's memory")), True
            if "not enough memory" in str(error) or "can't allocate memory" in str(error):  # torch's on a CPU
                return failed(out_of_memory("this computer's memory")), True
            if "os error 28" in str(error):  # safetensors', which hides the kind of the error in its words
                return failed(disk_trouble(OSError(errno.ENOSPC, "No space left on device"))), True
            log.exception("a request failed")
            return Failed(
                code="engine_bug",
                message=f"The engine met an error it does not know: {type(error).__name__}: {error}",
                next_step="Try again. If it comes back, the engine's log has the details.",
            ), True

    def _send(self, request: int, event: Event, last: bool) -> None:
        try:
            self._wire.send(Up(id=request, last=last, body=event))
        except OSError:
            self._tasks.clear()  # the far end is gone: the next wait for a frame ends the loop


def out_of_memory(where: str) -> TrellisError:
    return TrellisError(
        f"There was not enough of {where} for this.",
        code="out_of_memory",
        next_step="Use fewer or shorter options, a shorter context, or a smaller model.",
    )


def disk_trouble(error: OSError) -> TrellisError:
    where = f" at “{error.filename}”" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TrellisError(
            f"The disk is full{where}.",
            code="disk_full",
            next_step="Make room on the disk, then resume: the choice is kept and is learned from then.",
        )
    return TrellisError(
        f"The disk could not be read or written{where}: {error.strerror or error}.",
        code="disk_write",
        next_step="Check the studio's save folder, then resume: the choice is kept and is learned from then.",
    )


def failed(error: TrellisError) -> Failed:
    return Failed(
        code=error.code,
        message=error.message,
        next_step=error.next_step,
        field=error.field,
        details=error.details,
    )
