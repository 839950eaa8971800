"""Stop foreign Python code that takes too long, such as a chat template."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

WATCHDOG_INTERVAL, WATCHDOG_IDLE_CHECKS = 0.25, 40
"""How often it is seen whether a template takes too long, and after how many looks at nothing that ends."""


class RenderTimeout(Exception):
    """Raised from outside in a template that does not come to an end."""


class Watchdog:
    """Stops Python code of others that takes too long, by an exception that is raised inside of it. Its thread lives
    while there is something to watch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, float] = {}
        """When what runs in a thread is stopped, by the thread's id."""
        self._is_watching = False

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Raise an exception in this thread after some seconds, unless what is done here has ended."""
        thread = threading.get_ident()
        with self._lock:
            self._deadlines[thread] = time.monotonic() + seconds
            if not self._is_watching:
                self._is_watching = True
                threading.Thread(target=self._watch, name="template watchdog", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:  # where the exception is on its way, it arrives here at the latest
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
