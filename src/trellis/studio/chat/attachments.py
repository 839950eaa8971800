"""Files that go with messages: text and code as it is, the text of PDFs, pictures for models that see.

A file is told by what is in it, not by its name; it is never run, and served as a download alone.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
import sys
import time
from typing import Any

from ...blobs import Blobs
from ...errors import Invalid, NotFound, TrellisError, shorten
from ...store import rooms as rows
from ...store.store import Store
from ...text_rules import storable

TEXT, PDF, PICTURE = "text", "pdf", "picture"
MOST_BYTES = {TEXT: 1_000_000, PDF: 10_000_000, PICTURE: 5_000_000}
MOST_CHARACTERS = 400_000
MOST_FILES = 500
PDF_SECONDS = 40.0
CONTENT = "content"

PICTURES = {
    b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF87a": "image/gif", b"GIF89a": "image/gif",
}  # fmt: skip


class Attachments:
    """The files of all rooms: rows and text in the store, what was sent in a folder of its own each."""

    def __init__(self, store: Store, blobs: Blobs) -> None:
        self._store, self._blobs = store, blobs
        self._reading = asyncio.Semaphore(2)

    async def read(self, name: str, data: bytes) -> dict[str, Any]:
        """What a file would be with a message. Raises Invalid for what cannot be read."""
        if not data:
            raise self._refusal(name, "is empty", "Choose another file.")
        kind = kind_of(data)
        if len(data) > MOST_BYTES[kind]:
            most = MOST_BYTES[kind] / 1e6
            what = f"is {len(data) / 1e6:.1f} MB; the limit for this type is {most:.0f} MB"
            raise self._refusal(name, what, "Choose a smaller file, or part of it.")
        text = "" if kind == PICTURE else await self._text_of(name, kind, data)
        return {"name": safe_name(name), "kind": kind, "bytes": len(data), "text": text}

    async def add(self, room_id: str, name: str, data: bytes) -> dict[str, Any]:
        """Take a file for a room. Raises Invalid for what cannot be read."""
        if len(await self._store.read(rows.get_files, room_id)) >= MOST_FILES:
            raise self._refusal(name, f"is one too many: a chat takes {MOST_FILES} files at most", "Start a new chat.")
        row: dict[str, Any] = {
            "id": f"f{secrets.token_hex(8)}",
            "room": room_id,
            "created": time.time(),
        } | await self.read(name, data)
        await asyncio.to_thread(self._write, row["id"], data)
        if not await self._store.write(rows.add_file, row):
            await self.discard(row["id"])
            raise NotFound("This chat no longer exists.", next_step="Start a new chat.")
        return {name: row[name] for name in ("id", "name", "kind", "bytes")} | {"characters": len(row["text"])}

    async def content(self, file_id: str) -> bytes:
        """What was sent. Raises TrellisError when it is gone."""
        try:
            return await asyncio.to_thread((self._blobs.path(file_id) / CONTENT).read_bytes)
        except (OSError, ValueError):
            raise TrellisError(
                "This file no longer exists on disk.", code="not_found", next_step="Add it again."
            ) from None

    async def as_data(self, file_id: str) -> str:
        """A picture as a `data:` address."""
        data = await self.content(file_id)
        return f"data:{picture_type(data) or 'image/png'};base64,{base64.b64encode(data).decode()}"

    async def discard(self, file_id: str) -> None:
        await asyncio.to_thread(self._blobs.discard, file_id)

    def _write(self, file_id: str, data: bytes) -> None:
        with self._blobs.writing(file_id) as folder:
            (folder / CONTENT).write_bytes(data)

    async def _text_of(self, name: str, kind: str, data: bytes) -> str:
        if kind == PDF:
            text = await self._text_of_pdf(name, data)
        else:
            try:
                text = storable(data.decode("utf-8-sig"))
            except ValueError:
                raise self._refusal(
                    name, "isn't UTF-8 text, a PDF or an image", "Save it as text and add that."
                ) from None
        if not text.strip():
            raise self._refusal(name, "contains no text", "If its pages are scans, run text recognition (OCR) first.")
        if len(text) > MOST_CHARACTERS:
            raise self._refusal(
                name, f"has {len(text):,} characters of text; the limit is {MOST_CHARACTERS:,}", "Add part of it."
            )
        return text

    async def _text_of_pdf(self, name: str, data: bytes) -> str:
        """Read in a process of its own, with limits: a file may be made to harm who reads it."""
        async with self._reading:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "trellis.reader.pdf", str(MOST_CHARACTERS), stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            try:
                said, _ = await asyncio.wait_for(process.communicate(data), PDF_SECONDS)
            except TimeoutError:
                raise self._refusal(name, "takes too long to read", "Save its text and add that.") from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        try:
            found = json.loads(said)
        except ValueError:
            raise self._refusal(name, "couldn't be read as a PDF", "Save its text and add that.") from None
        if "problem" in found:
            raise self._refusal(name, str(found["problem"]), "Save its text and add that.")
        return str(found["text"]).replace("\x00", "").encode("utf-8", "replace").decode()

    def _refusal(self, name: str, what: str, next_step: str) -> Invalid:
        return Invalid(f"“{shorten(name)}” {what}.", field="file", code="bad_file", next_step=next_step)


def kind_of(data: bytes) -> str:
    if data[:1024].lstrip().startswith(b"%PDF-"):
        return PDF
    return PICTURE if picture_type(data) else TEXT


def picture_type(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for mark, kind in PICTURES.items() if data.startswith(mark)), None)


def safe_name(name: str) -> str:
    """A file's name without what is a path or no letter; never empty."""
    last = re.split(r"[/\\]", name)[-1]
    kept = "".join(letter for letter in last if letter.isprintable() and letter not in '<>:"|?*').strip(". ")
    return kept.encode("utf-8", "ignore").decode()[-120:] or "file"
