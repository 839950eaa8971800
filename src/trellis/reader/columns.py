"""Which column of a table holds the prompts, and the prompt in a row. It does not know files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..conversation_formats import ROLE_KEYS, ROLES, NotJSON, Turn, turns_of
from ..errors import Invalid, shorten
from ..text_rules import PROMPT_LIMIT, storable
from .skipped import Reason, number

USUAL = ("prompt", "question", "instruction", "query", "messages", "conversations", "conversation", "dialog",
         "problem", "goal", "task", "input", "text", "content", "sentence", "chosen")  # fmt: skip
"""Names under which datasets keep their prompts, the surest first."""

CONVERSATIONS = {"messages", "conversations", "conversation", "dialog"}
STRONG = {"prompt", "question", "instruction", "query", "problem"}
"""Names that make a number a prompt."""
ABOUT = ("input", "context")
"""Columns that hold what an “instruction” is about: the layouts of Alpaca and of Dolly."""

EMPTY = Reason("is empty", "are empty")
TOO_LONG = Reason(
    f"is longer than {number(PROMPT_LIMIT)} characters", f"are longer than {number(PROMPT_LIMIT)} characters"
)
NUL = Reason("holds the character NUL", "hold the character NUL")
SURROGATE = Reason(
    "holds half of a surrogate pair, which is no text", "hold half of a surrogate pair, which is no text"
)
BINARY = Reason("holds bytes that are not UTF-8 text", "hold bytes that are not UTF-8 text")
NOT_JSON = Reason("holds a list of messages that is not valid JSON", "hold a list of messages that is not valid JSON")
NOBODY_ASKS = Reason("is a conversation in which nobody asks", "are conversations in which nobody asks")
NOT_ASKED = Reason("is not said by a user", "are not said by a user")

UNUSABLE = {TOO_LONG, NUL, SURROGATE, NOT_JSON, NOBODY_ASKS, NOT_ASKED}
"""Why text is no prompt. A column in which all text is like this is still the one that was meant."""

CUT = Reason(
    "conversation is reduced to its first question; what comes after it is not used",
    "conversations are reduced to their first questions; what comes after these is not used",
)
BEGINS_EARLIER = Reason(
    "conversation begins before its first question; that beginning is not used",
    "conversations begin before their first questions; those beginnings are not used",
)
SYSTEM = Reason(
    "row has a system prompt of its own, which is not used; the session's is",
    "rows have a system prompt of their own, which is not used; the session's is",
)
PARTS = Reason("prompt holds more than text, which is not used", "prompts hold more than text, which is not used")


@dataclass(frozen=True, slots=True)
class Asked:
    """The prompt of a row, or the reason why it has none; and what was left out of it."""

    text: str = ""
    problem: Reason | None = None
    shortened: tuple[Reason, ...] = ()


def no_text(column: str) -> Reason:
    name = shorten(column)
    return Reason(f"has no text in “{name}”", f"have no text in “{name}”")


def column_of(wanted: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The column to take, from a name or from the first rows. Raises Invalid, which lists what there is."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    quoted = ", ".join(f"“{shorten(name)}”" for name in columns[:40])
    listed = f"The columns are {quoted}." if quoted else "It has no columns."
    if wanted:
        if wanted not in columns:
            wanted = next((name for name in columns if name.strip() == wanted), wanted)
        if wanted not in columns and not any(_at(row, wanted) is not None for row in rows):
            raise Invalid(
                f"There is no column “{shorten(wanted)}”. {listed}",
                field="dataset.column", next_step="Name one of them, or leave it empty.",
            )  # fmt: skip
        if not any(_is_text(prompt_in(row, wanted)) for row in rows):
            raise Invalid(
                f"The column “{shorten(wanted)}” holds no text in its first rows. "
                f"{_objects(wanted, rows) or listed}",
                field="dataset.column", next_step="Name a column with text or with chat messages.",
            )  # fmt: skip
        return wanted
    by_name: dict[str, list[str]] = {}
    for name in columns:
        by_name.setdefault(name.lower().strip(), []).append(name)
    for usual in USUAL:
        names = [name for name in by_name.get(usual, []) if any(_has_text(row, name) for row in rows)]
        if len(names) > 1 and usual not in names:
            raise Invalid(
                f"Several columns could hold the prompts: {', '.join(f'“{shorten(name)}”' for name in names)}.",
                field="dataset.column", next_step="Name one of them.",
            )  # fmt: skip
        if names:
            return usual if usual in names else names[0]
    texts = [name for name in columns if any(_has_text(row, name) for row in rows)]
    empty = [name for usual in USUAL for name in by_name.get(usual, [])]
    if len(texts) == 1 and not empty:
        return texts[0]
    if empty:
        why = f"The column “{shorten(empty[0])}” holds no text in its first rows."
    else:
        why = "No column has one of the usual names." if texts else "No column holds text."
    raise Invalid(
        f"{why} {listed}",
        field="dataset.column", next_step="Name the column that holds the prompts.",
    )  # fmt: skip


def is_surest(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no other column has a surer name, which may have text in later rows."""
    names = {name.lower().strip() for row in rows for name in row}
    surest = next((usual for usual in USUAL if usual in names), "")
    return not surest or surest == column.lower().strip()


