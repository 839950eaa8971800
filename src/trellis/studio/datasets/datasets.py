"""Where prompts come from: the demo's, a file's, or a dataset's on the hub, each made ready once.

Prompts are copied, when a session first needs them, into a folder that is named by what they were made from and
never changes. So the order that a seed gives survives everything, and a prompt is found by its number at once.
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
from ...params import Dataset
from ...workers.reader import Reader
from .shuffling import shuffled

COMPRESSED = ("", ".gz", ".zst", ".bz2", ".xz")
TABLES = (
    *(f"{kind}{ending}" for kind in (".jsonl", ".ndjson", ".json", ".csv", ".tsv") for ending in COMPRESSED),
    ".parquet",
)
"""How names of files end that have rows of columns."""
SUFFIXES = (*TABLES, *(f"{kind}{ending}" for kind in (".txt", ".text") for ending in COMPRESSED))
"""How names of files of prompts end."""
ENDINGS = ".jsonl, .ndjson, .json, .csv, .tsv, .txt (also compressed: .gz, .zst, .bz2, .xz) or .parquet"
READING = 2
"""Counts the ways in which files were read: prompts that were made ready in another way are not taken for these."""
LISTED = 500
"""Files that are listed at most."""


class Texts(Protocol):
    """Prompts by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> str: ...


