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
from .columns import USUAL_COLUMNS
from .csv_files import read_csv
from .decoding import (
    COMPRESSIONS,
    DataFile,
    LocalFile,
    OpenedFile,
    corrupt_file_error,
    read_lines,
    translate_read_errors,
)
from .json_files import Record, read_json
from .skipped import Reason

FORMAT_BY_SUFFIX = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet",
         ".txt": "text", ".text": "text"}  # fmt: skip
SPLIT_BY_NAME = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation",
          "dev": "validation", "eval": "validation", "test": "test"}  # fmt: skip
METADATA_FILE = re.compile(
    r"readme|license|licence|notice|changelog|(dataset_infos?|dataset_dict|state|config)\.json", re.IGNORECASE
)
"""Files in a folder that tell of the data and hold none, by how their names begin."""
HEADING = Reason("is a heading", "are headings")
HEADING_WORDS = {*USUAL_COLUMNS, *(f"{name}s" for name in USUAL_COLUMNS)}


@dataclass
class Source:
    """The files of one split, in order, the splits that there are, and files in the folder that are not read."""

    files: Sequence[DataFile]
    split: str
    splits: list[str]
    ignored_files: list[str] = field(default_factory=list)
    subset: str = ""
    subsets: list[str] = field(default_factory=list)
    bytes_finished: int = 0
    """Bytes of the files that have been read to their ends."""

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def read_files(self) -> Iterator[tuple[str, Iterator[Record]]]:
        """The rows of each file, with its name where there are several."""
        for file in self.files:
            yield file.name if len(self.files) > 1 else "", read_records(file)
            self.bytes_finished += file.size

    def count_rows(self) -> tuple[int | None, bool]:
        """How many rows there are, and whether that is exact or counted by line ends. None where nobody can say without
        reading all."""
        total, exact = 0, True
        for file in self.files:
            kind = file_format(file.name)
            if kind == "parquet":
                with _open_parquet(file) as table:
                    total += table.metadata.num_rows
                continue
            with OpenedFile(file) as opened:
                if opened.compressed:
                    return None, False
                total += max(0, _count_lines(opened) - (kind in ("csv", "tsv")))
                exact = exact and kind == "text"
        return total, exact


def file_format(name: str) -> str | None:
    """Return the format of a file by its name, ignoring compression; None if unsupported."""
    name = name.lower()
    ending = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    kind = FORMAT_BY_SUFFIX.get(Path(name.removesuffix(ending)).suffix)
    return None if ending and kind == "parquet" else kind  # Parquet is compressed inside


def open_local_source(path: Path, split: str) -> Source:
    """Return the files to read. Raise Invalid for missing files and unknown formats."""
    known = f"{', '.join(sorted(FORMAT_BY_SUFFIX))}, or in one of these and {', '.join(COMPRESSIONS)}"
    unread: list[str] = []
    if path.is_dir():
        found, unread = _list_folder(path)
        if not found:
            raise Invalid(
                f"The folder “{path.name}” holds no files of prompts.",
                field="dataset.id", next_step=f"Put files into it that end in {known}.",
            )  # fmt: skip
    elif not path.is_file():
        raise Invalid(
            f"There is no file “{path.name}”.", field="dataset.id", next_step="Choose one of the files that are listed."
        )
    elif not file_format(path.name):
        raise Invalid(
            f"“{path.name}” has no format that is known.",
            field="dataset.id", next_step=f"Use a file that ends in {known}.",
        )  # fmt: skip
    else:
        found = [LocalFile(path, path.name)]
    by_split: dict[str, list[LocalFile]] = {}
    for file in found:
        by_split.setdefault("all" if file.path == path else _split_from_name(file.name), []).append(file)
    return Source(*_choose_split(by_split, split), list(by_split), unread)


def _list_folder(folder: Path) -> tuple[list[LocalFile], list[str]]:
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
        if file_format(path.name) and not METADATA_FILE.match(path.name):
            found.append(LocalFile(path, shown))
        else:
            unread.append(shown)
    return found, unread


def _split_from_name(name: str) -> str:
    """Return the split in the name of a file or its folders; “all” if there is none."""
    *folders, file = name.split("/")
    for part in [*folders, file.split(".")[0]]:
        word = re.split(r"[-_.]", part.lower())[0]
        if word in SPLIT_BY_NAME:
            return SPLIT_BY_NAME[word]
    return "all"


def _choose_split(by_split: dict[str, list[LocalFile]], requested: str) -> tuple[list[LocalFile], str]:
    splits = list(by_split)
    chosen = requested or ("train" if "train" in by_split else splits[0] if len(splits) == 1 else "")
    if chosen not in by_split:
        listed = ", ".join(f"“{split}”" for split in splits)
        what = f"There is no split “{shorten(requested)}”" if requested else "There are several splits"
        raise Invalid(f"{what}. The splits are {listed}.", field="dataset.split", next_step="Name one of them.")
    return by_split[chosen], chosen


def read_records(file: DataFile) -> Iterator[Record]:
    """Yield all rows of a file. Raise Invalid for a damaged one."""
    with translate_read_errors(file):
        yield from READERS[file_format(file.name) or "text"](file)


def _count_lines(opened: OpenedFile) -> int:
    total, last = 0, b"\n"
    while chunk := opened.decompressed.read(1 << 20):
        total += chunk.count(b"\n")
        last = chunk[-1:]
    return total + (last != b"\n")


def _read_text(file: DataFile) -> Iterator[Record]:
    with OpenedFile(file) as opened:
        begun = False
        for number, line in read_lines(file, opened):
            if text := line.strip():
                heading = not begun and text.lower().rstrip(":") in HEADING_WORDS
                begun = True
                yield Record({"text": text}, f"line {number}", opened.bytes_read, HEADING if heading else None)


def _read_parquet(file: DataFile) -> Iterator[Record]:
    size, read = file.size, 0
    with _open_parquet(file) as table:
        names = table.schema_arrow.names
        if duplicate := next((name for name, count in Counter(names).items() if count > 1), None):
            raise corrupt_file_error(
                file, f"two columns are named “{shorten(duplicate)}”", "Give each column a name of its own."
            )
        total = max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=256):
            try:
                found = batch.to_pylist()
            except UnicodeDecodeError:
                raise corrupt_file_error(
                    file, f"a text in the rows {read + 1} to {read + len(batch)} is not UTF-8"
                ) from None
            for row in found:
                read += 1
                yield Record(row, f"row {read}", size * read // total)


@contextmanager
def _open_parquet(file: DataFile) -> Iterator[Any]:
    """Open a Parquet file, reading only its footer. Raise Invalid, also while it is read."""
    import pyarrow
    import pyarrow.parquet as parquet

    with file.open() as stored:
        try:
            yield parquet.ParquetFile(stored)
        except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:
            if isinstance(error, PermissionError):
                raise
            raise corrupt_file_error(file, f"it is not a whole Parquet file ({shorten(error, 100)})") from None


READERS: dict[str, Callable[[DataFile], Iterator[Record]]] = {
    "json": read_json, "csv": read_csv, "tsv": lambda file: read_csv(file, expect_tabs=True), "text": _read_text,
    "parquet": _read_parquet,
}  # fmt: skip

__all__ = ["Record", "Source", "file_format", "open_local_source", "read_records"]
