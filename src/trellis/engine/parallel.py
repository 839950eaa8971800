"""Run two halves of one piece of work in parallel if a core is free. It does not know what the work is."""

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
"""Models with fewer parameters run on one thread: their operations are so short that threads would mostly wait for each
other (docs/log.md). Two passes in parallel still help where two threads in one pass do not."""

NICENESS = 10
"""Niceness of background threads, from 0 to 19."""


def lower_thread_priority() -> None:
    """Lower this thread's scheduling priority in favour of other processes, such as a browser and the studio."""
    if sys.platform == "linux":  # only here does each thread have its own niceness
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class CorePool:
    """A limit on the cores in use. Work takes one, and a second one for its other half if one is free."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._taken = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(cores - 1, "hand", lower_thread_priority) if cores > 1 else None

    def run_both(self, first: Callable[[], R], second: Callable[[], R]) -> tuple[R, R]:
        """Return both results, computed in parallel if a second core is free."""
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
                future.exception()  # wait for it even if the first half failed
        finally:
            with self._lock:
                self._taken -= claimed


SINGLE_CORE = CorePool(1)
"""For callers without parallel halves."""
