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

from ..errors import Conflict, LoadFailed, NotFound, shorten
from ..memory import Shape, shape_of
from ..model_files import CONFIG_LIMIT, Problem, read_json
from ..model_problems import problem_by_names, problem_of
from ..params import Precision
from ..tensors import UNREADABLE, shapes_in

DEMO = "demo"
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
HEADER_LIMIT = 16 * 1024 * 1024
"""Bytes of a header that is read to list a model; the largest known ones have a tenth of it."""
LISTED_NAME = re.compile(r"(?!\.)[^\x00-\x1f\x7f/\\\ud800-\udfff]{1,200}")
"""What a folder may be called to be listed: text, which bytes that are not UTF-8 are not; only an upload makes one with
a plainer name."""
UNREADABLE_CONFIG = "unreadable"
"""The architecture of a model whose configuration cannot be read."""
RESERVED = ("session:", "remote:")
"""How the names of others begin that can be talked to."""
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
    problem: LoadFailed | None = None
    """Why it cannot be loaded, where that is seen without reading any file."""

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
        """The ids of all models that are here and look as if they could be loaded; no file of theirs is read."""
        return await asyncio.to_thread(
            lambda: [name for name, source, look, _ in self._known() if source != "folder" or not _problem(look)]
        )

    async def revision_here(self, repository: str) -> str | None:
        """The revision that a repository was fetched at: the main branch, as an empty name, where that is among them,
        else the one fetched last; None where nothing of it is here."""
        return await asyncio.to_thread(self._revision_here, repository)

    def _revision_here(self, repository: str) -> str | None:
        found: list[tuple[bool, float, str]] = []
        for file in (self._hub / "complete").glob(f"{repository.replace('/', '--')}@*.json"):
            with suppress(*UNREADABLE):
                about = json.loads(file.read_text())
                if about["repository"] == repository and Path(about["folder"]).is_dir():
                    revision = str(about["revision"])
                    found.append((revision == "main", file.stat().st_mtime, revision))
        if not found:
            return None
        is_main, _, revision = max(found)
        return "" if is_main else revision

    async def delete(self, model_id: str) -> None:
        """Remove the files of a model that was put here or fetched. Raises NotFound, or Conflict for the demo."""
        entry = await self.find(model_id)
        if entry.source == "shipped":
            raise Conflict("The demo model can't be deleted.", code="shipped", next_step="Delete another model.")
        if entry.repository and entry.bytes == 0:
            raise NotFound(
                f"There are no files of “{shorten(model_id)}” here.", next_step="There is nothing to delete."
            )
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
            next_step=f"Choose one of these, enter a Hugging Face model such as “org/name”, or copy a folder into "
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
                    if LISTED_NAME.fullmatch(folder.name) and folder.name not in seen and _is_model(folder):
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
        if aside.is_file():
            aside.unlink()
        shutil.rmtree(aside, ignore_errors=True)


def _is_model(place: Path) -> bool:
    """Whether a folder or a file is meant to be a model, by the names of what it holds."""
    if place.is_file():
        return place.suffix in (".gguf", ".safetensors")
    with suppress(OSError):
        names = {file.name for file in place.iterdir()}
        marks = {"config.json", "adapter_config.json", "params.json", "model_index.json"}
        return bool(names & marks) or any(name.endswith((".safetensors", ".gguf")) for name in names)
    return False


def _problem(place: Path) -> LoadFailed | None:
    """Why a model cannot be loaded, as far as its name and the names of its files say."""

    def why(message: str, next_step: str) -> LoadFailed:
        return LoadFailed(f"“{shorten(place.name)}” {message}", code="unsupported_format", next_step=next_step)

    if place.name != place.name.strip() or place.name.startswith(RESERVED):
        return why("has an invalid name for a model.", "Rename it, using letters, digits and hyphens.")
    folder_wanted = "Choose a folder with a Hugging Face config.json and safetensors files."
    if place.is_file():
        kind = "a GGUF file" if place.suffix == ".gguf" else "a single file"
        return why(f"is {kind}. A model needs a folder with its config and tokenizer.", folder_wanted)
    if (place / "model_index.json").is_file():
        return why("is an image diffusion pipeline, not a language model.", folder_wanted)
    found = problem_by_names(place)
    return found.error() if found else None


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
    problem = _problem(look) if source == "folder" else None
    return ModelEntry(name, source, load, name if source == "hub" else "", size, shape, architecture, problem)


@lru_cache(maxsize=256)
def _look_at(folder: Path, marks: tuple[tuple[str, int, int], ...]) -> tuple[str, Shape]:
    """Architecture and shape from the headers of files, read once for each change of them."""
    architecture, shape = UNREADABLE_CONFIG, Shape()
    config: dict[str, Any] = {}
    with suppress(*UNREADABLE):
        config = read_json(folder / "config.json", CONFIG_LIMIT)
        architecture = str((config.get("architectures") or [config.get("model_type", "unknown")])[0])[:100]
    with suppress(*UNREADABLE):
        tensors: dict[str, list[int]] = {}
        for name, _, _ in marks:
            if name.endswith(".safetensors"):
                tensors |= shapes_in(Path(name), HEADER_LIMIT)
        shape = shape_of(config, tensors)
        if shape.parameters > 10**15:  # no model is that large
            shape = Shape()
    return architecture, shape
