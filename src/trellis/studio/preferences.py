"""Preference files as lessons: our own log, TRL's two layouts, OpenAI's. Pure: lines in, lessons out.

Neighbouring rows on the same prompt that belong together become one choice among several answers again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from pydantic import ValidationError

from ..errors import Invalid, shorten
from ..messages import CHOICE, Choice, Lesson, Option, Prompt, Ranking
from ..texts import PROMPT_LIMIT, storable
from .choices import including_equals

Layout = Literal["raw", "trl-preference", "trl-unpaired", "openai-dpo"]
MOST_OPTIONS = 8
MOST_LESSONS = 20_000
KEYS: dict[Layout, frozenset[str]] = {
    "raw": frozenset({"prompt", "options", "choice"}),
    "openai-dpo": frozenset({"input", "preferred_output", "non_preferred_output"}),
    "trl-unpaired": frozenset({"prompt", "completion", "label"}),
    "trl-preference": frozenset({"chosen", "rejected"}),
}


class Unusable(Exception):
    """A row that cannot be a choice; its words say why."""


@dataclass(frozen=True)
class Asked:
    """What a row's answers answer: the last thing a person said, and the system prompt before it."""

    text: str
    system: str = ""


@dataclass
class Read:
    """What a file came to. `left_out` says for each reason how often, and in which line first."""

    layout: Layout
    lessons: list[Lesson] = field(default_factory=list)
    rows: int = 0
    left_out: dict[str, tuple[int, int]] = field(default_factory=dict)

    def leave_out(self, why: str, line: int) -> None:
        count, first = self.left_out.get(why, (0, line))
        self.left_out[why] = (count + 1, first)

    def sentences(self) -> list[str]:
        return [
            f"{count} row{'s' if count != 1 else ''} left out, the first in line {first}: {why}."
            for why, (count, first) in self.left_out.items()
        ]


def lessons_from(lines: Iterable[str], temperature: float, prompt_of: Callable[[str, str], Prompt]) -> Read:
    """The lessons of a file of JSON lines, whose layout the first row shows. `prompt_of(text, system)` makes the
    prompts; an empty system prompt is the session's own.

    Rows that cannot be choices (several turns, an empty answer) are left out and counted. Raises Invalid for what is
    no such file, or has no row that can be used.
    """
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    found: Read | None = None

    def rows() -> Iterator[tuple[int, Any, dict[str, Any]]]:
        nonlocal found
        for number, line in numbered:
            row = _parsed(number, line)
            found = found or Read(layout_of(row, number))
            found.rows += 1
            try:
                key = _key(found.layout, row, number)
                yield number, key, row
            except Unusable as why:
                found.leave_out(str(why), number)

    for _, group in groupby(rows(), key=lambda each: each[1]):
        together = [(number, row) for number, _, row in group]
        assert found is not None
        try:
            choices = _choices(found.layout, [row for _, row in together])
        except Unusable as why:
            found.leave_out(str(why), together[0][0])
            continue
        for asked, options, choice in choices:
            prompt = prompt_of(asked.text, asked.system)
            found.lessons.append(Lesson(prompt=prompt, options=options, choice=choice, temperature=temperature))
            if len(found.lessons) > MOST_LESSONS:
                raise Invalid(
                    f"file: has more than {MOST_LESSONS} choices, which is the most that can be learned from at once.",
                    field="file",
                    next_step="Split the file.",
                )
    if found is None:
        raise Invalid("file: is empty.", field="file", next_step="Choose a file with a choice a line.")
    if not found.lessons:
        raise Invalid(
            f"file: none of its {found.rows} rows is a choice. {' '.join(found.sentences())}".strip(),
            field="file",
            next_step="See docs/exports.md for the layouts.",
        )
    return found


def layout_of(row: dict[str, Any], line: int = 1) -> Layout:
    """Which layout a row has, by its keys. Raises Invalid."""
    for layout, keys in KEYS.items():
        if keys <= row.keys():
            return layout
    raise Invalid(
        f"file: line {line} has the keys {shorten(', '.join(sorted(map(str, row))), 120)}; no layout has these.",
        field="file",
        next_step="Use TRL's prompt, chosen, rejected or prompt, completion, label; OpenAI's input, preferred_output, "
        "non_preferred_output; or choices exported by Trellis.",
    )


