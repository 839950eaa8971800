"""Files that come in piece by piece, and go on where they broke off: prompts, and folders of models.

An upload is named by what is to come (names and sizes), so that the same one asked for again is the same upload, in
another tab or after a restart. Nothing is seen by the rest of the studio before all of it is here.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import Conflict, Invalid, NotFound, shorten
from ..messages import recipe_id
from ..params import invalid_entries
from .datasets import SUFFIXES

PIECE = 1_000_000
"""Bytes in one piece: what one request may carry."""
MOST_FILES = 200
ROOM = 200_000_000
STALE_SECONDS = 7 * 86_400.0
MODEL_FILES = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}\.(safetensors|json|jsonl|txt|md|jinja|model|tiktoken|vocab|bpe)|LICENSE|NOTICE"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._()+-]{0,150}")

Kind = Literal["prompts", "model"]


class Uploads:
    """`prompts` and `models` are the folders that finished uploads are moved to; `limit` is in bytes."""

    def __init__(self, folder: Path, prompts: Path, models: Path, limit: int) -> None:
        self._folder = folder
        self._prompts = prompts
        self._models = models
        self._limit = limit
        self._locks: dict[str, asyncio.Lock] = {}

    async def begin(self, kind: Kind, name: str, files: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """Start an upload, or find the one that was begun. Raises Invalid, or Conflict for a name that is taken."""
        self._check(kind, name, files)
        upload_id = recipe_id("u", [kind, name, sorted(files)])
        async with self._lock(upload_id):
            return await asyncio.to_thread(self._begin, upload_id, kind, name, files)

    async def state(self, upload_id: str) -> dict[str, Any]:
        """How far each file has come. Raises NotFound."""
        async with self._lock(upload_id):
            return await asyncio.to_thread(self._state, upload_id)

    async def append(self, upload_id: str, number: int, offset: int, piece: bytes) -> dict[str, Any]:
        """Add a piece to a file where it ends. Raises NotFound, Invalid, or Conflict with what there is already."""
        async with self._lock(upload_id):
            return await asyncio.to_thread(self._append, upload_id, number, offset, piece)

    async def cancel(self, upload_id: str) -> None:
        async with self._lock(upload_id):
            await asyncio.to_thread(shutil.rmtree, self._place(upload_id))

    def _lock(self, upload_id: str) -> asyncio.Lock:
        return self._locks.setdefault(upload_id, asyncio.Lock())

    def _check(self, kind: Kind, name: str, files: Sequence[tuple[str, int]]) -> None:
        wrong: list[dict[str, str]] = []
        if not _NAME.fullmatch(name):
            wrong.append(
                {"field": "name", "message": f"“{shorten(name)}” is not a name of letters, digits and “.-_ ”."}
            )
        if not files or len(files) > (1 if kind == "prompts" else MOST_FILES):
            wrong.append({"field": "files", "message": f"there are {len(files)}; 1 to {MOST_FILES} can be sent."})
        for number, (path, _size) in enumerate(files):
            if kind == "model" and not MODEL_FILES.fullmatch(path):
                message = (
                    f"“{shorten(path)}” is not a file of a model; safetensors, JSON and tokenizer files are taken."
                )
                wrong.append({"field": f"files.{number}.path", "message": message})
            elif kind == "prompts" and (not _NAME.fullmatch(path) or not path.lower().endswith(SUFFIXES)):
                message = f"“{shorten(path)}” is not a file of prompts; it must end in {', '.join(SUFFIXES)}."
                wrong.append({"field": f"files.{number}.path", "message": message})
        if kind == "model" and "config.json" not in {path for path, _ in files}:
            wrong.append({"field": "files", "message": "there is no config.json among them."})
        if len({path for path, _ in files}) != len(files):
            wrong.append({"field": "files", "message": "a name stands there twice."})
        total = sum(size for _, size in files)
        if total > self._limit:
            wrong.append(
                {"field": "files", "message": f"{total / 1e9:.2f} GB are over the limit of {self._limit / 1e9:.2f} GB."}
            )
        if wrong:
            raise invalid_entries(wrong)

    def _begin(self, upload_id: str, kind: Kind, name: str, files: Sequence[tuple[str, int]]) -> dict[str, Any]:
        self._forget_stale_ones()
        place = self._folder / upload_id
        if not place.is_dir():
            target = self._target(kind, name, files)
            if target.exists():
                raise Conflict(
                    f"There is “{target.name}” already.",
                    code="exists",
                    next_step="Give it another name, or delete the old one.",
                )
            total = sum(size for _, size in files)
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
            if total + ROOM > free:
                raise Conflict(
                    f"“{name}” has {total / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on the disk.",
                    code="disk_full", next_step="Make room there, or start the studio with another --save-dir.",
                )  # fmt: skip
            work = self._folder / f".{upload_id}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            about = {"kind": kind, "name": name, "files": [{"path": path, "bytes": size} for path, size in files]}
            (work / "upload.json").write_text(json.dumps(about))
            work.rename(place)
        return self._finish_if_whole(upload_id)

    def _append(self, upload_id: str, number: int, offset: int, piece: bytes) -> dict[str, Any]:
        state = self._state(upload_id)
        if not 0 <= number < len(state["files"]):
            raise NotFound(f"The upload has no file {number}.", next_step="Its files are counted from 0.")
        file = state["files"][number]
        if offset != file["received"]:
            raise Conflict(
                f"{file['received']} bytes of “{file['path']}” are here, and this piece begins at {offset}.",
                code="wrong_offset", next_step="Go on from what is here.", details={"upload": state},
            )  # fmt: skip
        if offset + len(piece) > file["bytes"]:
            raise Invalid(
                f"offset: “{file['path']}” has {file['bytes']} bytes, and this piece ends at {offset + len(piece)}.",
                field="offset", next_step="Begin the upload again: the file may have changed.",
            )  # fmt: skip
        with (self._place(upload_id) / str(number)).open("ab") as out:
            out.write(piece)
        return self._finish_if_whole(upload_id)

    def _finish_if_whole(self, upload_id: str) -> dict[str, Any]:
        """Move a whole upload to where it belongs. Its state then says so, for the last time."""
        state = self._state(upload_id)
        if any(file["received"] < file["bytes"] for file in state["files"]):
            return state
        place = self._place(upload_id)
        files = [(file["path"], file["bytes"]) for file in state["files"]]
        target = self._target(state["kind"], state["name"], files)
        target.parent.mkdir(parents=True, exist_ok=True)
        for number, (path, size) in enumerate(files):
            if size == 0:
                (place / str(number)).touch()
            (place / str(number)).rename(place / f"file-{path}")
        if state["kind"] == "prompts":
            (place / f"file-{files[0][0]}").rename(target)
        else:
            work = target.parent / f".upload-{upload_id}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            for path, _ in files:
                shutil.move(place / f"file-{path}", work / path)
            work.rename(target)
        shutil.rmtree(place, ignore_errors=True)
        return state | {"state": "done", "result": target.name}

    def _state(self, upload_id: str) -> dict[str, Any]:
        place = self._place(upload_id)
        about: dict[str, Any] = json.loads((place / "upload.json").read_text())
        for number, file in enumerate(about["files"]):
            part = place / str(number)
            file["received"] = part.stat().st_size if part.is_file() else 0
        return {"id": upload_id, "state": "open", "piece": PIECE, **about}

    def _place(self, upload_id: str) -> Path:
        place = self._folder / upload_id
        if not re.fullmatch(r"u[0-9a-f]{32}", upload_id) or not (place / "upload.json").is_file():
            raise NotFound(
                f"There is no upload “{shorten(upload_id)}” that is not finished.", next_step="Begin it again."
            )
        return place

    def _target(self, kind: Kind, name: str, files: Sequence[tuple[str, int]]) -> Path:
        return self._prompts / files[0][0] if kind == "prompts" else self._models / name

    def _forget_stale_ones(self) -> None:
        """Uploads that nobody has gone on with for a week."""
        if self._folder.is_dir():
            for place in self._folder.iterdir():
                if time.time() - place.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(place, ignore_errors=True)
