"""Files of prompts as rows, streamed: JSON lines, JSON, CSV, TSV, Parquet and plain text, alone or in a folder.

It does not know which column is wanted, or what a dataset on the hub is.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Invalid, shorten

Row = dict[str, Any]
LINE_LIMIT = 16_000_000
"""Bytes in one line; a longer one is not a prompt."""
WHOLE_LIMIT = 300_000_000
"""Bytes of a JSON file that is one list and so must be read whole."""
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
         ".txt": "text", ".text": "text"}  # fmt: skip
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation", "eval": "validation", "test": "test"}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The files of one split, in order, and the splits that there are."""

    files: list[Path]
    split: str
    splits: list[str]

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def source_of(path: Path, split: str) -> Source:
    """The files to read. Raises Invalid for what is not there or has no format that is known."""
    known = ", ".join(sorted(KINDS))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in KINDS and file.is_file())
        files = [file for file in files if file.resolve().is_relative_to(path.resolve())]
        if not files:
            raise Invalid(
                f"The folder “{path.name}” holds no files of prompts.",
                field="dataset.id", next_step=f"Put files into it that end in {known}.",
            )  # fmt: skip
    elif not path.is_file():
        raise Invalid(
            f"There is no file “{path.name}”.", field="dataset.id", next_step="Choose one of the files that are listed."
        )
    elif path.suffix.lower() not in KINDS:
        raise Invalid(
            f"“{path.name}” has no format that is known.",
            field="dataset.id", next_step=f"Use a file that ends in {known}.",
        )  # fmt: skip
    else:
        files = [path]
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, path), []).append(file)
    return Source(*_choose(by_split, split), list(by_split))


def _split_of(file: Path, root: Path) -> str:
    """The split that a file's name or folder tells of; “all” where neither does."""
    if root == file:
        return "all"
    for name in [*file.relative_to(root).parts[:-1], file.stem]:
        word = re.split(r"[-_.]", name.lower())[0]
        if word in SPLITS:
            return SPLITS[word]
    return "all"


def _choose(by_split: dict[str, list[Path]], wanted: str) -> tuple[list[Path], str]:
    splits = list(by_split)
    chosen = wanted or ("train" if "train" in by_split else splits[0] if len(splits) == 1 else "")
    if chosen not in by_split:
        listed = ", ".join(f"“{split}”" for split in splits)
        what = f"There is no split “{shorten(wanted)}”" if wanted else "There are several splits"
        raise Invalid(f"{what}. The splits are {listed}.", field="dataset.split", next_step="Name one of them.")
    return by_split[chosen], chosen


def rows(source: Source, told: Callable[[int], None] = lambda done: None) -> Iterator[Row]:
    """All rows, streamed. `told` hears how many bytes of the files have been read. Raises Invalid for a broken file."""
    before = 0
    for file in source.files:
        kind = KINDS[file.suffix.lower()]
        try:
            for row, done in READERS[kind](file):
                told(before + done)
                yield row
        except UnicodeDecodeError as error:
            raise _broken(file, f"it is not UTF-8 text (byte {error.start})") from None
        except PermissionError:
            raise Invalid(
                f"“{file.name}” may not be read.", code="permission_denied",
                field="dataset.id", next_step="Give the studio's user the right to read it.",
            ) from None  # fmt: skip
        before += file.stat().st_size


def count(source: Source) -> tuple[int, bool]:
    """How many rows there are, and whether that is exact or counted by line ends."""
    total, exact = 0, True
    for file in source.files:
        kind = KINDS[file.suffix.lower()]
        if kind == "parquet":
            total += _parquet(file).metadata.num_rows
        else:
            lines = _line_ends(file)
            total += max(0, lines - (kind == "csv"))
            exact = exact and kind == "text"
    return total, exact


def _line_ends(file: Path) -> int:
    total, last = 0, b"\n"
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            total += chunk.count(b"\n")
            last = chunk[-1:]
    return total + (last != b"\n")


def _lines(file: Path) -> Iterator[tuple[int, bytes, int]]:
    """(number, line, bytes read so far) of each line. Raises Invalid for one without an end."""
    done = 0
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(LINE_LIMIT):
            number += 1
            done += len(line)
            if len(line) >= LINE_LIMIT:
                raise _broken(file, f"line {number} is longer than {LINE_LIMIT // 1_000_000} MB")
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, done


def _read_jsonl(file: Path) -> Iterator[tuple[Row, int]]:
    for number, line, done in _lines(file):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise
            raise _broken(file, f"line {number} is not JSON") from None
        yield _as_row(value), done


def _read_json(file: Path) -> Iterator[tuple[Row, int]]:
    with file.open("rb") as stream:
        first = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if first != b"[":
        yield from _read_jsonl(file)
        return
    size = file.stat().st_size
    if size > WHOLE_LIMIT:
        raise _broken(file, f"one list of {size // 1_000_000} MB must be read whole; save it as JSON lines (.jsonl)")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise _broken(file, "it is not JSON") from None
    for number, value in enumerate(values, 1):
        yield _as_row(value), size * number // len(values)


def _as_row(value: Any) -> Row:
    return value if isinstance(value, dict) else {"text": value}


def _read_csv(file: Path) -> Iterator[tuple[Row, int]]:
    csv.field_size_limit(LINE_LIMIT)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        head = stream.read(65_536)
        stream.seek(0)
        delimiter = "\t" if file.suffix.lower() == ".tsv" else _delimiter(head)
        done = 0

        def lines() -> Iterator[str]:
            nonlocal done
            for line in stream:
                done += len(line)
                yield line

        reader = csv.DictReader(lines(), delimiter=delimiter)
        try:
            for row in reader:
                yield {name: value for name, value in row.items() if isinstance(name, str)}, done
        except csv.Error as error:
            raise _broken(file, f"line {reader.line_num}: {error}") from None


def _delimiter(head: str) -> str:
    """The likeliest delimiter, from the header row."""
    header = head.splitlines()[0] if head else ""
    return max(",;\t|", key=header.count)


def _read_text(file: Path) -> Iterator[tuple[Row, int]]:
    for _, line, done in _lines(file):
        if text := line.decode().strip():
            yield {"text": text}, done


def _read_parquet(file: Path) -> Iterator[tuple[Row, int]]:
    import pyarrow

    size, table = file.stat().st_size, _parquet(file)
    try:
        total = max(table.metadata.num_rows, 1)
        read = 0
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                read += 1
                yield row, size * read // total
    except (pyarrow.ArrowException, OSError) as error:
        raise _broken(file, f"it is not a whole Parquet file ({shorten(error, 100)})") from None


def _parquet(file: Path) -> Any:
    """An open Parquet file, of which only the end has been read. Raises Invalid."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise _broken(file, f"it is not a whole Parquet file ({shorten(error, 100)})") from None


READERS: dict[str, Callable[[Path], Iterator[tuple[Row, int]]]] = {
    "jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "text": _read_text, "parquet": _read_parquet,
}  # fmt: skip


def _broken(file: Path, what: str) -> Invalid:
    return Invalid(
        f"“{file.name}” cannot be read: {what}.", code="corrupt_file",
        field="dataset.id", next_step="Correct the file, or choose another.",
    )  # fmt: skip
