"""Preference data as lessons: our own log, TRL's layouts, OpenAI's, and whole conversations that differ in their last
answer (UltraFeedback, Anthropic HH). Pure: rows in, lessons out. It does not know files.

Neighbouring rows on the same prompt that belong together become one choice among several answers again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from pydantic import ValidationError

from ...conversation_formats import NotJSON, Turn, turns_of
from ...errors import Invalid, shorten
from ...messages import CHOICE, Choice, Lesson, Option, Prompt, Ranking
from ...text_rules import PROMPT_LIMIT, storable
from ..steering.choices import including_equals

Layout = Literal["raw", "trl-preference", "trl-unpaired", "openai-dpo"]
Row = dict[str, Any]
MOST_OPTIONS = 8
MOST_LESSONS = 20_000
KEYS: dict[Layout, frozenset[str]] = {
    "raw": frozenset({"prompt", "options", "choice"}),
    "openai-dpo": frozenset({"input", "preferred_output", "non_preferred_output"}),
    "trl-preference": frozenset({"chosen", "rejected"}),
    "trl-unpaired": frozenset({"completion", "label"}),
}
PROMPTS = ("prompt", "question", "instruction", "query", "input")
COMPLETIONS = ("completion", "response", "answer", "output")
SYSTEMS = ("system", "system_prompt")
ABOUT = ("input", "context")
GOOD = {"true", "1", "1.0", "+1", "yes", "good", "chosen", "desirable", "positive", "accept", "accepted", "like",
        "thumbs_up", "up"}  # fmt: skip
BAD = {"false", "0", "0.0", "-1", "-1.0", "no", "bad", "rejected", "undesirable", "negative", "reject", "dislike",
       "thumbs_down", "down"}  # fmt: skip


class Unusable(Exception):
    """A row that cannot be a choice; its words say why."""


@dataclass(frozen=True)
class Asked:
    """What a row's answers answer: the last thing a person said, and the system prompt before it."""

    text: str
    system: str = ""


@dataclass
class Read:
    """What a file came to. `left_out` says for each reason how often, and where first."""

    layout: Layout
    lessons: list[Lesson] = field(default_factory=list)
    rows: int = 0
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)

    def leave_out(self, why: str, place: str) -> None:
        count, first = self.left_out.get(why, (0, place))
        self.left_out[why] = (count + 1, first)

    def sentences(self) -> list[str]:
        return [
            f"{count} of {self.rows} rows skipped, the first in {place}: {why}."
            for why, (count, place) in self.left_out.items()
        ]


def lessons_from(
    placed: Iterable[tuple[str, Row]], temperature: float, prompt_of: Callable[[str, str], Prompt]
) -> Read:
    """The lessons of rows with their places, whose layout the first row shows. `prompt_of(text, system)` makes the
    prompts; an empty system prompt is the session's own.

    Rows that cannot be choices (several turns, an empty answer) are left out and counted. Raises Invalid for what is
    no such file, or has no row that can be used.
    """
    found: Read | None = None

    def rows() -> Iterator[tuple[str, Any, Row]]:
        nonlocal found
        for place, row in placed:
            row = _named(row)
            found = found or Read(layout_of(row, place))
            found.rows += 1
            try:
                key = _key(found.layout, row, place)
                yield place, key, row
            except Unusable as why:
                found.leave_out(str(why), place)

    for _, group in groupby(rows(), key=lambda each: each[1]):
        together = [(place, row) for place, _, row in group]
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
                    f"file: has more than {MOST_LESSONS:,} choices, the limit for one training run.",
                    field="file",
                    next_step="Split the file.",
                )
    if found is None:
        raise Invalid("file: is empty.", field="file", next_step="Use a file with one choice per row.")
    if not found.lessons:
        raise Invalid(
            f"file: no usable choices (rows read: {found.rows}). {' '.join(found.sentences())}".strip(),
            field="file",
            next_step="See docs/files.md for the formats.",
        )
    return found