class Prepared:
    """Prompts in a folder: lines of JSON and where each begins. Nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.notes = _notes(folder)
        offsets = (folder / "offsets.u64").read_bytes()
        if not offsets or len(offsets) % 8:
            raise ValueError("the offsets are damaged")
        self._starts = memoryview(offsets).cast("Q")
        with (folder / "prompts.jsonl").open("rb") as stream:
            self._lines = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int, /) -> str:
        start = self._starts[number]
        end = self._starts[number + 1] if number + 1 < len(self._starts) else len(self._lines)
        text: str = json.loads(self._lines[start:end])
        return text


class Prompts:
    """The prompts of one dataset in the order that a seed gives them."""

    def __init__(self, texts: Texts, dataset: Dataset, seed: int, notes: Sequence[str] = ()) -> None:
        self._texts = texts
        self.notes = list(notes)
        """What was left out of the dataset, in sentences."""
        self._dataset = dataset
        self._seed = seed

    @property
    def total(self) -> int:
        return len(self._texts)

    def at(self, position: int) -> str:
        """The prompt at a position; after the last one a new round begins, in another order if it is shuffled."""
        round_number, place = divmod(position, self.total)
        if self._dataset.shuffle:
            place = shuffled(place, self.total, derived_seed("prompts", self._seed, round_number))
        return self._texts[place]


class Datasets:
    """Finds files of prompts, previews them, and makes them ready. `roots` are the folders that may be read."""

    def __init__(self, reader: Reader, roots: Sequence[Path], prepared: Blobs) -> None:
        self._reader = reader
        self._roots = roots
        self._prepared = prepared
        self._at_work: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def folder(self) -> Path:
        """Where a person puts files of prompts and of choices."""
        return self._roots[0]

    async def files(self) -> list[dict[str, Any]]:
        """What can be named as a file: name and bytes, files and folders with files in them."""
        return await asyncio.to_thread(self._files)

    def file(self, name: str, field: str) -> Path:
        """A file that is listed, by its name. Raises Invalid."""
        for root in self._roots:
            if found := inside(root, name):
                return found
        listed = ", ".join(entry["name"] for entry in self._files()[:20])
        raise Invalid(
            f"{field}: there is no file “{shorten(name)}”. "
            + (f"There are: {shorten(listed, 400)}." if listed else "The prompts folder is empty."),
            field=field, next_step=f"Choose one of these, upload one, or copy one into {self.folder}.",
        )  # fmt: skip

    async def preview(self, dataset: Dataset, count: int = 3) -> dict[str, Any]:
        """The first prompts, the column they are from, and what else there is to choose. Raises Invalid."""
        if dataset.source == "demo":
            prompts = load_prompts("steer")
            return {
                "samples": prompts[:count], "column": "prompt", "columns": ["prompt"], "split": "steer",
                "splits": ["steer"], "subset": "", "subsets": [], "total": len(prompts), "exact": True,
                "rows": len(prompts), "skipped": 0, "left_out": [], "notes": [],
            }  # fmt: skip
        return await self._reader.preview(dataset, await asyncio.to_thread(self._path, dataset), count)

    async def prepare(self, dataset: Dataset, told: Callable[[Progress], None]) -> str:
        """Make the prompts of a dataset ready. Returns the id under which they are opened; empty for the demo's."""
        if dataset.source == "demo":
            return ""
        path = await asyncio.to_thread(self._path, dataset)
        made = recipe_id(
            "d", [READING, dataset.model_dump(mode="json", exclude={"shuffle"}), await asyncio.to_thread(_mark, path)]
        )
        async with self._at_work.setdefault(made, asyncio.Lock()):
            if made not in self._prepared:
                await self._write(made, dataset, path, told)
        return made

    async def open(self, prepared: str, dataset: Dataset, seed: int) -> Prompts:
        """Raises OSError when what was prepared is gone or damaged."""
        if not prepared:
            return Prompts(load_prompts("steer"), dataset, seed)
        texts = await asyncio.to_thread(self._open, prepared)
        return Prompts(texts, dataset, seed, texts.notes)

    @asynccontextmanager
    async def rows(self, path: Path, most: int) -> AsyncGenerator[Path, None]:
        """Have the rows of a file of any format written as JSON lines, each `[place, row]`, into a file that is there
        until the block ends. Raises Invalid for a file that cannot be read, or has more than `most` rows."""
        await asyncio.to_thread(self._prepared.sweep)
        folder = await asyncio.to_thread(self._prepared.scratch)
        try:
            await self._reader.rows(path, folder, most)
            yield folder / "rows.jsonl"
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))

    async def discard(self, prepared: str) -> None:
        await asyncio.to_thread(self._prepared.discard, prepared)

    async def _write(self, made: str, dataset: Dataset, path: Path | None, told: Callable[[Progress], None]) -> None:
        def moves(data: dict[str, Any]) -> None:
            message = f"Reading prompts: {data['rows']:,} so far"
            told(
                Progress(
                    stage="reading", fraction=data["fraction"], message=message, bytes=data["bytes"] or None,
                    total_bytes=data["total_bytes"],
                )
            )  # fmt: skip

        told(Progress(stage="reading", fraction=0.0, message="Reading prompts"))
        writing = self._prepared.writing(made)
        folder = await asyncio.to_thread(writing.__enter__)
        try:
            await self._reader.prepare(dataset, path, folder, moves)
        except BaseException as error:
            await asyncio.shield(asyncio.to_thread(writing.__exit__, type(error), error, error.__traceback__))
            raise
        await asyncio.to_thread(writing.__exit__, None, None, None)

    def _open(self, prepared: str) -> Prepared:
        return Prepared(self._prepared.path(prepared))

    def _path(self, dataset: Dataset) -> Path | None:
        """The file or folder that a dataset names, inside the folders that may be read. Raises Invalid."""
        if dataset.source == "hub":
            if not _is_repository(dataset.id):
                raise Invalid(
                    f"config.dataset.id: “{shorten(dataset.id)}” is not the name of a Hugging Face dataset.",
                    field="config.dataset.id", next_step="Use a name such as “org/name”.",
                )  # fmt: skip
            return None
        return self.file(dataset.id, "config.dataset.id")

    def _files(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for root in self._roots:
            if not root.is_dir():
                continue
            for file in sorted(root.rglob("*")):
                name = file.relative_to(root)
                if len(found) >= LISTED:
                    break
                if name.name.lower().endswith(SUFFIXES) and inside(root, str(name)) and file.is_file():
                    found.setdefault(str(name), {"name": str(name), "bytes": file.stat().st_size})
                    if len(name.parts) > 1:
                        folder = found.setdefault(name.parts[0], {"name": name.parts[0], "bytes": 0})
                        folder["bytes"] += file.stat().st_size
        return list(found.values())


def _notes(folder: Path) -> list[str]:
    """What was left out when the prompts in a folder were made ready; older folders have no more than a number."""
    try:
        about = json.loads((folder / "about.json").read_bytes())
    except (OSError, ValueError):
        return []
    if "notes" in about:
        return [str(note) for note in about["notes"]]
    skipped = int(about.get("skipped", 0))
    rows = f"{skipped} rows were" if skipped > 1 else "1 row was"
    return [f"{rows} left out, which had no text that can be a prompt."] if skipped else []


def inside(root: Path, name: str) -> Path | None:
    """What a name leads to inside a folder; None for what is not there or leads out of it, links included."""
    if not name or "\x00" in name or len(name) > 400:
        return None
    try:
        name.encode()
        place = (root / name).resolve()
        if place.is_relative_to(root.resolve()) and place != root.resolve() and place.exists():
            return place
    except (OSError, ValueError, RuntimeError):
        return None
    return None


def _is_repository(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in parts)


def _mark(path: Path | None) -> list[Any]:
    """What tells a file from what it was before: names, sizes and times of change."""
    if path is None:
        return []
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[str(file), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files if file.is_file()]
