"""Datasets of prompts: the demo's, a file's, or one of the Hugging Face Hub.

When a session first needs them, prompts are copied into an immutable folder named by what they were made from. So the
order that a seed gives never changes, and a prompt is found by its number at once.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import shutil
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

from ...blobs import Blobs
from ...demo.text.prompts import load_prompts
from ...errors import Invalid, shorten
from ...messages import Progress, derived_seed, recipe_id
from ...options import Dataset
from ...workers.reader import Reader
from .shuffling import shuffled_index

COMPRESSION_SUFFIXES = ("", ".gz", ".zst", ".bz2", ".xz")
TABLE_SUFFIXES = (
    *(f"{kind}{ending}" for kind in (".jsonl", ".ndjson", ".json", ".csv", ".tsv") for ending in COMPRESSION_SUFFIXES),
    ".parquet",
)
"""Extensions of files with rows of columns."""
PROMPT_FILE_SUFFIXES = (
    *TABLE_SUFFIXES,
    *(f"{kind}{ending}" for kind in (".txt", ".text") for ending in COMPRESSION_SUFFIXES),
)
"""Extensions of prompt files."""
SUFFIX_HELP = ".jsonl, .ndjson, .json, .csv, .tsv, .txt (also compressed: .gz, .zst, .bz2, .xz) or .parquet"
READER_VERSION = 2
"""The version of the way files are read: prompts prepared by an older one are prepared again."""
MAX_LISTED_FILES = 500
"""The most files that are listed."""


class PromptSequence(Protocol):
    """Prompts by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> str: ...


class PreparedPrompts:
    """Prepared prompts: lines of JSON with their offsets, read on demand."""

    def __init__(self, folder: Path) -> None:
        self.notes = _read_notes(folder)
        offsets = (folder / "offsets.u64").read_bytes()
        if not offsets or len(offsets) % 8:
            raise ValueError("the offsets are damaged")
        self._offsets = memoryview(offsets).cast("Q")
        with (folder / "prompts.jsonl").open("rb") as stream:
            self._lines = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int, /) -> str:
        start = self._offsets[number]
        end = self._offsets[number + 1] if number + 1 < len(self._offsets) else len(self._lines)
        text: str = json.loads(self._lines[start:end])
        return text


class Prompts:
    """The prompts of a dataset, in the order that a seed gives."""

    def __init__(self, texts: PromptSequence, dataset: Dataset, seed: int, notes: Sequence[str] = ()) -> None:
        self._texts = texts
        self.notes = list(notes)
        """Sentences about rows that were left out."""
        self._dataset = dataset
        self._seed = seed

    @property
    def total(self) -> int:
        return len(self._texts)

    def at(self, position: int) -> str:
        """Return the prompt at a position. After the last one a new round begins, shuffled anew."""
        round_number, index = divmod(position, self.total)
        if self._dataset.shuffle:
            index = shuffled_index(index, self.total, derived_seed("prompts", self._seed, round_number))
        return self._texts[index]