def _parsed(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise Invalid(
            f"file: line {number} is not a JSON object: “{shorten(line)}”.",
            field="file",
            next_step="Choose a file of JSON lines, one choice a line.",
        )
    return row


def _key(layout: Layout, row: dict[str, Any], number: int) -> Any:
    """What neighbouring rows of one choice have in common. Raises Unusable for a row that is none of the layout's."""
    if not KEYS[layout] <= row.keys():
        raise Unusable(f"it lacks {' or '.join(sorted(KEYS[layout] - row.keys()))}")
    if layout == "raw":
        _raw(row)
        return number
    if layout == "trl-unpaired":
        _text(row["completion"]), _label(row)
        return _asked(row["prompt"])
    asked, better, _ = _pair(layout, row)
    return asked, better


Said = tuple[Asked, tuple[Option, ...], Choice]


def _choices(layout: Layout, rows: list[dict[str, Any]]) -> list[Said]:
    """The choices that rows which belong together make up: one, or more where they are too many for one.
    Raises Unusable."""
    if layout == "raw":
        return [_raw(rows[0])]
    if layout == "trl-unpaired":
        good = [_text(row["completion"]) for row in rows if _label(row)]
        bad = [_text(row["completion"]) for row in rows if not _label(row)]
        asked = _asked(rows[0]["prompt"])
        if len(rows) <= MOST_OPTIONS:
            options = tuple(_option(_text(row["completion"])) for row in rows)
            called = tuple(number for number, row in enumerate(rows) if _label(row))
            return [(asked, options, called if len(called) > 1 else called[0] if called else "none")]
        if not good:
            return [(asked, tuple(map(_option, part)), "none") for part in _parts(bad, MOST_OPTIONS)]
        against = _parts(bad, MOST_OPTIONS - 1) or [[]]
        rounds = max(len(good), len(against))
        return [
            (asked, tuple(map(_option, [good[number % len(good)], *against[number % len(against)]])), 0)
            for number in range(rounds)
        ]
    asked, better, _ = _pair(layout, rows[0])
    worse = list(dict.fromkeys(_pair(layout, row)[2] for row in rows))
    return [(asked, tuple(map(_option, [better, *part])), 0) for part in _parts(worse, MOST_OPTIONS - 1)]


def _parts(texts: list[str], size: int) -> list[list[str]]:
    return [texts[begin : begin + size] for begin in range(0, len(texts), size)]


def _label(row: dict[str, Any]) -> bool:
    """Whether an answer was called good: true and false, or 1 and 0. Raises Unusable."""
    if row["label"] not in (True, False):
        raise Unusable(f"its label is {shorten(json.dumps(row['label']))}, neither true nor false")
    return bool(row["label"])


def _pair(layout: Layout, row: dict[str, Any]) -> tuple[Asked, str, str]:
    if layout == "openai-dpo":
        messages = row["input"].get("messages") if isinstance(row["input"], dict) else None
        asked = _asked(messages)
        better, worse = _text(row["preferred_output"]), _text(row["non_preferred_output"])
    elif "prompt" in row:
        asked, better, worse = _asked(row["prompt"]), _text(row["chosen"]), _text(row["rejected"])
    else:  # TRL's implicit prompt: both hold the whole conversation
        before, after = row["chosen"], row["rejected"]
        if not (isinstance(before, list) and isinstance(after, list) and before[:-1] == after[:-1]):
            raise Unusable("it has no prompt, and the two answers do not end the same conversation")
        asked, better, worse = _asked(before[:-1]), _text(before[-1:]), _text(after[-1:])
    if better == worse:
        raise Unusable("both answers are the same")
    return asked, better, worse


def _raw(row: dict[str, Any]) -> Said:
    texts, finish = row["options"], row.get("finish")
    if not isinstance(texts, list) or not 1 <= len(texts) <= MOST_OPTIONS:
        raise Unusable(f"it does not have 1 to {MOST_OPTIONS} options")
    ends = finish if isinstance(finish, list) and len(finish) == len(texts) else ["stop"] * len(texts)
    options = tuple(_option(_text(text), end == "stop") for text, end in zip(texts, ends, strict=True))
    try:
        choice = CHOICE.validate_python(row["choice"])
    except ValidationError:
        raise Unusable(f"“{shorten(json.dumps(row['choice']))}” is not a choice") from None
    if choice == "skip":
        raise Unusable("it was skipped, which teaches nothing")
    named = choice.ranking if isinstance(choice, Ranking) else (choice,) if isinstance(choice, int) else choice
    if isinstance(named, tuple):
        if not all(0 <= index < len(texts) for index in named):
            raise Unusable("the choice names an option that is not there")
        if len(set(named)) != len(named):
            raise Unusable("the choice names an option twice")
    system = row.get("system") or ""
    return Asked(_text(row["prompt"]), _text(system) if system else ""), options, including_equals(choice, options)


def _asked(prompt: Any) -> Asked:
    """A prompt as text or as messages: at most a system prompt, then one thing a person says."""
    if isinstance(prompt, str):
        return Asked(_text(prompt))
    if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        raise Unusable("its prompt is neither text nor a list of messages")
    told = [_content(turn) for turn in prompt if turn.get("role") in ("system", "developer")]
    system = _text("\n\n".join(told)) if any(map(str.strip, told)) else ""
    said = [turn for turn in prompt if turn.get("role") not in ("system", "developer")]
    if len(said) != 1 or said[0].get("role") != "user":
        raise Unusable("its conversation has several turns; only one question and its answers can be learned from")
    return Asked(_text(_content(said[0])), system)


def _text(value: Any) -> str:
    """An answer as text, or as one message. Raises Unusable."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict):
            raise Unusable("an answer is not one message")
        value = _content(value[0])
    if not isinstance(value, str) or not value.strip():
        raise Unusable("a prompt or an answer is empty or not text")
    if len(value) > PROMPT_LIMIT:
        raise Unusable(f"a prompt or an answer is longer than {PROMPT_LIMIT} characters")
    try:
        return storable(value)
    except ValueError:
        raise Unusable("a prompt or an answer has characters that cannot be stored") from None


def _content(turn: dict[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, list):  # OpenAI's parts
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        raise Unusable("a message has no text")
    return content


def _option(text: str, ended: bool = True) -> Option:
    return Option(text=text, tokens=(), finish="stop" if ended else "length")
