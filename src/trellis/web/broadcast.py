"""Write frames straight to many sockets: a frame that is the same for all is encoded once, and nobody waits.

Where uvicorn's transport is not available, its own way is used: a `send` for each socket.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from ..studio.hub import HubEvent

WRITE_FRAME_EXTENSION = "trellis.push"

WriteFrame = Callable[[bytes], bool]
"""Write a frame if that is possible at once. Return whether it was; if not, it must be sent the usual way."""


class DirectWriteProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol, which lends its transport to the application for encoded frames."""

    async def run_asgi(self) -> None:
        extensions: dict[str, Any] = self.scope["extensions"]
        extensions[WRITE_FRAME_EXTENSION] = self.write_frame
        await super().run_asgi()

    def write_frame(self, frame: bytes) -> bool:
        closed = self.close_sent or self.disconnected or self.transport.is_closing()
        if closed or not self.handshake_complete or not self.writable.is_set():
            return False
        self.transport.write(frame)
        return True


def text_frame(text: str) -> bytes:
    """Encode a text message of a server as one unmasked frame (RFC 6455, section 5.2)."""
    body = text.encode()
    if len(body) < 126:
        return struct.pack("!BB", 0x81, len(body)) + body
    if len(body) < 65536:
        return struct.pack("!BBH", 0x81, 126, len(body)) + body
    return struct.pack("!BBQ", 0x81, 127, len(body)) + body


class FrameCache:
    """The encoded frame of the current event, for all its readers."""

    def __init__(self) -> None:
        self._event: HubEvent | None = None
        self._frame = b""

    def frame_for(self, event: HubEvent) -> bytes:
        if event is not self._event:
            self._event, self._frame = event, text_frame(event.json)
        return self._frame