def _objects(column: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What can be named inside a column of objects; empty for another one."""
    value = next((found for row in rows if (found := _at(row, column)) is not None), None)
    if not isinstance(value, Mapping):
        return ""
    inside = ", ".join(f"“{shorten(f'{column}.{name}')}”" for name in list(value)[:20])
    return f"It holds objects; inside are {inside}."


def _has_text(row: Mapping[str, Any], column: str) -> bool:
    """Whether a row has a prompt in a column that nobody named: a number is one under the surest names alone."""
    number = isinstance(row.get(column), (int, float, Decimal)) and column.lower().strip() not in STRONG
    return not number and _is_text(prompt_in(row, column))


def _is_text(asked: Asked) -> bool:
    return bool(asked.text) or asked.problem in UNUSABLE


def _at(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, also of one inside an object: `meta.question`."""
    if column in row:
        return row[column]
    if "." not in column:
        return None
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def prompt_in(row: Mapping[str, Any], column: str) -> Asked:
    """The prompt of a row: text as it is, of a conversation what was asked first."""
    name = column.lower().strip()
    asked = asked_in(_at(row, column), name in CONVERSATIONS)
    if asked.problem:
        return asked
    if not asked.text:
        return Asked(problem=no_text(column))
    if name in ("content", "value", "text") and not _by_user(row):
        return Asked(problem=NOT_ASKED)
    if name == "instruction":
        extra = next((row[name] for name in ABOUT if isinstance(row.get(name), str) and row[name].strip()), "")
        asked = Asked(f"{asked.text}\n\n{extra.strip()}" if extra else asked.text, None, asked.shortened)
    return _usable(asked)


def _by_user(row: Mapping[str, Any]) -> bool:
    """Whether a row that is one message of a conversation is a user's; so is one that is no message."""
    said = next((row[key] for key in ROLE_KEYS if isinstance(row.get(key), str)), "user")
    return ROLES.get(said.strip().lower(), "user") == "user"


def _usable(asked: Asked) -> Asked:
    if not asked.text:
        return asked
    if len(asked.text) > PROMPT_LIMIT:
        return Asked(problem=TOO_LONG)
    try:
        storable(asked.text)
    except ValueError:
        return Asked(problem=NUL if "\x00" in asked.text else SURROGATE)
    return asked


def asked_in(value: Any, conversation: bool = False) -> Asked:
    """The prompt in a value; without text and problem for one that is no text at all. `conversation` says that text is
    read as a list of what was said, where it is one."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            value = bytes(value).decode("utf-8-sig")
        except UnicodeDecodeError:
            return Asked(problem=BINARY)
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return Asked(str(value)) if math.isfinite(value) else Asked()
    try:
        turns = turns_of(value)
    except NotJSON:
        return Asked(problem=NOT_JSON)
    if turns:
        return _first_question(turns)
    if isinstance(value, str) and conversation:
        value = _list_in(value)
    if isinstance(value, str):
        text = value.strip()
        return Asked(text) if text else Asked(problem=EMPTY)
    if isinstance(value, (list, tuple)):
        return _first_said(value, conversation)
    if isinstance(value, Mapping):
        inside = {str(name).lower(): each for name, each in value.items() if not isinstance(each, Mapping)}
        found = (asked_in(inside[usual], usual in CONVERSATIONS) for usual in USUAL if usual in inside)
        return next((asked for asked in found if asked.text), Asked())
    return Asked()


def _list_in(text: str) -> Any:
    """The list of strings that a text is as JSON; else the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list) else text


def _first_said(said: Sequence[Any], conversation: bool) -> Asked:
    """The first of a list of texts, which are question, answer, question … in a conversation."""
    if not said:
        return Asked(problem=EMPTY)
    if not all(isinstance(each, str) for each in said):
        return Asked()
    text = said[0].strip()
    return Asked(text, None, (CUT,) if len(said) > (2 if conversation else 1) else ()) if text else Asked(problem=EMPTY)


def _first_question(turns: list[Turn]) -> Asked:
    number = next((number for number, turn in enumerate(turns) if turn.role == "user" and turn.text.strip()), None)
    if number is None:
        return Asked(problem=NOBODY_ASKS)
    before, after = turns[:number], turns[number + 1 :]
    lost = {
        SYSTEM: any(turn.role == "system" and turn.text.strip() for turn in before),
        BEGINS_EARLIER: any(turn.role != "system" and turn.text.strip() for turn in before),
        CUT: any(turn.role == "user" for turn in after),
        PARTS: not turns[number].whole,
    }
    return Asked(turns[number].text.strip(), None, tuple(reason for reason, is_lost in lost.items() if is_lost))
