"""What models there are: the demo, folders that were put or uploaded here, and repositories fetched from the hub.

It reads headers and configurations, never weights, and does not know engines.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import Conflict, NotFound, shorten
from ..memory import Shape, shape_of
from ..model_files import Problem
from ..model_problems import problem_of
from ..params import Precision
from ..tensors import UNREADABLE, shapes_in

DEMO = "demo"
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
HEADER_LIMIT = 16 * 1024 * 1024
"""Bytes of a header that is read to list a model; the largest known ones have a tenth of it."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class ModelEntry:
    """A model that can be loaded. Bytes are of its files, zero while they are not here.

    `path` is its folder; for one on the hub (`repository`) the folder that downloads are kept in.
    """

    id: str
    source: str
    path: Path
    repository: str = ""
    bytes: int = 0
    shape: Shape = field(default_factory=Shape)
    architecture: str = "unknown"

    @property
    def parameters(self) -> int:
        return self.shape.parameters


class Catalog:
    """`folders` hold a folder for each model; `hub` is where downloads are kept."""

    def __init__(self, folders: Sequence[Path], hub: Path) -> None:
        self._folders = folders
        self._hub = hub

    async def find(self, model_id: str, field: str | None = None) -> ModelEntry:
        """Raises NotFound, which lists what there is."""
        return await asyncio.to_thread(self._find, model_id, field)

    async def all(self) -> list[ModelEntry]:
        return await asyncio.to_thread(lambda: [_read_entry(*found) for found in self._known()])

    async def names(self) -> list[str]:
        """The ids of all models that are here; no file of theirs is read."""
        return await asyncio.to_thread(lambda: [found[0] for found in self._known()])

    async def delete(self, model_id: str) -> None:
        """Remove the files of a model that was put here or fetched. Raises NotFound, or Conflict for the demo."""
        entry = await self.find(model_id)
        if entry.source == "shipped":
            raise Conflict(
                "The demo model belongs to the studio.", code="shipped", next_step="Other models can be deleted."
            )
        if entry.repository and entry.bytes == 0:
            raise NotFound(f"No files of “{shorten(model_id)}” are here.", next_step="There is nothing to delete.")
        await asyncio.to_thread(self._remove, entry)

    async def delete_partial(self, model_id: str) -> None:
        """Remove what a download that was never finished has left; a model that is whole stays."""
        with suppress(NotFound):  # a folder that was taken away has left nothing
            entry = await self.find(model_id)
            if entry.repository and entry.bytes == 0:
                await asyncio.to_thread(self._remove, entry)

    def fetched(self, repository: str, revision: str) -> Path | None:
        """The folder of what was fetched of a repository last, at a revision where one is named."""
        found: list[tuple[float, Path]] = []
        for file in (self._hub / "complete").glob(f"{repository.replace('/', '--')}@*.json"):
            with suppress(*UNREADABLE):
                about = json.loads(file.read_text())
                if about["repository"] == repository and (revision or "main") in (about["revision"], about["commit"]):
                    found.append((file.stat().st_mtime, Path(about["folder"])))
        return max(found)[1] if found else None

    async def problem(
        self, entry: ModelEntry, revision: str = "", precision: Precision = "auto", remote_code: bool = False
    ) -> Problem | None:
        """What keeps a model from being loaded, as far as the files that are here say; None for one that is not."""

        def look() -> Problem | None:
            folder = self.fetched(entry.repository, revision) if entry.repository else entry.path
            return problem_of(folder, precision, remote_code) if folder else None

        return await asyncio.to_thread(look)

    def _find(self, model_id: str, field: str | None) -> ModelEntry:
        known = {found[0]: found for found in self._known()}
        if model_id in known:
            return _read_entry(*known[model_id])
        if _REPOSITORY.fullmatch(model_id) and ".." not in model_id and "--" not in model_id:
            return ModelEntry(model_id, "hub", self._hub, repository=model_id)
        raise NotFound(
            f"There is no model “{shorten(model_id)}”. Known: {shorten(', '.join(known), 400)}.",
            code="model_not_found",
            field=field,
            next_step=f"Choose one of these, name one on the hub such as “org/name”, or put a model's folder into "
            f"{self._folders[0]}.",
        )

    def _known(self) -> Iterator[tuple[str, str, Path, Path]]:
        """(id, source, folder to look into, folder to load from). An id is never a path."""
        demo = Path(str(importlib.resources.files("trellis.demo"))) / "model"
        yield DEMO, "shipped", demo, demo
        seen = {DEMO}
        for place in self._folders:
            with suppress(OSError):
                for folder in sorted(place.iterdir()):
                    named = FOLDER_NAME.fullmatch(folder.name) and folder.name not in seen
                    if named and (folder / "config.json").is_file():
                        seen.add(folder.name)
                        yield folder.name, "folder", folder, folder
        fetched: dict[str, Path] = {}
        with suppress(OSError):
            for file in sorted((self._hub / "complete").glob("*.json"), key=lambda file: file.stat().st_mtime):
                with suppress(*UNREADABLE):
                    about = json.loads(file.read_text())
                    if _REPOSITORY.fullmatch(about["repository"]) and Path(about["folder"]).is_dir():
                        fetched[about["repository"]] = Path(about["folder"])
        for repository in sorted(fetched):
            yield repository, "hub", fetched[repository], self._hub

    def _remove(self, entry: ModelEntry) -> None:
        if entry.repository:
            name = entry.repository.replace("/", "--")
            for file in (self._hub / "complete").glob(f"{name}@*.json"):
                file.unlink()
            shutil.rmtree(self._hub / name, ignore_errors=True)
            return
        aside = entry.path.with_name(f".deleted-{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):  # deleted twice at once is deleted
            entry.path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _read_entry(name: str, source: str, look: Path, load: Path) -> ModelEntry:
    """What a folder says of itself. One that cannot be read is listed all the same; loading it says what is wrong."""
    files: list[Path] = []
    marks = []
    with suppress(OSError):  # a folder that is being deleted has no files
        files = sorted(look.glob("*.safetensors"))
    for file in (look / "config.json", *files):
        with suppress(OSError):
            stat = file.stat()
            marks.append((str(file), stat.st_size, stat.st_mtime_ns))
    size = sum(mark[1] for mark in marks if mark[0].endswith(".safetensors"))
    architecture, shape = _look_at(look, tuple(marks))
    return ModelEntry(name, source, load, name if source == "hub" else "", size, shape, architecture)


@lru_cache(maxsize=256)
def _look_at(folder: Path, marks: tuple[tuple[str, int, int], ...]) -> tuple[str, Shape]:
    """Architecture and shape from the headers of files, read once for each change of them."""
    architecture, shape = "unreadable", Shape()
    config: dict[str, Any] = {}
    with suppress(*UNREADABLE):
        config = json.loads((folder / "config.json").read_text())
        architecture = str((config.get("architectures") or [config.get("model_type", "unknown")])[0])[:100]
    with suppress(*UNREADABLE, OverflowError):
        tensors: dict[str, list[int]] = {}
        for name, _, _ in marks:
            if name.endswith(".safetensors"):
                tensors |= shapes_in(Path(name), HEADER_LIMIT)
        shape = shape_of(config, tensors)
        if shape.parameters > 10**15:  # no model is that large
            shape = Shape()
    return architecture, shape
