"""Zip archives made while they are sent: bounded memory, whatever the size of the files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path


def stream_zip(files: list[tuple[str, Path]], chunk_size: int = 1 << 18) -> Iterator[bytes]:
    """Yield a zip archive piece by piece. Files are stored, not compressed: weights do not compress."""
    buffer = _ZipBuffer()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for name, file in files:
            info = zipfile.ZipInfo.from_file(file, name)
            with archive.open(info, "w", force_zip64=True) as entry, file.open("rb") as source:
                while chunk := source.read(chunk_size):
                    entry.write(chunk)
                    yield buffer.pop()
            yield buffer.pop()
    yield buffer.pop()


class _ZipBuffer:
    """A write-only file that is emptied as it grows."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._chunks.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        return

    def pop(self) -> bytes:
        taken, self._chunks = b"".join(self._chunks), []
        return taken