def _named(row: Row) -> Row:
    """A row under the names of our layouts: in small letters, with the usual other words for a prompt, a completion and
    a system prompt."""
    named = {str(name).strip().lower(): value for name, value in row.items()}
    named |= {name: value for name, value in row.items() if name in named}
    if not named.get("prompt") and "preferred_output" not in named and (name := _first(named, PROMPTS)):
        named["prompt"] = named[name]
        about = named.get(_first(named, ABOUT))
        if name == "instruction" and isinstance(named[name], str) and isinstance(about, str) and about.strip():
            named["prompt"] = f"{named[name].strip()}\n\n{about.strip()}"
    if name := _first(named, COMPLETIONS):
        named["completion"] = named[name]
    if name := _first(named, SYSTEMS):
        named["system"] = named[name]
    return named


def _first(row: Row, names: tuple[str, ...]) -> str:
    """The first of some names under which there is anything; empty where there is none."""
    return next((name for name in names if row.get(name)), "")


def layout_of(row: Row, place: str) -> Layout:
    """Which layout a row has, by its keys. Raises Invalid."""
    for layout, keys in KEYS.items():
        if keys <= row.keys():
            return layout
    raise Invalid(
        f"file: unknown format; {place} has the keys {shorten(', '.join(sorted(map(str, row))), 120)}.",
        field="file",
        next_step="Use prompt, chosen, rejected or prompt, completion, label (TRL); input, preferred_output, "
        "non_preferred_output (OpenAI); or choices exported from Trellis.",
    )


def _key(layout: Layout, row: Row, place: str) -> Any:
    """What neighbouring rows of one choice have in common. Raises Unusable for a row that is none of the layout's."""
    if not KEYS[layout] <= row.keys():
        raise Unusable(f"missing {' or '.join(sorted(KEYS[layout] - row.keys()))}")
    if layout == "raw":
        _raw(row)
        return place
    if layout == "trl-unpaired":
        _label(row)
        return _labelled(row)[0]
    asked, better, _ = _pair(layout, row)
    return asked, better


Said = tuple[Asked, tuple[Option, ...], Choice]


def _choices(layout: Layout, rows: list[Row]) -> list[Said]:
    """The choices that rows which belong together make up: one, or more where they are too many for one.
    Raises Unusable."""
    if layout == "raw":
        return [_raw(rows[0])]
    if layout == "trl-unpaired":
        labelled = [(_labelled(row)[1], _label(row)) for row in rows]
        good = [text for text, is_good in labelled if is_good]
        bad = [text for text, is_good in labelled if not is_good]
        asked = _labelled(rows[0])[0]
        if len(rows) <= MOST_OPTIONS:
            options = tuple(_option(text) for text, _ in labelled)
            called = tuple(number for number, (_, is_good) in enumerate(labelled) if is_good)
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


def _label(row: Row) -> bool:
    """Whether an answer was called good: true and false, 1 and 0, or a word for it. Raises Unusable."""
    label = row["label"]
    word = str(label).strip().lower() if isinstance(label, (str, int, float)) else ""
    if word not in GOOD | BAD:
        raise Unusable(f"unknown label {shorten(json.dumps(label))}")
    return word in GOOD


def _pair(layout: Layout, row: Row) -> tuple[Asked, str, str]:
    if layout == "openai-dpo":
        asked = _openais(_parsed(row["input"]))
        better, worse = _text(row["preferred_output"]), _text(row["non_preferred_output"])
    else:
        before, better = _ending(row["chosen"])
        before_worse, worse = _ending(row["rejected"])
        if _same(before) != _same(before_worse):
            raise Unusable("the two answers belong to different conversations")
        asked = _asked(row, before)
    if better == worse:
        raise Unusable("both answers are identical")
    return asked, better, worse


def _labelled(row: Row) -> tuple[Asked, str]:
    """What is asked in a row of one answer with a label, and the answer. Raises Unusable."""
    before, text = _ending(row["completion"])
    return _asked(row, before), text


def _openais(body: Any) -> Asked:
    if not isinstance(body, dict):
        raise Unusable("input is not an object with messages")
    if body.get("tools"):
        raise Unusable("tools are not supported")
    turns = _turns(body.get("messages"))
    if turns is None:
        raise Unusable("input has no list of messages")
    return _question(turns)


def _ending(value: Any) -> tuple[list[Turn], str]:
    """An answer, and the conversation that it ends, where it is given whole. Raises Unusable."""
    turns = _turns(value)
    if turns is None:
        return [], _text(value)
    if not turns or turns[-1].role != "assistant":
        raise Unusable("the conversation does not end with an answer")
    return turns[:-1], _text_of(turns[-1])


