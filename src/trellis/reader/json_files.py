"""JSON files as rows: JSON lines, one document in any of the usual layouts, or several documents one after another.

Which layout a document has is decided by its shape; one that could be read in two ways is refused.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..conversation_formats import turns_of
from ..errors import Invalid, shorten
from .columns import CONVERSATIONS, USUAL
from .decoding import DataFile, Opened, broken, lines_of
from .skipped import Reason

Row = dict[str, Any]
WHOLE_LIMIT = 300_000_000
"""Characters of a JSON document, which must be read whole."""
TABLES = ("data", "rows", "records", "examples", "prompts", "questions", "instructions", "items", "samples", "entries",
          "instances")  # fmt: skip
"""Keys under which a document holds its rows, beside what it says of itself."""
OWN = USUAL[: USUAL.index("text")]
"""Columns that make an object a row although it holds a list of objects as well."""


class Record(NamedTuple):
    """A row, where it stands in its file, how many stored bytes were read up to it; and why it is none, if so."""

    row: Row
    place: str
    done: int
    problem: Reason | None = None


class Ambiguous(ValueError):
    """A document whose rows cannot be told; the words say why."""


class _KeyTwice(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _KeyTwice(f"the key “{shorten(twice)}” stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_json(file: DataFile) -> Iterator[Record]:
    """The rows of a JSON file. Raises Invalid, with line and column."""
    with Opened(file) as opened:
        read: list[str] = []
        begin: list[tuple[int, str]] = []
        number = 0
        for number, line in lines_of(file, opened, limit=WHOLE_LIMIT):
            read.append(line)
            if line.strip():
                begin.append((number, line))
            if len(begin) == 2:
                break
        if not begin:
            return
        try:
            value = _DECODER.decode(begin[0][1])
        except (ValueError, RecursionError) as error:
            text = "".join(read) + opened.text.read(WHOLE_LIMIT + 1)
            if len(text) > WHOLE_LIMIT and ".json" in file.name.lower() and ".jsonl" not in file.name.lower():
                what = f"a document of more than {WHOLE_LIMIT // 1_000_000} million characters is not read"
                raise broken(file, what, "Save it as JSON lines (.jsonl).") from None
            if len(text) > WHOLE_LIMIT:
                raise _not_json(file, error, *begin[0]) from None
            yield from _documents(file, text, opened.done)
            return
        if len(begin) == 1:
            yield from _rows_in(file, value, opened.done)
            return
        yield Record(as_row(value), f"line {begin[0][0]}", opened.done)
        rest = lines_of(file, opened, number)
        for number, line in itertools.chain(begin[1:], rest):
            if not line.strip():
                continue
            try:
                value = _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(file, error, number, line) from None
            yield Record(as_row(value), f"line {number}", opened.done)


def _documents(file: DataFile, text: str, done: int) -> Iterator[Record]:
    """The rows of one document; of several, each is a row."""
    values, at = [], 0
    while (at := _after_space(text, at)) < len(text):
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _not_json(file, error, 0, text) from None
        values.append(value)
    if len(values) == 1:
        yield from _rows_in(file, values[0], done)
    else:
        for number, value in enumerate(values, 1):
            yield Record(as_row(value), f"row {number}", done)


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _rows_in(file: DataFile, value: Any, done: int) -> Iterator[Record]:
    try:
        found = rows_of(value)
    except Ambiguous as why:
        raise broken(file, str(why), "Save the rows alone, as JSON lines.") from None
    for number, row in enumerate(found, 1):
        yield Record(row, f"row {number}", done * number // len(found))


def _not_json(file: DataFile, error: Exception, line: int, text: str) -> Invalid:
    """What is wrong in a line, or in a text of many lines (where `line` is 0)."""
    if not isinstance(error, json.JSONDecodeError):
        why = str(error) if isinstance(error, _KeyTwice) else "it is nested too deeply"
        return broken(file, f"line {line}: {why}" if line else why)
    where = f"line {line or error.lineno}, column {error.colno}"
    return broken(file, f"{where} is not JSON: {_why(error, text)}")


def _why(error: json.JSONDecodeError, text: str) -> str:
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
    return {"messages" if isinstance(value, list) and turns_of(value) else "text": value}


def rows_of(value: Any) -> list[Row]:
    """The rows of a document: of a list, of a list inside an object, of columns, or the object as one row. Raises
    Ambiguous."""
    if isinstance(value, list):
        return _rows_of_list(value)
    if isinstance(value, dict):
        return _rows_of_object(value)
    return [as_row(value)]


def _rows_of_list(value: list[Any]) -> list[Row]:
    if (turns := turns_of(value)) and any(turn.role == "assistant" for turn in turns):
        return [{"messages": value}]  # one conversation
    if len(value) > 1 and all(isinstance(each, list) for each in value) and _is_header(value[0]):
        return _table(value[0], value[1:])
    return [as_row(each) for each in value]


def _is_header(names: list[Any]) -> bool:
    return all(isinstance(name, str) for name in names) and any(name.lower().strip() in USUAL for name in names)


def _table(names: list[Any], rows: list[Any]) -> list[Row]:
    named = [str(name) for name in names]
    if twice := sorted(name for name, count in Counter(named).items() if count > 1):
        raise Ambiguous(f"two columns are named “{shorten(twice[0])}”")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(named):
            raise Ambiguous(f"row {number} does not have {len(named)} cells, as the header has")
    return [dict(zip(named, row, strict=True)) for row in rows]


def _rows_of_object(value: Row) -> list[Row]:
    names, data = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return _table(names, data)  # pandas' orient="split"
    if turns_of(value):
        return [value]
    if values := list(value.values()):
        if all(isinstance(each, list) for each in values) and not _tables(value):
            return _columns(value)
        if all(isinstance(each, dict) for each in values) and (rows := _indexed(value)):
            return rows
    return _inside(value)


def _tables(value: Mapping[str, Any]) -> list[str]:
    """The keys that hold a list of objects which is no conversation."""
    return [
        name
        for name, each in value.items()
        if isinstance(each, list) and each and all(isinstance(row, dict) for row in each)
        and not (turns_of(each) and name.lower() not in TABLES)
    ]  # fmt: skip


def _columns(value: Mapping[str, list[Any]]) -> list[Row]:
    """Rows of columns that are lists; one row where a list is a conversation."""
    for name, each in value.items():
        said = name.lower() in CONVERSATIONS and all(isinstance(text, str) for text in each)
        if said or turns_of(each):
            return [dict(value)]
    lengths = {name: len(each) for name, each in value.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"“{shorten(name)}” {length}" for name, length in list(lengths.items())[:6])
        raise Ambiguous(f"its lists are not of one length ({told})")
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _indexed(value: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Rows of objects in an object: columns of numbered cells, or named rows (pandas' orients “columns” and “index”).
    None where it is neither for sure."""
    inner = list(dict.fromkeys(name for each in value.values() for name in each))
    numbered_inner, numbered_outer = _numbers(inner), _numbers(value)
    usual_inner, usual_outer = _usual(inner), _usual(value)
    if inner and ((numbered_inner and not numbered_outer) or (usual_outer and not usual_inner)):
        return [{name: each.get(index) for name, each in value.items()} for index in inner]
    if (numbered_outer and not numbered_inner) or (usual_inner and not usual_outer):
        return [dict(each) for each in value.values()]
    return []


def _numbers(names: Any) -> bool:
    return all(name.isdecimal() for name in names)


def _usual(names: Any) -> bool:
    return any(name.lower().strip() in USUAL for name in names)


def _inside(value: Row) -> list[Row]:
    """The one list of rows in an object, or the object as a row."""
    own = any(isinstance(each, str) and name.lower() in OWN for name, each in value.items())
    tables = _tables(value)
    named = [name for name in tables if name.lower() in TABLES]
    if len(named) == 1 or (len(tables) == 1 and not own):
        return list(value[(named or tables)[0]])
    if len(tables) > 1 and not own:
        told = ", ".join(f"“{shorten(name)}”" for name in tables[:6])
        raise Ambiguous(f"it holds several lists of rows ({told})")
    lists = [name for name, each in value.items() if name.lower() in TABLES and isinstance(each, list) and each]
    if len(lists) == 1 and not own:
        return _rows_of_list(value[lists[0]])
    nested = [each for name, each in value.items() if isinstance(each, dict) and name.lower() in (*TABLES, "dataset")]
    if len(nested) == 1 and not own:
        return _rows_of_object(nested[0])
    return [value]
