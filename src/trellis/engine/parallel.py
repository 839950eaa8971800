"""Two halves of one piece of work at once, where a core is free for the second. It does not know what the work is."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

R = TypeVar("R")

SMALL_MODEL_PARAMETERS = 20_000_000
"""A model of fewer parameters runs on one thread: its operations are so short that threads wait for each other longer
than they work, the more so where a browser wants a core as well (docs/log.md). Two passes at once gain where two
threads in one do not."""

NICENESS = 10
"""How far a thread stands back, from 0 to 19."""


def lower_thread_priority() -> None:
    """Have this thread leave the processor to whoever else wants it, such as a browser and the studio."""
    if sys.platform == "linux":  # where each thread has a niceness of its own
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class CorePool:
    """So many hands as there are cores for this. Who works takes one, and another for a second half if there is one."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._taken = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(cores - 1, "hand", lower_thread_priority) if cores > 1 else None

    def run_both(self, first: Callable[[], R], second: Callable[[], R]) -> tuple[R, R]:
        """The results of both; one after the other where no hand is free."""
        with self._lock:
            claimed = 2 if self._taken + 2 <= self._cores else 1
            self._taken += claimed
        try:
            if claimed == 1 or self._threads is None:
                return first(), second()
            future = self._threads.submit(second)
            try:
                return first(), future.result()
            finally:
                future.exception()  # nothing goes on behind a failure
        finally:
            with self._lock:
                self._taken -= claimed


SINGLE_CORE = CorePool(1)
"""For who has one core."""
