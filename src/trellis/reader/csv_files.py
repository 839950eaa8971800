"""Tables as text, with commas, semicolons, tabs or bars between their cells, as rows.

The delimiter is the one with which the first rows have as many cells as the header. A row with more is refused: its
cells cannot be told apart.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..errors import shorten
from .columns import USUAL_COLUMNS
from .decoding import LINE_LIMIT, DataFile, OpenedFile, corrupt_file_error, read_lines
from .json_files import Record, Row

DELIMITERS = (",", ";", "\t", "|")
SINGLE_COLUMN = "\x00"
"""The delimiter of a table of one column, in which a comma is part of the text."""
SAMPLED_ROWS = 100
"""Rows from which the delimiter is detected."""
MAX_NAME_LENGTH, MAX_NAME_WORDS = 60, 5
"""A header of one column that is longer than this is its first row."""


def read_csv(file: DataFile, expect_tabs: bool = False) -> Iterator[Record]:
    """Yield the rows of a table. `expect_tabs`: its name promises tabs. Raise Invalid, with the line."""
    csv.field_size_limit(LINE_LIMIT)
    with OpenedFile(file) as opened:
        numbered = read_lines(file, opened)
        head = list(itertools.islice(numbered, SAMPLED_ROWS * 5))
        dialect = _detect_dialect([line for _, line in head], expect_tabs)
        lines = (line for _, line in itertools.chain(head, numbered))
        reader = csv.reader(lines, **dialect)
        names: list[str] = []
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise corrupt_file_error(file, f"line {line}: {_describe_error(error)}") from None
            if cells is None:
                return
            if not cells or (line == 1 and _is_excel_separator_line(cells, dialect)):
                continue
            if dialect["delimiter"] == SINGLE_COLUMN:
                cells = [SINGLE_COLUMN.join(cells)]
            if names:
                yield Record(_make_row(file, names, cells, line), f"line {line}", opened.bytes_read)
                continue
            names = _parse_header(file, cells, line)
            if len(names) == 1 and _is_prose(names[0]):
                yield Record({"text": names[0]}, f"line {line}", opened.bytes_read)
                names = ["text"]


def _is_excel_separator_line(cells: list[str], dialect: dict[str, Any]) -> bool:
    """Whether these are Excel's first line, `sep=;`."""
    return dialect["delimiter"].join(cells).strip().lower() in (f"sep={dialect['delimiter']}", "sep=")


def _parse_header(file: DataFile, cells: list[str], line: int) -> list[str]:
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
    if duplicate := next((name for name, count in Counter(names).items() if count > 1), None):
        raise corrupt_file_error(
            file, f"line {line} names the column “{shorten(duplicate)}” twice", "Give each column a name of its own."
        )
    return names


def _make_row(file: DataFile, names: list[str], cells: list[str], line: int) -> Row:
    if any(cell.strip() for cell in cells[len(names) :]):
        raise corrupt_file_error(
            file,
            f"line {line} has {len(cells)} cells, and the header has {len(names)}",
            "Put quotes around a cell that holds the character between the cells.",
        )
    return dict(zip(names, cells, strict=False))


def _is_prose(name: str) -> bool:
    """Whether the name of the only column is a text itself, in a table without a header."""
    if name.lower() in USUAL_COLUMNS:
        return False
    return name.endswith((".", "?", "!", "…")) or len(name) > MAX_NAME_LENGTH or len(name.split()) > MAX_NAME_WORDS


def _describe_error(error: csv.Error) -> str:
    said = str(error)
    if "unexpected end of data" in said:
        return "a quote that is opened here is never closed"
    if "expected after" in said:
        return "text stands behind a closing quote; a quote inside a quoted cell is written twice"
    if "field larger" in said:
        return f"a cell is longer than {LINE_LIMIT // 1_000_000} million characters"
    return said


def _detect_dialect(lines: list[str], expect_tabs: bool) -> dict[str, Any]:
    """Detect delimiter and quoting from the first lines. Wrong quotes are reported when rows are read."""
    first = next((line for line in lines if line.strip()), "").strip().lower()
    if first.startswith("sep=") and len(first) <= 5:
        named = first[4:] or "\t"
        return _dialect_options(named if named in DELIMITERS else ",")
    if expect_tabs and "\t" in first:
        return max(
            (_dialect_options("\t"), _unquoted_dialect("\t")), key=lambda options: _score_dialect(lines, options)
        )
    best, most = _dialect_options(SINGLE_COLUMN), (0.0, 0)
    for options in (_dialect_options, _escaped_dialect) if _escapes_quotes(lines) else (_dialect_options,):
        for delimiter in DELIMITERS:
            fit = _score_dialect(lines, options(delimiter))
            if fit > most:
                best, most = options(delimiter), fit
    return best


def _dialect_options(delimiter: str) -> dict[str, Any]:
    return {"delimiter": delimiter, "strict": True, "skipinitialspace": True}


def _escaped_dialect(delimiter: str) -> dict[str, Any]:
    return _dialect_options(delimiter) | {"escapechar": "\\", "doublequote": False}


def _unquoted_dialect(delimiter: str) -> dict[str, Any]:
    """Quotes are part of the text, as in many files with tabs."""
    return _dialect_options(delimiter) | {"quoting": csv.QUOTE_NONE}


def _escapes_quotes(lines: list[str]) -> bool:
    """Whether backslashes stand before quotes and backslashes, and nowhere else."""
    text = "".join(lines)
    return '\\"' in text and not re.search(r'\\[^"\\]', re.sub(r"\\{2}", "", text))


def _score_dialect(lines: list[str], options: dict[str, Any]) -> tuple[float, int]:
    """The share of the first rows that have as many cells as the header, and how many these are; zero for a header of
    one cell, and where most rows differ from a header without a usual name."""
    rows: list[list[str]] = []
    wrong = 0
    try:
        for cells in itertools.islice(csv.reader(lines, **options), SAMPLED_ROWS):
            if cells:
                rows.append(cells)
    except csv.Error as error:
        # The last row may go on behind the lines that were looked at.
        wrong = "unexpected end of data" not in str(error)
    if not rows or len(rows[0]) < 2:
        return 0.0, 0
    share = sum(len(cells) == len(rows[0]) for cells in rows) / (len(rows) + wrong)
    if share <= 0.5 and not any(name.strip().lower() in USUAL_COLUMNS for name in rows[0]):
        return 0.0, 0
    return share, len(rows[0])
