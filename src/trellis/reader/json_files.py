"""JSON files as rows: JSON lines, one document in any of the usual layouts, or several documents one after another.

Which layout a document has is decided by its shape; one that could be read in two ways is refused.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..conversation_formats import parse_turns
from ..errors import Invalid, shorten
from .columns import CONVERSATION_COLUMNS, USUAL_COLUMNS
from .decoding import DataFile, OpenedFile, corrupt_file_error, read_lines
from .skipped import Reason

Row = dict[str, Any]
MAX_DOCUMENT_CHARACTERS = 300_000_000
"""Characters of a JSON document, which must be read whole."""
ROW_LIST_KEYS = ("data", "rows", "records", "examples", "prompts", "questions", "instructions", "items", "samples",
    "entries",
          "instances")  # fmt: skip
"""Keys under which a document holds its rows, beside what it says of itself."""
ROW_COLUMNS = USUAL_COLUMNS[: USUAL_COLUMNS.index("text")]
"""Columns that make an object a row although it holds a list of objects as well."""


class Record(NamedTuple):
    """A row, where it stands in its file, how many stored bytes were read up to it; and why it is none, if so."""

    row: Row
    location: str
    bytes_read: int
    problem: Reason | None = None


class AmbiguousLayout(ValueError):
    """A document whose rows are ambiguous; the message says why."""


class _DuplicateKey(ValueError):
    pass


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        duplicate = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _DuplicateKey(f"the key “{shorten(duplicate)}” stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object_without_duplicates)


def read_json(file: DataFile) -> Iterator[Record]:
    """Yield the rows of a JSON file. Raise Invalid, with line and column."""
    with OpenedFile(file) as opened:
        read: list[str] = []
        first_lines: list[tuple[int, str]] = []
        number = 0
        for number, line in read_lines(file, opened, limit=MAX_DOCUMENT_CHARACTERS):
            read.append(line)
            if line.strip():
                first_lines.append((number, line))
            if len(first_lines) == 2:
                break
        if not first_lines:
            return
        try:
            value = _DECODER.decode(first_lines[0][1])
        except (ValueError, RecursionError) as error:
            text = "".join(read) + opened.text.read(MAX_DOCUMENT_CHARACTERS + 1)
            if (
                len(text) > MAX_DOCUMENT_CHARACTERS
                and ".json" in file.name.lower()
                and ".jsonl" not in file.name.lower()
            ):
                what = f"a document of more than {MAX_DOCUMENT_CHARACTERS // 1_000_000} million characters is not read"
                raise corrupt_file_error(file, what, "Save it as JSON lines (.jsonl).") from None
            if len(text) > MAX_DOCUMENT_CHARACTERS:
                raise _invalid_json_error(file, error, *first_lines[0]) from None
            yield from _read_documents(file, text, opened.bytes_read)
            return
        if len(first_lines) == 1:
            yield from _read_document(file, value, opened.bytes_read)
            return
        yield Record(as_row(value), f"line {first_lines[0][0]}", opened.bytes_read)
        rest = read_lines(file, opened, number)
        for number, line in itertools.chain(first_lines[1:], rest):
            if not line.strip():
                continue
            try:
                value = _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                raise _invalid_json_error(file, error, number, line) from None
            yield Record(as_row(value), f"line {number}", opened.bytes_read)


def _read_documents(file: DataFile, text: str, bytes_read: int) -> Iterator[Record]:
    """The rows of one document; of several, each is a row."""
    values, at = [], 0
    while (at := _skip_whitespace(text, at)) < len(text):
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _invalid_json_error(file, error, 0, text) from None
        values.append(value)
    if len(values) == 1:
        yield from _read_document(file, values[0], bytes_read)
    else:
        for number, value in enumerate(values, 1):
            yield Record(as_row(value), f"row {number}", bytes_read)


def _skip_whitespace(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_document(file: DataFile, value: Any, bytes_read: int) -> Iterator[Record]:
    try:
        found = rows_of_document(value)
    except AmbiguousLayout as why:
        raise corrupt_file_error(file, str(why), "Save the rows alone, as JSON lines.") from None
    for number, row in enumerate(found, 1):
        yield Record(row, f"row {number}", bytes_read * number // len(found))


def _invalid_json_error(file: DataFile, error: Exception, line: int, text: str) -> Invalid:
    """Return the error in a line, or in a text of many lines (`line` 0)."""
    if not isinstance(error, json.JSONDecodeError):
        why = str(error) if isinstance(error, _DuplicateKey) else "it is nested too deeply"
        return corrupt_file_error(file, f"line {line}: {why}" if line else why)
    where = f"line {line or error.lineno}, column {error.colno}"
    return corrupt_file_error(file, f"{where} is not JSON: {_describe_error(error, text)}")


def _describe_error(error: json.JSONDecodeError, text: str) -> str:
    here, before = text[error.pos : error.pos + 1], text[: error.pos].rstrip()[-1:]
    if here in ("/", "#"):
        return "JSON has no comments"
    if here == "'":
        return "names and texts stand in double quotes"
    if here == "," or (here in ("}", "]") and before == ","):
        return "there is a comma too many"
    if not here:
        return "it ends too early"
    if "control character" in error.msg:
        return "a line break or control character in a text is written as an escape, such as \\n"
    if "Unterminated string" in error.msg:
        return "a text begins here and has no end"
    if error.msg == "Extra data":
        return f"“{shorten(text[error.pos : error.pos + 20], 20)}” stands behind the value"
    return error.msg[:1].lower() + error.msg[1:]


def as_row(value: Any) -> Row:
    if isinstance(value, dict):
        return value
    return {"messages" if isinstance(value, list) and parse_turns(value) else "text": value}


def rows_of_document(value: Any) -> list[Row]:
    """The rows of a document: of a list, of a list inside an object, of columns, or the object as one row. Raises
    Ambiguous."""
    if isinstance(value, list):
        return _rows_of_list(value)
    if isinstance(value, dict):
        return _rows_of_object(value)
    return [as_row(value)]


def _rows_of_list(value: list[Any]) -> list[Row]:
    if (turns := parse_turns(value)) and any(turn.role == "assistant" for turn in turns):
        return [{"messages": value}]  # one conversation
    if len(value) > 1 and all(isinstance(each, list) for each in value) and _is_header(value[0]):
        return _rows_of_table(value[0], value[1:])
    return [as_row(each) for each in value]


def _is_header(names: list[Any]) -> bool:
    return all(isinstance(name, str) for name in names) and any(name.lower().strip() in USUAL_COLUMNS for name in names)


def _rows_of_table(names: list[Any], rows: list[Any]) -> list[Row]:
    named = [str(name) for name in names]
    if duplicates := sorted(name for name, count in Counter(named).items() if count > 1):
        raise AmbiguousLayout(f"two columns are named “{shorten(duplicates[0])}”")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(named):
            raise AmbiguousLayout(f"row {number} does not have {len(named)} cells, as the header has")
    return [dict(zip(named, row, strict=True)) for row in rows]


def _rows_of_object(value: Row) -> list[Row]:
    names, data = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return _rows_of_table(names, data)  # pandas' orient="split"
    if parse_turns(value):
        return [value]
    if values := list(value.values()):
        if all(isinstance(each, list) for each in values) and not _row_list_keys(value):
            return _rows_of_columns(value)
        if all(isinstance(each, dict) for each in values) and (rows := _rows_of_indexed(value)):
            return rows
    return _rows_of_nested(value)


def _row_list_keys(value: Mapping[str, Any]) -> list[str]:
    """The keys that hold a list of objects which is no conversation."""
    return [
        name
        for name, each in value.items()
        if isinstance(each, list) and each and all(isinstance(row, dict) for row in each)
        and not (parse_turns(each) and name.lower() not in ROW_LIST_KEYS)
    ]  # fmt: skip


def _rows_of_columns(value: Mapping[str, list[Any]]) -> list[Row]:
    """Rows of columns that are lists; one row where a list is a conversation."""
    for name, each in value.items():
        said = name.lower() in CONVERSATION_COLUMNS and all(isinstance(text, str) for text in each)
        if said or parse_turns(each):
            return [dict(value)]
    lengths = {name: len(each) for name, each in value.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"“{shorten(name)}” {length}" for name, length in list(lengths.items())[:6])
        raise AmbiguousLayout(f"its lists are not of one length ({told})")
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _rows_of_indexed(value: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Rows of objects in an object: columns of numbered cells, or named rows (pandas' orients “columns” and “index”).
    None where it is neither for sure."""
    inner = list(dict.fromkeys(name for each in value.values() for name in each))
    numbered_inner, numbered_outer = _are_all_numbers(inner), _are_all_numbers(value)
    usual_inner, usual_outer = _has_usual_column(inner), _has_usual_column(value)
    if inner and ((numbered_inner and not numbered_outer) or (usual_outer and not usual_inner)):
        return [{name: each.get(index) for name, each in value.items()} for index in inner]
    if (numbered_outer and not numbered_inner) or (usual_inner and not usual_outer):
        return [dict(each) for each in value.values()]
    return []


