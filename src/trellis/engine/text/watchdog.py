"""Stop foreign Python code that takes too long, such as a chat template."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

WATCHDOG_INTERVAL, WATCHDOG_IDLE_CHECKS = 0.25, 40
"""Seconds between checks, and how many checks without work end the watchdog's thread."""


class RenderTimeout(Exception):
    """Raised from outside in a template that takes too long."""


class Watchdog:
    """Stops foreign Python code that takes too long, by raising an exception inside it. Its thread lives while there is
    something to watch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, float] = {}
        """When the code in a thread is stopped, by thread id."""
        self._is_watching = False

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Context that raises RenderTimeout in this thread after some seconds, unless it has ended."""
        thread = threading.get_ident()
        with self._lock:
            self._deadlines[thread] = time.monotonic() + seconds
            if not self._is_watching:
                self._is_watching = True
                threading.Thread(target=self._watch, name="template watchdog", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:  # an exception on its way arrives here at the latest
                self._deadlines.pop(thread, None)

    def _watch(self) -> None:
        idle = 0
        while idle < WATCHDOG_IDLE_CHECKS:
            time.sleep(WATCHDOG_INTERVAL)
            with self._lock:
                for thread, deadline in list(self._deadlines.items()):
                    if time.monotonic() > deadline:
                        del self._deadlines[thread]
                        error = ctypes.py_object(RenderTimeout)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)
                idle = 0 if self._deadlines else idle + 1
                self._is_watching = idle < WATCHDOG_IDLE_CHECKS


WATCHDOG = Watchdog()
