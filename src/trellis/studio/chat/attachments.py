"""Attachments of messages: text and code, the text of PDFs, pictures for models that accept them.

The content decides the type of a file, not its name. Files are never executed, and served as downloads only.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Any

from ...blobs import Blobs
from ...errors import Invalid, NotFound, TrellisError, shorten
from ...store import rooms as rows
from ...store.store import Store
from ...text_rules import require_storable

TEXT, PDF, PICTURE = "text", "pdf", "picture"
MAX_BYTES = {TEXT: 1_000_000, PDF: 10_000_000, PICTURE: 5_000_000}
MAX_CHARACTERS = 400_000
MAX_FILES = 500
PDF_SECONDS = 40.0
CONTENT_FILE_NAME = "content"

PICTURE_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF87a": "image/gif", b"GIF89a": "image/gif",
}  # fmt: skip


class Attachments:
    """The files of all rooms: rows and extracted text in the store, each original in a folder."""

    def __init__(self, store: Store, blobs: Blobs) -> None:
        self._store, self._blobs = store, blobs
        self._pdf_semaphore = asyncio.Semaphore(2)

    async def read(self, name: str, data: bytes) -> dict[str, Any]:
        """Return what a file would be as an attachment. Raise Invalid for an unreadable one."""
        if not data:
            raise self._file_error(name, "is empty", "Choose another file.")
        kind = detect_kind(data)
        if len(data) > MAX_BYTES[kind]:
            max_megabytes = MAX_BYTES[kind] / 1e6
            problem = f"is {len(data) / 1e6:.1f} MB; the limit for this type is {max_megabytes:.0f} MB"
            raise self._file_error(name, problem, "Choose a smaller file, or part of it.")
        text = "" if kind == PICTURE else await self._extract_text(name, kind, data)
        return {"name": safe_file_name(name), "kind": kind, "bytes": len(data), "text": text}

    async def add(self, room_id: str, name: str, data: bytes) -> dict[str, Any]:
        """Add a file to a room. Raise Invalid for an unreadable one."""
        if len(await self._store.read(rows.get_files, room_id)) >= MAX_FILES:
            raise self._file_error(
                name, f"is one too many: a chat takes {MAX_FILES} files at most", "Start a new chat."
            )
        row: dict[str, Any] = {
            "id": f"f{secrets.token_hex(8)}",
            "room": room_id,
            "created": time.time(),
        } | await self.read(name, data)
        await asyncio.to_thread(self._write_content, row["id"], data)
        if not await self._store.write(rows.add_file, row):
            await self.discard(row["id"])
            raise NotFound("This chat no longer exists.", next_step="Start a new chat.")
        return {name: row[name] for name in ("id", "name", "kind", "bytes")} | {"characters": len(row["text"])}

    async def find(self, room_id: str, file_ids: Sequence[str], field: str) -> list[dict[str, Any]]:
        """Return files of a room as messages name them. Raise NotFound."""
        if not file_ids:
            return []
        files_by_id = {row["id"]: row for row in await self._store.read(rows.get_files, room_id)}
        if unknown := [each for each in file_ids if each not in files_by_id]:
            raise NotFound(
                f"There is no file “{shorten(unknown[0])}” in this chat.", field=field, next_step="Add it again."
            )
        return [{name: files_by_id[each][name] for name in ("id", "name", "kind", "bytes")} for each in file_ids]

    async def read_content(self, file_id: str) -> bytes:
        """Return the original bytes. Raise TrellisError when they are gone."""
        try:
            return await asyncio.to_thread((self._blobs.path(file_id) / CONTENT_FILE_NAME).read_bytes)
        except (OSError, ValueError):
            raise TrellisError(
                "This file no longer exists on disk.", code="not_found", next_step="Add it again."
            ) from None

    async def picture_data_url(self, file_id: str) -> str:
        """Return a picture as a `data:` URL."""
        data = await self.read_content(file_id)
        return f"data:{picture_media_type(data) or 'image/png'};base64,{base64.b64encode(data).decode()}"

    async def discard(self, file_id: str) -> None:
        await asyncio.to_thread(self._blobs.discard, file_id)

    def _write_content(self, file_id: str, data: bytes) -> None:
        with self._blobs.writing(file_id) as folder:
            (folder / CONTENT_FILE_NAME).write_bytes(data)

    async def _extract_text(self, name: str, kind: str, data: bytes) -> str:
        if kind == PDF:
            text = await self._extract_pdf_text(name, data)
        else:
            try:
                text = require_storable(data.decode("utf-8-sig"))
            except ValueError:
                raise self._file_error(
                    name, "isn't UTF-8 text, a PDF or an image", "Save it as text and add that."
                ) from None
        if not text.strip():
            raise self._file_error(
                name, "contains no text", "If its pages are scans, run text recognition (OCR) first."
            )
        if len(text) > MAX_CHARACTERS:
            raise self._file_error(
                name, f"has {len(text):,} characters of text; the limit is {MAX_CHARACTERS:,}", "Add part of it."
            )
        return text

    async def _extract_pdf_text(self, name: str, data: bytes) -> str:
        """Extract the text in a process with limits: a PDF may be malicious."""
        async with self._pdf_semaphore:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "trellis.reader.pdf", str(MAX_CHARACTERS), stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            try:
                output, _ = await asyncio.wait_for(process.communicate(data), PDF_SECONDS)
            except TimeoutError:
                raise self._file_error(name, "takes too long to read", "Save its text and add that.") from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        try:
            result = json.loads(output)
        except ValueError:
            raise self._file_error(name, "couldn't be read as a PDF", "Save its text and add that.") from None
        if "problem" in result:
            raise self._file_error(name, str(result["problem"]), "Save its text and add that.")
        return str(result["text"]).replace("\x00", "").encode("utf-8", "replace").decode()

    def _file_error(self, name: str, problem: str, next_step: str) -> Invalid:
        return Invalid(f"“{shorten(name)}” {problem}.", field="file", code="bad_file", next_step=next_step)


def detect_kind(data: bytes) -> str:
    if data[:1024].lstrip().startswith(b"%PDF-"):
        return PDF
    return PICTURE if picture_media_type(data) else TEXT


def picture_media_type(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for signature, kind in PICTURE_SIGNATURES.items() if data.startswith(signature)), None)


def safe_file_name(name: str) -> str:
    """Return a file name without path or unprintable characters; never empty."""
    last = re.split(r"[/\\]", name)[-1]
    printable = "".join(letter for letter in last if letter.isprintable() and letter not in '<>:"|?*').strip(". ")
    return printable.encode("utf-8", "ignore").decode()[-120:] or "file"
