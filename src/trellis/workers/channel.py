"""Framed messages to an engine over a socket, for asyncio: requests down, events up.

The other end may be a process or, in tests, a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from ..messages import FRAME_HEADER, EventFrame, RequestFrame, encode_frame, frame_length


class Channel:
    """The web process's end of a private socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> Channel:
        sock.setblocking(False)
        return cls(*await asyncio.open_connection(sock=sock))

    async def send(self, frame: RequestFrame) -> None:
        """Send a frame. Raises ConnectionError when the engine is gone."""
        self._writer.write(encode_frame(frame))
        await self._writer.drain()

    async def receive(self) -> EventFrame | None:
        """Return the next event; None when the engine is gone or sends an invalid frame."""
        try:
            header = await self._reader.readexactly(FRAME_HEADER.size)
            return EventFrame.model_validate_json(await self._reader.readexactly(frame_length(header)))
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            return None

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