def _asked(row: Row, before: list[Turn]) -> Asked:
    """What is asked in a row: its prompt, as text or as messages; or the conversation before its answers, of which the
    prompt, if there is one, must be the question. Raises Unusable."""
    prompt = row.get("prompt")
    if not prompt and not before:
        raise Unusable("it has no prompt, and its answers are not whole conversations")
    turns = _turns(prompt)
    if turns is None and prompt:
        if not isinstance(prompt, str):
            raise Unusable("the prompt is neither text nor a list of messages")
        turns = [Turn("user", prompt)]
    if before and turns:
        without_system = [turn for turn in before if turn.role != "system"]
        if _same(turns) not in (_same(before), _same(without_system), _same(without_system[-1:])):
            raise Unusable("the prompt does not match the conversation of the answers")
    asked = _question(before or turns or [])
    system = row.get("system")
    if isinstance(system, str) and system.strip() and system.strip() != asked.system.strip():
        asked = Asked(asked.text, _text("\n\n".join(part for part in (system, asked.system) if part.strip())))
    return asked


def _same(turns: list[Turn]) -> list[tuple[str, str]]:
    """Turns as they are compared: space around them does not count."""
    return [(turn.role, turn.text.strip()) for turn in turns]


def _question(turns: list[Turn]) -> Asked:
    """The question in turns that are at most a system prompt, then one thing a person says. Raises Unusable."""
    told = [_text_of(turn) for turn in turns if turn.role == "system" and (turn.text.strip() or not turn.whole)]
    said = [turn for turn in turns if turn.role != "system"]
    if len(said) != 1 or said[0].role != "user":
        raise Unusable("multi-turn conversations are not supported")
    return Asked(_text_of(said[0]), _text("\n\n".join(told)) if told else "")


def _turns(value: Any) -> list[Turn] | None:
    try:
        return turns_of(value)
    except NotJSON:
        raise Unusable("a list of messages is not valid JSON") from None


def _parsed(value: Any) -> Any:
    """A cell of a table in which JSON stands as text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _raw(row: Row) -> Said:
    texts, finish = _parsed(row["options"]), _parsed(row.get("finish"))
    if not isinstance(texts, list) or not 1 <= len(texts) <= MOST_OPTIONS:
        raise Unusable(f"it does not have 1 to {MOST_OPTIONS} options")
    ends = finish if isinstance(finish, list) and len(finish) == len(texts) else ["stop"] * len(texts)
    options = tuple(_option(_text(text), end == "stop") for text, end in zip(texts, ends, strict=True))
    try:
        choice = CHOICE.validate_python(_parsed(row["choice"]))
    except ValidationError:
        raise Unusable(f"invalid choice “{shorten(json.dumps(row['choice']))}”") from None
    if choice == "skip":
        raise Unusable("skipped prompts teach nothing")
    named = choice.ranking if isinstance(choice, Ranking) else (choice,) if isinstance(choice, int) else choice
    if isinstance(named, tuple):
        if not all(0 <= index < len(texts) for index in named):
            raise Unusable("the choice refers to a missing option")
        if len(set(named)) != len(named):
            raise Unusable("the choice names an option twice")
    system = row.get("system") or ""
    return Asked(_text(row["prompt"]), _text(system) if system else ""), options, including_equals(choice, options)


def _text_of(turn: Turn) -> str:
    if not turn.whole:
        raise Unusable("a message contains more than text (such as an image or a tool call)")
    return _text(turn.text)


def _text(value: Any) -> str:
    """An answer as text, or as one message. Raises Unusable."""
    turns = None if isinstance(value, str) else _turns(value)
    if turns is not None:
        if len(turns) != 1:
            raise Unusable("an answer is more than one message")
        return _text_of(turns[0])
    if not isinstance(value, str) or not value.strip():
        raise Unusable("a prompt or an answer is empty or not text")
    if len(value) > PROMPT_LIMIT:
        raise Unusable(f"a prompt or an answer is longer than {PROMPT_LIMIT} characters")
    try:
        return storable(value)
    except ValueError:
        raise Unusable("a prompt or an answer has invalid characters") from None


def _option(text: str, ended: bool = True) -> Option:
    return Option(text=text, tokens=(), finish="stop" if ended else "length")
