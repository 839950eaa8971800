"""Uploads in chunks that can be resumed: prompt files, and folders of models.

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
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

from ..errors import Conflict, Invalid, NotFound, shorten
from ..messages import recipe_id
from ..options import invalid_from_entries
from .datasets import PROMPT_FILE_SUFFIXES, SUFFIX_HELP
from .models import DEMO, FOLDER_NAME_PATTERN

CHUNK_BYTES = 1_000_000
"""Bytes in one piece: what one request may carry."""
MAX_FILES = 200
DISK_RESERVE_BYTES = 200_000_000
STALE_SECONDS = 7 * 86_400.0
MODEL_FILE_PATTERN = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}\.(safetensors|json|jsonl|txt|md|jinja|model|tiktoken|vocab|bpe)|LICENSE|NOTICE"
)
_UPLOAD_ID_PATTERN = re.compile(r"u[0-9a-f]{32}")
_FILE_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._()+-]{0,150}")

Kind = Literal["prompts", "model"]


class Uploads:
    """`prompts` and `models` are the folders that finished uploads are moved to; `max_bytes` is for one upload."""

    def __init__(self, folder: Path, prompts_folder: Path, models_folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._prompts_folder = prompts_folder
        self._models_folder = models_folder
        self._max_bytes = max_bytes
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def begin(
        self, kind: Kind, name: str, files: Sequence[tuple[str, int]], fingerprint: str = ""
    ) -> dict[str, Any]:
        """Start an upload, or find an unfinished one. Raise Invalid, or Conflict for a name that is taken.

        `fingerprint` is whatever else distinguishes these files from others of the same names and sizes, such as times.
        """
        self._validate(kind, name, files)
        files = sorted(files)
        upload_id = recipe_id("u", [kind, name, files, fingerprint])
        async with self._lock(upload_id):
            return await asyncio.to_thread(self._begin, upload_id, kind, name, files)

    async def state(self, upload_id: str) -> dict[str, Any]:
        """Return how many bytes of each file have arrived. Raise NotFound."""
        async with self._lock(upload_id):
            return await asyncio.to_thread(self._state, upload_id)

    async def append(self, upload_id: str, number: int, offset: int, chunk: bytes) -> dict[str, Any]:
        """Append a chunk to a file. Raise NotFound, Invalid, or Conflict with the offset where it ends."""
        async with self._lock(upload_id):
            return await asyncio.to_thread(self._append, upload_id, number, offset, chunk)

    async def cancel(self, upload_id: str) -> None:
        async with self._lock(upload_id):
            await asyncio.to_thread(shutil.rmtree, self._upload_folder(upload_id))

    def _lock(self, upload_id: str) -> asyncio.Lock:
        return self._locks.setdefault(upload_id, asyncio.Lock())

    def _validate(self, kind: Kind, name: str, files: Sequence[tuple[str, int]]) -> None:
        problems: list[dict[str, str]] = []
        if kind == "model" and (not FOLDER_NAME_PATTERN.fullmatch(name) or name == DEMO):
            message = f"“{shorten(name)}” isn't a valid model name. Use letters, digits and “.-_”, and not “{DEMO}”."
            problems.append({"field": "name", "message": message})
        elif not _FILE_NAME_PATTERN.fullmatch(name):
            message = f"“{shorten(name)}” isn't a valid file name. Use letters, digits and “.-_ ”."
            problems.append({"field": "name", "message": message})
        if not files or len(files) > (1 if kind == "prompts" else MAX_FILES):
            problems.append({"field": "files", "message": f"must be 1 to {MAX_FILES} files, got “{len(files)}”."})
        for number, (path, _size) in enumerate(files):
            if kind == "model" and not MODEL_FILE_PATTERN.fullmatch(path):
                message = f"“{shorten(path)}” is not a model file. Send safetensors, JSON and tokenizer files."
                problems.append({"field": f"files.{number}.path", "message": message})
            elif kind == "prompts" and (
                not _FILE_NAME_PATTERN.fullmatch(path) or not path.lower().endswith(PROMPT_FILE_SUFFIXES)
            ):
                message = f"“{shorten(path)}” is not a supported prompt file. It must end in {SUFFIX_HELP}."
                problems.append({"field": f"files.{number}.path", "message": message})
        if kind == "model" and "config.json" not in {path for path, _ in files}:
            problems.append({"field": "files", "message": "must include config.json."})
        if len({path for path, _ in files}) != len(files):
            problems.append({"field": "files", "message": "contain the same name twice."})
        total = sum(size for _, size in files)
        if total > self._max_bytes:
            problems.append(
                {
                    "field": "files",
                    "message": f"are too large: {total / 1e9:.2f} GB, the limit is {self._max_bytes / 1e9:.2f} GB.",
                }
            )
        if problems:
            raise invalid_from_entries(problems)

    def _begin(self, upload_id: str, kind: Kind, name: str, files: Sequence[tuple[str, int]]) -> dict[str, Any]:
        self._delete_stale_uploads()
        folder = self._folder / upload_id
        (self._folder / f"{upload_id}.done").unlink(missing_ok=True)  # what was sent before may be gone since
        if not folder.is_dir():
            target = self._destination(kind, name, files)
            if target.exists():
                raise Conflict(
                    f"“{target.name}” already exists.",
                    code="exists",
                    next_step="Choose another name or delete the old one.",
                )
            total = sum(size for _, size in files)
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
            if total + DISK_RESERVE_BYTES > free:
                raise Conflict(
                    f"“{name}” has {total / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free on the disk.",
                    code="disk_full", next_step="Free up disk space, or start the studio with another --save-dir.",
                )  # fmt: skip
            draft_folder = self._folder / f".{upload_id}"
            shutil.rmtree(draft_folder, ignore_errors=True)
            draft_folder.mkdir()
            manifest = {"kind": kind, "name": name, "files": [{"path": path, "bytes": size} for path, size in files]}
            (draft_folder / "upload.json").write_text(json.dumps(manifest))
            draft_folder.rename(folder)
        return self._finish_if_complete(upload_id)

    def _append(self, upload_id: str, number: int, offset: int, chunk: bytes) -> dict[str, Any]:
        state = self._state(upload_id)
        if state["state"] == "done":
            return state
        if not 0 <= number < len(state["files"]):
            raise NotFound(f"The upload has no file {number}.", next_step="Its files are counted from 0.")
        file = state["files"][number]
        if offset != file["received"]:
            raise Conflict(
                f"{file['received']} bytes of “{file['path']}” are here, and this piece begins at {offset}.",
                code="wrong_offset", next_step="Continue from what has been received.", details={"upload": state},
            )  # fmt: skip
        if offset + len(chunk) > file["bytes"]:
            raise Invalid(
                f"offset: “{file['path']}” has {file['bytes']} bytes, but this piece ends at {offset + len(chunk)}.",
                field="offset", next_step="Start the upload again. The file may have changed.",
            )  # fmt: skip
        with (self._upload_folder(upload_id) / str(number)).open("ab") as out:
            out.write(chunk)
        return self._finish_if_complete(upload_id)

    def _finish_if_complete(self, upload_id: str) -> dict[str, Any]:
        """Move a whole upload to where it belongs. Its state then says so, for the last time."""
        state = self._state(upload_id)
        if any(file["received"] < file["bytes"] for file in state["files"]):
            return state
        folder = self._upload_folder(upload_id)
        target = self._destination(
            state["kind"], state["name"], [(file["path"], file["bytes"]) for file in state["files"]]
        )
        if target.exists():
            raise Conflict(
                f"“{target.name}” already exists. It was added during the upload.",
                code="exists",
                next_step="Delete the old one or choose another name, then upload again.",
            )
        complete_folder = folder / "whole"
        complete_folder.mkdir(exist_ok=True)
        for number, file in enumerate(state["files"]):
            part = folder / str(number)
            if part.is_file() or file["bytes"] == 0:  # else a crash came after it had been moved
                part.touch()
                part.rename(complete_folder / file["path"])
        target.parent.mkdir(parents=True, exist_ok=True)
        (complete_folder if state["kind"] == "model" else complete_folder / state["files"][0]["path"]).rename(target)
        done = state | {"state": "done", "result": target.name}
        (self._folder / f"{upload_id}.done").write_text(json.dumps(done))
        shutil.rmtree(folder, ignore_errors=True)
        return done

    def _state(self, upload_id: str) -> dict[str, Any]:
        finished = self._folder / f"{upload_id}.done"
        if (
            _UPLOAD_ID_PATTERN.fullmatch(upload_id) and finished.is_file()
        ):  # an answer that was lost on its way is given again
            done: dict[str, Any] = json.loads(finished.read_text())
            return done
        folder = self._upload_folder(upload_id)
        manifest: dict[str, Any] = json.loads((folder / "upload.json").read_text())
        for number, file in enumerate(manifest["files"]):
            part, moved = folder / str(number), folder / "whole" / file["path"]
            received_file = part if part.is_file() else moved
            file["received"] = received_file.stat().st_size if received_file.is_file() else 0
        return {"id": upload_id, "state": "open", "piece": CHUNK_BYTES, **manifest}

    def _upload_folder(self, upload_id: str) -> Path:
        folder = self._folder / upload_id
        if not _UPLOAD_ID_PATTERN.fullmatch(upload_id) or not (folder / "upload.json").is_file():
            raise NotFound(f"There is no unfinished upload “{shorten(upload_id)}”.", next_step="Start it again.")
        return folder

    def _destination(self, kind: Kind, name: str, files: Sequence[tuple[str, int]]) -> Path:
        return self._prompts_folder / files[0][0] if kind == "prompts" else self._models_folder / name

    def _delete_stale_uploads(self) -> None:
        """Return uploads without a new chunk for a week."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                with suppress(FileNotFoundError):  # another upload ends meanwhile, and its files move away
                    parts = [path, *path.iterdir()] if path.is_dir() else [path]
                    if time.time() - max(part.stat().st_mtime for part in parts) < STALE_SECONDS:
                        continue
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)
