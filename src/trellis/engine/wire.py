"""The engine's end of the private socket: frames in by a thread of their own, frames out in order.

It does not know what the frames mean.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable

from ..messages import HEADER, Down, Up, frame, frame_length


class Wire:
    """Frames over a connected socket. `closed` is called once, from the reading thread, when the far end is gone."""

    def __init__(self, sock: socket.socket, closed: Callable[[], None]) -> None:
        self._socket = sock
        self._closed = closed
        self._inbox: queue.SimpleQueue[Down | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="wire", daemon=True).start()

    def receive(self, wait: bool) -> Down | None:
        """The next frame; None when there is none (or, having waited, when the far end is gone)."""
        try:
            return self._inbox.get(block=wait)
        except queue.Empty:
            return None

    def send(self, up: Up) -> None:
        """Raises OSError when the far end is gone."""
        self._socket.sendall(frame(up))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as stream:
                while header := stream.read(HEADER.size):
                    self._inbox.put(Down.model_validate_json(stream.read(frame_length(header))))
        except (OSError, ValueError):
            pass  # a broken frame and a broken socket mean the same: nobody to work for
        self._inbox.put(None)
        self._closed()