class Datasets:
    """Finds, previews and prepares datasets. `roots` are the folders that may be read."""

    def __init__(self, reader: Reader, roots: Sequence[Path], prepared: Blobs) -> None:
        self._reader = reader
        self._roots = roots
        self._prepared = prepared
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def folder(self) -> Path:
        """The folder in which people put prompt and preference files."""
        return self._roots[0]

    async def list_files(self) -> list[dict[str, Any]]:
        """Return all prompt files, and folders with some, as {name, bytes}."""
        return await asyncio.to_thread(self._list_files)

    def find_file(self, name: str, field: str) -> Path:
        """Return the path of a listed file. Raise Invalid."""
        for root in self._roots:
            if path := resolve_inside(root, name):
                return path
        listed = ", ".join(entry["name"] for entry in self._list_files()[:20])
        raise Invalid(
            f"{field}: there is no file “{shorten(name)}”. "
            + (f"There are: {shorten(listed, 400)}." if listed else "The prompts folder is empty."),
            field=field, next_step=f"Choose one of these, upload one, or copy one into {self.folder}.",
        )  # fmt: skip

    async def preview(self, dataset: Dataset, count: int = 3) -> dict[str, Any]:
        """Return the first prompts, their column, and the other columns, splits and subsets. Raise Invalid."""
        if dataset.source == "demo":
            prompts = load_prompts("steer")
            return {
                "samples": prompts[:count], "column": "prompt", "columns": ["prompt"], "split": "steer",
                "splits": ["steer"], "subset": "", "subsets": [], "total": len(prompts), "exact": True,
                "rows": len(prompts), "skipped": 0, "left_out": [], "notes": [],
            }  # fmt: skip
        return await self._reader.preview(dataset, await asyncio.to_thread(self._dataset_path, dataset), count)

    async def prepare(self, dataset: Dataset, on_progress: Callable[[Progress], None]) -> str:
        """Prepare a dataset. Return the id to open it by; empty for the demo's."""
        if dataset.source == "demo":
            return ""
        path = await asyncio.to_thread(self._dataset_path, dataset)
        prepared_id = recipe_id(
            "d",
            [
                READER_VERSION,
                dataset.model_dump(mode="json", exclude={"shuffle"}),
                await asyncio.to_thread(_fingerprint, path),
            ],
        )
        async with self._locks.setdefault(prepared_id, asyncio.Lock()):
            if prepared_id not in self._prepared:
                await self._write_prepared(prepared_id, dataset, path, on_progress)
        return prepared_id

    async def open(self, prepared: str, dataset: Dataset, seed: int) -> Prompts:
        """Open prepared prompts. Raise OSError when they are gone or damaged."""
        if not prepared:
            return Prompts(load_prompts("steer"), dataset, seed)
        texts = await asyncio.to_thread(self._open_prepared, prepared)
        return Prompts(texts, dataset, seed, texts.notes)

    @asynccontextmanager
    async def rows(self, path: Path, max_rows: int) -> AsyncGenerator[Path, None]:
        """Yield a temporary file with the rows of a file of any format, as JSON lines `[place, row]`. Raise Invalid
        for an unreadable file, or more than `max_rows` rows."""
        await asyncio.to_thread(self._prepared.remove_leftovers)
        folder = await asyncio.to_thread(self._prepared.temporary_folder)
        try:
            await self._reader.rows(path, folder, max_rows)
            yield folder / "rows.jsonl"
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))

    async def discard(self, prepared: str) -> None:
        await asyncio.to_thread(self._prepared.discard, prepared)

    async def _write_prepared(
        self, prepared_id: str, dataset: Dataset, path: Path | None, on_progress: Callable[[Progress], None]
    ) -> None:
        def on_rows_read(data: dict[str, Any]) -> None:
            message = f"Reading prompts: {data['rows']:,} so far"
            on_progress(
                Progress(
                    stage="reading", fraction=data["fraction"], message=message, bytes=data["bytes"] or None,
                    total_bytes=data["total_bytes"],
                )
            )  # fmt: skip

        on_progress(Progress(stage="reading", fraction=0.0, message="Reading prompts"))
        writing = self._prepared.writing(prepared_id)
        folder = await asyncio.to_thread(writing.__enter__)
        try:
            await self._reader.prepare(dataset, path, folder, on_rows_read)
        except BaseException as error:
            await asyncio.shield(asyncio.to_thread(writing.__exit__, type(error), error, error.__traceback__))
            raise
        await asyncio.to_thread(writing.__exit__, None, None, None)

    def _open_prepared(self, prepared: str) -> PreparedPrompts:
        return PreparedPrompts(self._prepared.path(prepared))

    def _dataset_path(self, dataset: Dataset) -> Path | None:
        """Return the path that a dataset names, within the roots; None for one on the hub. Raise Invalid."""
        if dataset.source == "hub":
            if not _is_repository_name(dataset.id):
                raise Invalid(
                    f"config.dataset.id: “{shorten(dataset.id)}” is not the name of a Hugging Face dataset.",
                    field="config.dataset.id", next_step="Use a name such as “org/name”.",
                )  # fmt: skip
            return None
        return self.find_file(dataset.id, "config.dataset.id")

    def _list_files(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for root in self._roots:
            if not root.is_dir():
                continue
            for file in sorted(root.rglob("*")):
                name = file.relative_to(root)
                if len(found) >= MAX_LISTED_FILES:
                    break
                if (
                    name.name.lower().endswith(PROMPT_FILE_SUFFIXES)
                    and resolve_inside(root, str(name))
                    and file.is_file()
                ):
                    found.setdefault(str(name), {"name": str(name), "bytes": file.stat().st_size})
                    if len(name.parts) > 1:
                        folder = found.setdefault(name.parts[0], {"name": name.parts[0], "bytes": 0})
                        folder["bytes"] += file.stat().st_size
        return list(found.values())


def _read_notes(folder: Path) -> list[str]:
    """Return the notes of prepared prompts; older folders have only a count."""
    try:
        manifest = json.loads((folder / "about.json").read_bytes())
    except (OSError, ValueError):
        return []
    if "notes" in manifest:
        return [str(note) for note in manifest["notes"]]
    skipped = int(manifest.get("skipped", 0))
    rows = f"{skipped} rows were" if skipped > 1 else "1 row was"
    return [f"{rows} left out, which had no text that can be a prompt."] if skipped else []


def resolve_inside(root: Path, name: str) -> Path | None:
    """Resolve a name inside a folder; None where it does not exist or leads out, by symlinks too."""
    if not name or "\x00" in name or len(name) > 400:
        return None
    try:
        name.encode()
        path = (root / name).resolve()
        if path.is_relative_to(root.resolve()) and path != root.resolve() and path.exists():
            return path
    except (OSError, ValueError, RuntimeError):
        return None
    return None


def _is_repository_name(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in parts)


def _fingerprint(path: Path | None) -> list[Any]:
    """Return what changes with a file: names, sizes and modification times."""
    if path is None:
        return []
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[str(file), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files if file.is_file()]
