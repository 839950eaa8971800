"""Find the column of a table that holds the prompts, and the prompt in a row. It does not know files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..conversation_formats import ROLE_BY_NAME, ROLE_KEYS, NotJSON, Turn, parse_turns
from ..errors import Invalid, shorten
from ..text_rules import PROMPT_LIMIT, require_storable
from .skipped import Reason, format_number

USUAL_COLUMNS = ("prompt", "question", "instruction", "query", "messages", "conversations", "conversation", "dialog",
         "problem", "goal", "task", "input", "text", "content", "sentence", "chosen")  # fmt: skip
"""Names under which datasets keep their prompts, the surest first."""

CONVERSATION_COLUMNS = {"messages", "conversations", "conversation", "dialog"}
NUMERIC_PROMPT_COLUMNS = {"prompt", "question", "instruction", "query", "problem"}
"""Names that make a number a prompt."""
CONTEXT_COLUMNS = ("input", "context")
"""Columns that hold what an “instruction” is about: the layouts of Alpaca and of Dolly."""

EMPTY = Reason("is empty", "are empty")
TOO_LONG = Reason(
    f"is longer than {format_number(PROMPT_LIMIT)} characters",
    f"are longer than {format_number(PROMPT_LIMIT)} characters",
)
NUL = Reason("holds the character NUL", "hold the character NUL")
SURROGATE = Reason(
    "holds half of a surrogate pair, which is no text", "hold half of a surrogate pair, which is no text"
)
BINARY = Reason("holds bytes that are not UTF-8 text", "hold bytes that are not UTF-8 text")
NOT_JSON = Reason("holds a list of messages that is not valid JSON", "hold a list of messages that is not valid JSON")
NO_USER_TURN = Reason("is a conversation in which nobody asks", "are conversations in which nobody asks")
NOT_FROM_USER = Reason("is not said by a user", "are not said by a user")

UNUSABLE = {TOO_LONG, NUL, SURROGATE, NOT_JSON, NO_USER_TURN, NOT_FROM_USER}
"""Reasons why text is no prompt. A column with only such text is still the right one."""

LATER_TURNS_DROPPED = Reason(
    "conversation is reduced to its first question; what comes after it is not used",
    "conversations are reduced to their first questions; what comes after these is not used",
)
EARLIER_TURNS_DROPPED = Reason(
    "conversation begins before its first question; that beginning is not used",
    "conversations begin before their first questions; those beginnings are not used",
)
SYSTEM_PROMPT_DROPPED = Reason(
    "row has a system prompt of its own, which is not used; the session's is",
    "rows have a system prompt of their own, which is not used; the session's is",
)
NON_TEXT_DROPPED = Reason(
    "prompt holds more than text, which is not used", "prompts hold more than text, which is not used"
)


@dataclass(frozen=True, slots=True)
class ExtractedPrompt:
    """The prompt of a row, or the reason why it has none; and what was left out of it."""

    text: str = ""
    problem: Reason | None = None
    shortened: tuple[Reason, ...] = ()


def no_text_reason(column: str) -> Reason:
    name = shorten(column)
    return Reason(f"has no text in “{name}”", f"have no text in “{name}”")


def find_prompt_column(requested: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the column to use, by name or from the first rows. Raise Invalid, which lists the columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    quoted = ", ".join(f"“{shorten(name)}”" for name in columns[:40])
    listed = f"The columns are {quoted}." if quoted else "It has no columns."
    if requested:
        if requested not in columns:
            requested = next((name for name in columns if name.strip() == requested), requested)
        if requested not in columns and not any(_get_value(row, requested) is not None for row in rows):
            raise Invalid(
                f"There is no column “{shorten(requested)}”. {listed}",
                field="dataset.column", next_step="Name one of them, or leave it empty.",
            )  # fmt: skip
        if not any(_has_usable_text(extract_prompt(row, requested)) for row in rows):
            raise Invalid(
                f"The column “{shorten(requested)}” holds no text in its first rows. "
                f"{_describe_object(requested, rows) or listed}",
                field="dataset.column", next_step="Name a column with text or with chat messages.",
            )  # fmt: skip
        return requested
    by_name: dict[str, list[str]] = {}
    for name in columns:
        by_name.setdefault(name.lower().strip(), []).append(name)
    for usual in USUAL_COLUMNS:
        names = [name for name in by_name.get(usual, []) if any(_has_text(row, name) for row in rows)]
        if len(names) > 1 and usual not in names:
            raise Invalid(
                f"Several columns could hold the prompts: {', '.join(f'“{shorten(name)}”' for name in names)}.",
                field="dataset.column", next_step="Name one of them.",
            )  # fmt: skip
        if names:
            return usual if usual in names else names[0]
    texts = [name for name in columns if any(_has_text(row, name) for row in rows)]
    empty = [name for usual in USUAL_COLUMNS for name in by_name.get(usual, [])]
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


def is_likeliest_column(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no other column has a surer name, which may have text in later rows."""
    names = {name.lower().strip() for row in rows for name in row}
    surest = next((usual for usual in USUAL_COLUMNS if usual in names), "")
    return not surest or surest == column.lower().strip()