def _are_all_numbers(names: Any) -> bool:
    return all(name.isdecimal() for name in names)


def _has_usual_column(names: Any) -> bool:
    return any(name.lower().strip() in USUAL_COLUMNS for name in names)


def _rows_of_nested(value: Row) -> list[Row]:
    """The one list of rows in an object, or the object as a row."""
    is_row = any(isinstance(each, str) and name.lower() in ROW_COLUMNS for name, each in value.items())
    tables = _row_list_keys(value)
    named = [name for name in tables if name.lower() in ROW_LIST_KEYS]
    if len(named) == 1 or (len(tables) == 1 and not is_row):
        return list(value[(named or tables)[0]])
    if len(tables) > 1 and not is_row:
        told = ", ".join(f"“{shorten(name)}”" for name in tables[:6])
        raise AmbiguousLayout(f"it holds several lists of rows ({told})")
    lists = [name for name, each in value.items() if name.lower() in ROW_LIST_KEYS and isinstance(each, list) and each]
    if len(lists) == 1 and not is_row:
        return _rows_of_list(value[lists[0]])
    nested = [
        each for name, each in value.items() if isinstance(each, dict) and name.lower() in (*ROW_LIST_KEYS, "dataset")
    ]
    if len(nested) == 1 and not is_row:
        return _rows_of_object(nested[0])
    return [value]
