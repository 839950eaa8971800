"""The available models: the demo, folders, and downloads from the Hugging Face Hub.

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

from ...errors import Conflict, LoadFailed, NotFound, shorten
from ...memory_estimates import ModelShape, model_shape
from ...model_checks import first_problem, problem_from_file_names
from ...model_files import CONFIG_LIMIT, Problem, read_json
from ...options import Precision
from ...safetensors_files import READ_ERRORS, read_shapes

DEMO = "demo"
FOLDER_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_HEADER_BYTES = 16 * 1024 * 1024
"""The largest header that is read for the list; the largest known ones have a tenth of it."""
LISTED_NAME_PATTERN = re.compile(r"(?!\.)[^\x00-\x1f\x7f/\\\ud800-\udfff]{1,200}")
"""Names of folders that are listed: any valid text. Uploads use FOLDER_NAME_PATTERN."""
UNREADABLE_CONFIG = "unreadable"
"""The architecture shown for an unreadable configuration."""
RESERVED_PREFIXES = ("session:", "remote:")
"""Prefixes that name other chat targets."""
_REPOSITORY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class ModelEntry:
    """A model that can be loaded. `bytes` is the size of its files, 0 while they are not here.

    `path` is its folder; for a model on the hub (`repository`) the folder of all downloads.
    """

    id: str
    source: str
    path: Path
    repository: str = ""
    bytes: int = 0
    shape: ModelShape = field(default_factory=ModelShape)
    architecture: str = "unknown"
    problem: LoadFailed | None = None
    """Why it cannot be loaded, as far as names of files show."""

    @property
    def parameters(self) -> int:
        return self.shape.parameters


class Catalog:
    """Lists, finds and deletes models. `folders` hold a folder for each model."""

    def __init__(self, folders: Sequence[Path], downloads_folder: Path) -> None:
        self._folders = folders
        self._downloads_folder = downloads_folder

    async def find(self, model_id: str, field: str | None = None) -> ModelEntry:
        """Return a model. Raise NotFound, which lists what there is."""
        return await asyncio.to_thread(self._find, model_id, field)

    async def list_models(self) -> list[ModelEntry]:
        return await asyncio.to_thread(lambda: [_read_entry(*found) for found in self._iter_models()])

    async def list_names(self) -> list[str]:
        """Return the ids of local models that look loadable, without reading any file."""
        return await asyncio.to_thread(
            lambda: [
                name
                for name, source, look, _ in self._iter_models()
                if source != "folder" or not _find_name_problem(look)
            ]
        )

    async def downloaded_revision(self, repository: str) -> str | None:
        """Return the revision that was downloaded: empty for the main branch if it was, else the latest; None where
        nothing was."""
        return await asyncio.to_thread(self._downloaded_revision, repository)

    def _downloaded_revision(self, repository: str) -> str | None:
        revisions: list[tuple[bool, float, str]] = []
        for file in (self._downloads_folder / "complete").glob(f"{repository.replace('/', '--')}@*.json"):
            with suppress(*READ_ERRORS):
                manifest = json.loads(file.read_text())
                if manifest["repository"] == repository and Path(manifest["folder"]).is_dir():
                    revision = str(manifest["revision"])
                    revisions.append((revision == "main", file.stat().st_mtime, revision))
        if not revisions:
            return None
        is_main, _, revision = max(revisions)
        return "" if is_main else revision

    async def delete(self, model_id: str) -> None:
        """Delete the files of a model. Raise NotFound, or Conflict for the demo."""
        entry = await self.find(model_id)
        if entry.source == "shipped":
            raise Conflict("The demo model can't be deleted.", code="shipped", next_step="Delete another model.")
        if entry.repository and entry.bytes == 0:
            raise NotFound(
                f"There are no files of “{shorten(model_id)}” here.", next_step="There is nothing to delete."
            )
        await asyncio.to_thread(self._remove, entry)

    async def delete_partial(self, model_id: str) -> None:
        """Delete a partial download; a complete model stays."""
        with suppress(NotFound):  # the folder is gone already
            entry = await self.find(model_id)
            if entry.repository and entry.bytes == 0:
                await asyncio.to_thread(self._remove, entry)

    def downloaded_folder(self, repository: str, revision: str) -> Path | None:
        """Return the folder of the latest download of a repository, at a revision where one is named."""
        folders: list[tuple[float, Path]] = []
        for file in (self._downloads_folder / "complete").glob(f"{repository.replace('/', '--')}@*.json"):
            with suppress(*READ_ERRORS):
                manifest = json.loads(file.read_text())
                if manifest["repository"] == repository and (revision or "main") in (
                    manifest["revision"],
                    manifest["commit"],
                ):
                    folders.append((file.stat().st_mtime, Path(manifest["folder"])))
        return max(folders)[1] if folders else None

    async def find_problem(
        self, entry: ModelEntry, revision: str = "", precision: Precision = "auto", remote_code: bool = False
    ) -> Problem | None:
        """Return why a model cannot be loaded, as far as its local files show; None for one that is not here."""

        def check_files() -> Problem | None:
            folder = self.downloaded_folder(entry.repository, revision) if entry.repository else entry.path
            return first_problem(folder, precision, remote_code) if folder else None

        return await asyncio.to_thread(check_files)

    def _find(self, model_id: str, field: str | None) -> ModelEntry:
        models = {found[0]: found for found in self._iter_models()}
        if model_id in models:
            return _read_entry(*models[model_id])
        if _REPOSITORY_PATTERN.fullmatch(model_id) and ".." not in model_id and "--" not in model_id:
            return ModelEntry(model_id, "hub", self._downloads_folder, repository=model_id)
        raise NotFound(
            f"There is no model “{shorten(model_id)}”. Known: {shorten(', '.join(models), 400)}.",
            code="model_not_found",
            field=field,
            next_step=f"Choose one of these, enter a Hugging Face model such as “org/name”, or copy a folder into "
            f"{self._folders[0]}.",
        )

    def _iter_models(self) -> Iterator[tuple[str, str, Path, Path]]:
        """Yield (id, source, folder to inspect, folder to load). An id is never a path."""
        demo = Path(str(importlib.resources.files("trellis.demo.text"))) / "model"
        yield DEMO, "shipped", demo, demo
        seen_names = {DEMO}
        for models_folder in self._folders:
            with suppress(OSError):
                for folder in sorted(models_folder.iterdir()):
                    if (
                        LISTED_NAME_PATTERN.fullmatch(folder.name)
                        and folder.name not in seen_names
                        and _looks_like_model(folder)
                    ):
                        seen_names.add(folder.name)
                        yield folder.name, "folder", folder, folder
        downloads: dict[str, Path] = {}
        with suppress(OSError):
            for file in sorted(
                (self._downloads_folder / "complete").glob("*.json"), key=lambda file: file.stat().st_mtime
            ):
                with suppress(*READ_ERRORS):
                    manifest = json.loads(file.read_text())
                    if _REPOSITORY_PATTERN.fullmatch(manifest["repository"]) and Path(manifest["folder"]).is_dir():
                        downloads[manifest["repository"]] = Path(manifest["folder"])
        for repository in sorted(downloads):
            yield repository, "hub", downloads[repository], self._downloads_folder

    def _remove(self, entry: ModelEntry) -> None:
        if entry.repository:
            name = entry.repository.replace("/", "--")
            for file in (self._downloads_folder / "complete").glob(f"{name}@*.json"):
                file.unlink()
            shutil.rmtree(self._downloads_folder / name, ignore_errors=True)
            return
        trash_path = entry.path.with_name(f".deleted-{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):  # another request has deleted it
            entry.path.rename(trash_path)
        if trash_path.is_file():
            trash_path.unlink()
        shutil.rmtree(trash_path, ignore_errors=True)


def _looks_like_model(path: Path) -> bool:
    """Return whether a path looks like a model, by file names."""
    if path.is_file():
        return path.suffix in (".gguf", ".safetensors")
    with suppress(OSError):
        names = {file.name for file in path.iterdir()}
        model_file_names = {"config.json", "adapter_config.json", "params.json", "model_index.json"}
        return bool(names & model_file_names) or any(name.endswith((".safetensors", ".gguf")) for name in names)
    return False


def _find_name_problem(path: Path) -> LoadFailed | None:
    """Return why a model cannot be loaded, as far as file names show."""

    def make_error(message: str, next_step: str) -> LoadFailed:
        return LoadFailed(f"“{shorten(path.name)}” {message}", code="unsupported_format", next_step=next_step)

    if path.name != path.name.strip() or path.name.startswith(RESERVED_PREFIXES):
        return make_error("has an invalid name for a model.", "Rename it, using letters, digits and hyphens.")
    folder_wanted = "Choose a folder with a Hugging Face config.json and safetensors files."
    if path.is_file():
        kind = "a GGUF file" if path.suffix == ".gguf" else "a single file"
        return make_error(f"is {kind}. A model needs a folder with its config and tokenizer.", folder_wanted)
    if (path / "model_index.json").is_file():
        return make_error("is an image diffusion pipeline, not a language model.", folder_wanted)
    problem = problem_from_file_names(path)
    return problem.to_error() if problem else None


def _read_entry(name: str, source: str, inspect_folder: Path, load_folder: Path) -> ModelEntry:
    """Read the entry of a folder. An unreadable model is listed too; loading it tells what is wrong."""
    files: list[Path] = []
    file_stats = []
    with suppress(OSError):  # the folder is being deleted
        files = sorted(inspect_folder.glob("*.safetensors"))
    for file in (inspect_folder / "config.json", *files):
        with suppress(OSError):
            stat = file.stat()
            file_stats.append((str(file), stat.st_size, stat.st_mtime_ns))
    size = sum(mark[1] for mark in file_stats if mark[0].endswith(".safetensors"))
    architecture, shape = _read_headers(inspect_folder, tuple(file_stats))
    problem = _find_name_problem(inspect_folder) if source == "folder" else None
    return ModelEntry(name, source, load_folder, name if source == "hub" else "", size, shape, architecture, problem)


@lru_cache(maxsize=256)
def _read_headers(folder: Path, file_stats: tuple[tuple[str, int, int], ...]) -> tuple[str, ModelShape]:
    """Return architecture and shape from headers, cached until a file changes."""
    architecture, shape = UNREADABLE_CONFIG, ModelShape()
    config: dict[str, Any] = {}
    with suppress(*READ_ERRORS):
        config = read_json(folder / "config.json", CONFIG_LIMIT)
        architecture = str((config.get("architectures") or [config.get("model_type", "unknown")])[0])[:100]
    with suppress(*READ_ERRORS):
        tensors: dict[str, list[int]] = {}
        for name, _, _ in file_stats:
            if name.endswith(".safetensors"):
                tensors |= read_shapes(Path(name), MAX_HEADER_BYTES)
        shape = model_shape(config, tensors)
        if shape.parameters > 10**15:  # a forged header: no model is that large
            shape = ModelShape()
    return architecture, shape