def _describe_object(column: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What can be named inside a column of objects; empty for another one."""
    value = next((found for row in rows if (found := _get_value(row, column)) is not None), None)
    if not isinstance(value, Mapping):
        return ""
    inside = ", ".join(f"“{shorten(f'{column}.{name}')}”" for name in list(value)[:20])
    return f"It holds objects; inside are {inside}."


def _has_text(row: Mapping[str, Any], column: str) -> bool:
    """Whether a row has a prompt in a column that nobody named: a number is one under the surest names alone."""
    number = isinstance(row.get(column), (int, float, Decimal)) and column.lower().strip() not in NUMERIC_PROMPT_COLUMNS
    return not number and _has_usable_text(extract_prompt(row, column))


def _has_usable_text(prompt: ExtractedPrompt) -> bool:
    return bool(prompt.text) or prompt.problem in UNUSABLE


def _get_value(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, also of one inside an object: `meta.question`."""
    if column in row:
        return row[column]
    if "." not in column:
        return None
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def extract_prompt(row: Mapping[str, Any], column: str) -> ExtractedPrompt:
    """The prompt of a row: text as it is, of a conversation what was asked first."""
    name = column.lower().strip()
    prompt = extract_from_value(_get_value(row, column), name in CONVERSATION_COLUMNS)
    if prompt.problem:
        return prompt
    if not prompt.text:
        return ExtractedPrompt(problem=no_text_reason(column))
    if name in ("content", "value", "text") and not _is_from_user(row):
        return ExtractedPrompt(problem=NOT_FROM_USER)
    if name == "instruction":
        extra = next(
            (row[name] for name in CONTEXT_COLUMNS if isinstance(row.get(name), str) and row[name].strip()), ""
        )
        prompt = ExtractedPrompt(f"{prompt.text}\n\n{extra.strip()}" if extra else prompt.text, None, prompt.shortened)
    return _check_usable(prompt)


def _is_from_user(row: Mapping[str, Any]) -> bool:
    """Whether a row that is one message of a conversation is a user's; so is one that is no message."""
    role = next((row[key] for key in ROLE_KEYS if isinstance(row.get(key), str)), "user")
    return ROLE_BY_NAME.get(role.strip().lower(), "user") == "user"


def _check_usable(prompt: ExtractedPrompt) -> ExtractedPrompt:
    if not prompt.text:
        return prompt
    if len(prompt.text) > PROMPT_LIMIT:
        return ExtractedPrompt(problem=TOO_LONG)
    try:
        require_storable(prompt.text)
    except ValueError:
        return ExtractedPrompt(problem=NUL if "\x00" in prompt.text else SURROGATE)
    return prompt


def extract_from_value(value: Any, is_conversation: bool = False) -> ExtractedPrompt:
    """The prompt in a value; without text and problem for one that is no text at all. `conversation` says that text is
    read as a list of what was said, where it is one."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            value = bytes(value).decode("utf-8-sig")
        except UnicodeDecodeError:
            return ExtractedPrompt(problem=BINARY)
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return ExtractedPrompt(str(value)) if math.isfinite(value) else ExtractedPrompt()
    try:
        turns = parse_turns(value)
    except NotJSON:
        return ExtractedPrompt(problem=NOT_JSON)
    if turns:
        return _first_user_turn(turns)
    if isinstance(value, str) and is_conversation:
        value = _parse_list(value)
    if isinstance(value, str):
        text = value.strip()
        return ExtractedPrompt(text) if text else ExtractedPrompt(problem=EMPTY)
    if isinstance(value, (list, tuple)):
        return _first_of_list(value, is_conversation)
    if isinstance(value, Mapping):
        inside = {str(name).lower(): each for name, each in value.items() if not isinstance(each, Mapping)}
        found = (
            extract_from_value(inside[usual], usual in CONVERSATION_COLUMNS)
            for usual in USUAL_COLUMNS
            if usual in inside
        )
        return next((asked for asked in found if asked.text), ExtractedPrompt())
    return ExtractedPrompt()


def _parse_list(text: str) -> Any:
    """The list of strings that a text is as JSON; else the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list) else text


def _first_of_list(texts: Sequence[Any], is_conversation: bool) -> ExtractedPrompt:
    """The first of a list of texts, which are question, answer, question … in a conversation."""
    if not texts:
        return ExtractedPrompt(problem=EMPTY)
    if not all(isinstance(each, str) for each in texts):
        return ExtractedPrompt()
    text = texts[0].strip()
    return (
        ExtractedPrompt(text, None, (LATER_TURNS_DROPPED,) if len(texts) > (2 if is_conversation else 1) else ())
        if text
        else ExtractedPrompt(problem=EMPTY)
    )


def _first_user_turn(turns: list[Turn]) -> ExtractedPrompt:
    number = next((number for number, turn in enumerate(turns) if turn.role == "user" and turn.text.strip()), None)
    if number is None:
        return ExtractedPrompt(problem=NO_USER_TURN)
    before, after = turns[:number], turns[number + 1 :]
    lost = {
        SYSTEM_PROMPT_DROPPED: any(turn.role == "system" and turn.text.strip() for turn in before),
        EARLIER_TURNS_DROPPED: any(turn.role != "system" and turn.text.strip() for turn in before),
        LATER_TURNS_DROPPED: any(turn.role == "user" for turn in after),
        NON_TEXT_DROPPED: not turns[number].is_text_only,
    }
    return ExtractedPrompt(
        turns[number].text.strip(), None, tuple(reason for reason, is_lost in lost.items() if is_lost)
    )
