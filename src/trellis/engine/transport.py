"""The engine's end of the private socket: a thread reads frames, frames are sent in order.

It does not know what the frames mean.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from ..messages import FRAME_HEADER, EventFrame, RequestFrame, encode_frame, frame_length


class Transport:
    """Frames over a connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def listen(self, on_frame: Callable[[RequestFrame], None], on_close: Callable[[], None]) -> None:
        """Start a thread that passes frames to `on_frame`, and calls `on_close` when the other end is gone."""
        threading.Thread(target=self._read_frames, args=(on_frame, on_close), name="wire", daemon=True).start()

    def send(self, frame: EventFrame) -> None:
        """Send a frame. Raises OSError when the other end is gone."""
        self._socket.sendall(encode_frame(frame))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read_frames(self, on_frame: Callable[[RequestFrame], None], on_close: Callable[[], None]) -> None:
        try:
            with self._socket.makefile("rb") as stream:
                while header := stream.read(FRAME_HEADER.size):
                    on_frame(RequestFrame.model_validate_json(stream.read(frame_length(header))))
        except (OSError, ValueError):
            pass  # a broken frame means the same as a broken socket: nobody to work for
        finally:
            on_close()
