"""Files of prompts as rows, streamed: JSON lines, JSON, CSV, TSV, Parquet and plain text, compressed or not, alone or
in a folder.

It does not know which column is wanted, or what a dataset on the hub is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Invalid, shorten
from .columns import USUAL
from .csv_files import read_csv
from .decoding import COMPRESSIONS, DataFile, LocalFile, Opened, broken, lines_of, reading
from .json_files import Record, read_json
from .skipped import Reason

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
         ".txt": "text", ".text": "text"}  # fmt: skip
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation", "eval": "validation", "test": "test"}  # fmt: skip
DOCUMENTS = re.compile(
    r"readme|license|licence|notice|changelog|(dataset_infos?|dataset_dict|state|config)\.json", re.IGNORECASE
)
"""Files in a folder that tell of the data and hold none, by how their names begin."""
HEADING = Reason("is a heading", "are headings")
HEADINGS = {*USUAL, *(f"{name}s" for name in USUAL)}


@dataclass
class Source:
    """The files of one split, in order, the splits that there are, and files in the folder that are not read."""

    files: Sequence[DataFile]
    split: str
    splits: list[str]
    unread: list[str] = field(default_factory=list)
    subset: str = ""
    subsets: list[str] = field(default_factory=list)
    before: int = 0
    """Bytes of the files that have been read to their ends."""

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def parts(self) -> Iterator[tuple[str, Iterator[Record]]]:
        """The rows of each file, with its name where there are several."""
        for file in self.files:
            yield file.name if len(self.files) > 1 else "", records(file)
            self.before += file.size

    def count(self) -> tuple[int | None, bool]:
        """How many rows there are, and whether that is exact or counted by line ends. None where nobody can say without
        reading all."""
        total, exact = 0, True
        for file in self.files:
            kind = kind_of(file.name)
            if kind == "parquet":
                with _parquet(file) as table:
                    total += table.metadata.num_rows
                continue
            with Opened(file) as opened:
                if opened.compressed:
                    return None, False
                total += max(0, _line_ends(opened) - (kind in ("csv", "tsv")))
                exact = exact and kind == "text"
        return total, exact


def kind_of(name: str) -> str | None:
    """The format of a file by its name, whatever it is compressed with; None for one that is not read."""
    name = name.lower()
    ending = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    kind = KINDS.get(Path(name.removesuffix(ending)).suffix)
    return None if ending and kind == "parquet" else kind  # Parquet is compressed inside


def source_of(path: Path, split: str) -> Source:
    """The files to read. Raises Invalid for what is not there or has no format that is known."""
    known = f"{', '.join(sorted(KINDS))}, or in one of these and {', '.join(COMPRESSIONS)}"
    unread: list[str] = []
    if path.is_dir():
        found, unread = _in_folder(path)
        if not found:
            raise Invalid(
                f"The folder “{path.name}” holds no files of prompts.",
                field="dataset.id", next_step=f"Put files into it that end in {known}.",
            )  # fmt: skip
    elif not path.is_file():
        raise Invalid(
            f"There is no file “{path.name}”.", field="dataset.id", next_step="Choose one of the files that are listed."
        )
    elif not kind_of(path.name):
        raise Invalid(
            f"“{path.name}” has no format that is known.",
            field="dataset.id", next_step=f"Use a file that ends in {known}.",
        )  # fmt: skip
    else:
        found = [LocalFile(path, path.name)]
    by_split: dict[str, list[LocalFile]] = {}
    for file in found:
        by_split.setdefault("all" if file.path == path else _split_of(file.name), []).append(file)
    return Source(*_choose(by_split, split), list(by_split), unread)


def _in_folder(folder: Path) -> tuple[list[LocalFile], list[str]]:
    """The files of prompts in a folder, and the names of the others. Links that lead out of it are none of them."""
    found: list[LocalFile] = []
    unread: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            continue
        shown = name.as_posix().encode("utf-8", "replace").decode()
        if kind_of(path.name) and not DOCUMENTS.match(path.name):
            found.append(LocalFile(path, shown))
        else:
            unread.append(shown)
    return found, unread


def _split_of(name: str) -> str:
    """The split that the name of a file or of its folders tells of; “all” where none does."""
    *folders, file = name.split("/")
    for part in [*folders, file.split(".")[0]]:
        word = re.split(r"[-_.]", part.lower())[0]
        if word in SPLITS:
            return SPLITS[word]
    return "all"


def _choose(by_split: dict[str, list[LocalFile]], wanted: str) -> tuple[list[LocalFile], str]:
    splits = list(by_split)
    chosen = wanted or ("train" if "train" in by_split else splits[0] if len(splits) == 1 else "")
    if chosen not in by_split:
        listed = ", ".join(f"“{split}”" for split in splits)
        what = f"There is no split “{shorten(wanted)}”" if wanted else "There are several splits"
        raise Invalid(f"{what}. The splits are {listed}.", field="dataset.split", next_step="Name one of them.")
    return by_split[chosen], chosen


def records(file: DataFile) -> Iterator[Record]:
    """All rows of a file, streamed. Raises Invalid for a broken one."""
    with reading(file):
        yield from READERS[kind_of(file.name) or "text"](file)


def _line_ends(opened: Opened) -> int:
    total, last = 0, b"\n"
    while chunk := opened.bytes.read(1 << 20):
        total += chunk.count(b"\n")
        last = chunk[-1:]
    return total + (last != b"\n")


def _read_text(file: DataFile) -> Iterator[Record]:
    with Opened(file) as opened:
        begun = False
        for number, line in lines_of(file, opened):
            if text := line.strip():
                heading = not begun and text.lower().rstrip(":") in HEADINGS
                begun = True
                yield Record({"text": text}, f"line {number}", opened.done, HEADING if heading else None)


def _read_parquet(file: DataFile) -> Iterator[Record]:
    size, read = file.size, 0
    with _parquet(file) as table:
        names = table.schema_arrow.names
        if twice := next((name for name, count in Counter(names).items() if count > 1), None):
            raise broken(file, f"two columns are named “{shorten(twice)}”", "Give each column a name of its own.")
        total = max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=256):
            try:
                found = batch.to_pylist()
            except UnicodeDecodeError:
                raise broken(file, f"a text in the rows {read + 1} to {read + len(batch)} is not UTF-8") from None
            for row in found:
                read += 1
                yield Record(row, f"row {read}", size * read // total)


@contextmanager
def _parquet(file: DataFile) -> Iterator[Any]:
    """An open Parquet file, of which only the end has been read. Raises Invalid, also while it is read."""
    import pyarrow
    import pyarrow.parquet as parquet

    with file.open() as stored:
        try:
            yield parquet.ParquetFile(stored)
        except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:
            if isinstance(error, PermissionError):
                raise
            raise broken(file, f"it is not a whole Parquet file ({shorten(error, 100)})") from None


READERS: dict[str, Callable[[DataFile], Iterator[Record]]] = {
    "json": read_json, "csv": read_csv, "tsv": lambda file: read_csv(file, tabs=True), "text": _read_text,
    "parquet": _read_parquet,
}  # fmt: skip

__all__ = ["Record", "Source", "kind_of", "records", "source_of"]
