"""Which column of a table holds the prompts, and the prompt in a row. It does not know files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import Invalid, shorten

USUAL = ("prompt", "question", "instruction", "query", "messages", "conversations", "conversation", "dialog",
         "problem", "goal", "task", "input", "text", "content", "sentence", "chosen")  # fmt: skip
"""Names under which datasets keep their prompts, the surest first."""

ASKED_BY = {"user", "human", "prompter"}


def column_of(wanted: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The column to take, from a name or from the first rows. Raises Invalid, which lists what there is."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    listed = ", ".join(f"“{shorten(name)}”" for name in columns[:40]) or "none"
    if wanted:
        if wanted not in columns:
            raise Invalid(
                f"There is no column “{shorten(wanted)}”. The columns are {listed}.",
                field="dataset.column", next_step="Name one of them, or leave it empty.",
            )  # fmt: skip
        if not any(prompt_in(row, wanted) for row in rows):
            raise Invalid(
                f"The column “{shorten(wanted)}” holds no text in its first rows. The columns are {listed}.",
                field="dataset.column", next_step="Name a column with text or with chat messages.",
            )  # fmt: skip
        return wanted
    by_name = {name.lower().strip(): name for name in columns}
    for usual in USUAL:
        if usual in by_name and any(prompt_in(row, by_name[usual]) for row in rows):
            return by_name[usual]
    texts = [name for name in columns if any(prompt_in(row, name) for row in rows)]
    if len(texts) == 1:
        return texts[0]
    raise Invalid(
        f"No column has one of the usual names. The columns are {listed}.",
        field="dataset.column", next_step="Name the column that holds the prompts.",
    )  # fmt: skip


def prompt_in(row: Mapping[str, Any], column: str) -> str:
    """The prompt of a row: text as it is, of a conversation what was first asked; empty where there is none."""
    value = row.get(column)
    text = asked_in(value)
    if column.lower() == "instruction" and text and isinstance(extra := row.get("input"), str) and extra.strip():
        return f"{text}\n\n{extra.strip()}"  # the layout of Alpaca: an instruction, and what it is about
    return text


def asked_in(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (list, tuple)):
        for turn in value:
            if isinstance(turn, Mapping):
                who = str(turn.get("role", turn.get("from", ""))).lower()
                said = turn.get("content", turn.get("value"))
                if who in ASKED_BY and (text := _said(said)):
                    return text
        if value and isinstance(value[0], str):
            return str(value[0]).strip()
    return ""


def _said(content: Any) -> str:
    """What a turn says: text, or the text among its parts."""
    if isinstance(content, str):
        return content.strip()
    if isinstance(content, (list, tuple)):
        parts = [part.get("text", "") for part in content if isinstance(part, Mapping)]
        return "\n".join(part for part in parts if isinstance(part, str) and part).strip()
    return ""
