"""Frames written straight to many sockets: one that is the same for all is made once, and nobody waits for anybody.

uvicorn's own way, a message to the application's `send` for each socket, is the one that is used where this is not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from ..studio.hub import HubEvent

PUSH = "trellis.push"

Push = Callable[[bytes], bool]
"""Write a frame if it can be written at once. Whether it was: one that is refused must be sent in the usual way."""


class PushingProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol, which lends the application its transport for frames that are whole already."""

    async def run_asgi(self) -> None:
        extensions: dict[str, Any] = self.scope["extensions"]
        extensions[PUSH] = self.push
        await super().run_asgi()

    def push(self, frame: bytes) -> bool:
        closed = self.close_sent or self.disconnected or self.transport.is_closing()
        if closed or not self.handshake_complete or not self.writable.is_set():
            return False
        self.transport.write(frame)
        return True


def text_frame(text: str) -> bytes:
    """A whole text message from a server (RFC 6455, section 5.2): unmasked, in one frame."""
    body = text.encode()
    if len(body) < 126:
        return struct.pack("!BB", 0x81, len(body)) + body
    if len(body) < 65536:
        return struct.pack("!BBH", 0x81, 126, len(body)) + body
    return struct.pack("!BBQ", 0x81, 127, len(body)) + body


class Frames:
    """The frame of the event that is being told, made once for all who hear it."""

    def __init__(self) -> None:
        self._event: HubEvent | None = None
        self._frame = b""

    def of(self, event: HubEvent) -> bytes:
        if event is not self._event:
            self._event, self._frame = event, text_frame(event.json)
        return self._frame
