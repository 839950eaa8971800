"""Parse preference files into lessons: our own log, TRL's layouts, OpenAI's, and conversations that differ in their
last answer (UltraFeedback, Anthropic HH). Pure: rows in, lessons out. It does not know files.

Neighbouring rows of the same prompt become one choice among several answers again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from pydantic import ValidationError

from ...conversation_formats import NotJSON, Turn, parse_turns
from ...errors import Invalid, shorten
from ...messages import CHOICE, Choice, Lesson, Option, Prompt, Ranking
from ...text_rules import PROMPT_LIMIT, require_storable
from ..steering import with_equal_options

Layout = Literal["raw", "trl-preference", "trl-unpaired", "openai-dpo"]
Row = dict[str, Any]
MAX_OPTIONS = 8
MAX_LESSONS = 20_000
LAYOUT_KEYS: dict[Layout, frozenset[str]] = {
    "raw": frozenset({"prompt", "options", "choice"}),
    "openai-dpo": frozenset({"input", "preferred_output", "non_preferred_output"}),
    "trl-preference": frozenset({"chosen", "rejected"}),
    "trl-unpaired": frozenset({"completion", "label"}),
}
PROMPT_KEYS = ("prompt", "question", "instruction", "query", "input")
COMPLETION_KEYS = ("completion", "response", "answer", "output")
SYSTEM_KEYS = ("system", "system_prompt")
CONTEXT_KEYS = ("input", "context")
GOOD_LABELS = {"true", "1", "1.0", "+1", "yes", "good", "chosen", "desirable", "positive", "accept", "accepted", "like",
        "thumbs_up", "up"}  # fmt: skip
BAD_LABELS = {"false", "0", "0.0", "-1", "-1.0", "no", "bad", "rejected", "undesirable", "negative", "reject",
"dislike",
       "thumbs_down", "down"}  # fmt: skip


class UnusableRow(Exception):
    """A row that is not a choice; the message says why."""


@dataclass(frozen=True)
class Question:
    """The question of a row: the last user message, and the system prompt before it."""

    text: str
    system: str = ""


@dataclass
class ParsedPreferences:
    """The result of a file. `skipped_rows` has for each reason its count and first location."""

    layout: Layout
    lessons: list[Lesson] = field(default_factory=list)
    rows: int = 0
    skipped_rows: dict[str, tuple[int, str]] = field(default_factory=dict)

    def skip_row(self, reason: str, location: str) -> None:
        count, first = self.skipped_rows.get(reason, (0, location))
        self.skipped_rows[reason] = (count + 1, first)

    def sentences(self) -> list[str]:
        return [
            f"{count} of {self.rows} rows skipped, the first in {place}: {why}."
            for why, (count, place) in self.skipped_rows.items()
        ]


def parse_preferences(
    located_rows: Iterable[tuple[str, Row]], temperature: float, make_prompt: Callable[[str, str], Prompt]
) -> ParsedPreferences:
    """Parse located rows; the first one shows the layout. `make_prompt(text, system)` makes the prompts; an empty
    system prompt is the session's own.

    Rows that are no choices (several turns, an empty answer) are skipped and counted. Raise Invalid for any other file,
    and for one without usable rows.
    """
    parsed: ParsedPreferences | None = None

    def rows() -> Iterator[tuple[str, Any, Row]]:
        nonlocal parsed
        for place, row in located_rows:
            row = _normalize_keys(row)
            parsed = parsed or ParsedPreferences(detect_layout(row, place))
            parsed.rows += 1
            try:
                key = _group_key(parsed.layout, row, place)
                yield place, key, row
            except UnusableRow as why:
                parsed.skip_row(str(why), place)

    for _, group in groupby(rows(), key=lambda each: each[1]):
        group_rows = [(place, row) for place, _, row in group]
        assert parsed is not None
        try:
            choices = _choices_of_group(parsed.layout, [row for _, row in group_rows])
        except UnusableRow as why:
            parsed.skip_row(str(why), group_rows[0][0])
            continue
        for question, options, choice in choices:
            prompt = make_prompt(question.text, question.system)
            parsed.lessons.append(Lesson(prompt=prompt, options=options, choice=choice, temperature=temperature))
            if len(parsed.lessons) > MAX_LESSONS:
                raise Invalid(
                    f"file: has more than {MAX_LESSONS:,} choices, the limit for one training run.",
                    field="file",
                    next_step="Split the file.",
                )
    if parsed is None:
        raise Invalid("file: is empty.", field="file", next_step="Use a file with one choice per row.")
    if not parsed.lessons:
        raise Invalid(
            f"file: no usable choices (rows read: {parsed.rows}). {' '.join(parsed.sentences())}".strip(),
            field="file",
            next_step="See docs/files.md for the formats.",
        )
    return parsed


def _normalize_keys(row: Row) -> Row:
    """Rename the keys of a row to those of our layouts: lower case, common synonyms of prompt, completion and system
    prompt."""
    named = {str(name).strip().lower(): value for name, value in row.items()}
    named |= {name: value for name, value in row.items() if name in named}
    if not named.get("prompt") and "preferred_output" not in named and (name := _first_filled_key(named, PROMPT_KEYS)):
        named["prompt"] = named[name]
        context = named.get(_first_filled_key(named, CONTEXT_KEYS))
        if name == "instruction" and isinstance(named[name], str) and isinstance(context, str) and context.strip():
            named["prompt"] = f"{named[name].strip()}\n\n{context.strip()}"
    if name := _first_filled_key(named, COMPLETION_KEYS):
        named["completion"] = named[name]
    if name := _first_filled_key(named, SYSTEM_KEYS):
        named["system"] = named[name]
    return named


def _first_filled_key(row: Row, names: tuple[str, ...]) -> str:
    """Return the first key with a non-empty value; empty where there is none."""
    return next((name for name in names if row.get(name)), "")


def detect_layout(row: Row, location: str) -> Layout:
    """Return the layout of a row, by its keys. Raise Invalid."""
    for layout, keys in LAYOUT_KEYS.items():
        if keys <= row.keys():
            return layout
    raise Invalid(
        f"file: unknown format; {location} has the keys {shorten(', '.join(sorted(map(str, row))), 120)}.",
        field="file",
        next_step="Use prompt, chosen, rejected or prompt, completion, label (TRL); input, preferred_output, "
        "non_preferred_output (OpenAI); or choices exported from Trellis.",
    )


def _group_key(layout: Layout, row: Row, location: str) -> Any:
    """Return the key that the neighbouring rows of one choice share. Raise UnusableRow."""
    if not LAYOUT_KEYS[layout] <= row.keys():
        raise UnusableRow(f"missing {' or '.join(sorted(LAYOUT_KEYS[layout] - row.keys()))}")
    if layout == "raw":
        _parse_raw_row(row)
        return location
    if layout == "trl-unpaired":
        _parse_label(row)
        return _parse_labelled_answer(row)[0]
    question, better, _ = _parse_pair(layout, row)
    return question, better


ParsedChoice = tuple[Question, tuple[Option, ...], Choice]


def _choices_of_group(layout: Layout, rows: list[Row]) -> list[ParsedChoice]:
    """Return the choices of rows that belong together: one, or more where there are too many answers for one. Raise
    UnusableRow."""
    if layout == "raw":
        return [_parse_raw_row(rows[0])]
    if layout == "trl-unpaired":
        labelled = [(_parse_labelled_answer(row)[1], _parse_label(row)) for row in rows]
        good = [text for text, is_good in labelled if is_good]
        bad = [text for text, is_good in labelled if not is_good]
        question = _parse_labelled_answer(rows[0])[0]
        if len(rows) <= MAX_OPTIONS:
            options = tuple(_make_option(text) for text, _ in labelled)
            good_indexes = tuple(number for number, (_, is_good) in enumerate(labelled) if is_good)
            return [
                (
                    question,
                    options,
                    good_indexes if len(good_indexes) > 1 else good_indexes[0] if good_indexes else "none",
                )
            ]
        if not good:
            return [(question, tuple(map(_make_option, part)), "none") for part in _chunks(bad, MAX_OPTIONS)]
        bad_chunks = _chunks(bad, MAX_OPTIONS - 1) or [[]]
        rounds = max(len(good), len(bad_chunks))
        return [
            (question, tuple(map(_make_option, [good[number % len(good)], *bad_chunks[number % len(bad_chunks)]])), 0)
            for number in range(rounds)
        ]
    question, better, _ = _parse_pair(layout, rows[0])
    worse = list(dict.fromkeys(_parse_pair(layout, row)[2] for row in rows))
    return [(question, tuple(map(_make_option, [better, *part])), 0) for part in _chunks(worse, MAX_OPTIONS - 1)]


def _chunks(texts: list[str], size: int) -> list[list[str]]:
    return [texts[begin : begin + size] for begin in range(0, len(texts), size)]


def _parse_label(row: Row) -> bool:
    """Return whether a label says good: true or false, 1 or 0, or a word. Raise UnusableRow."""
    label = row["label"]
    word = str(label).strip().lower() if isinstance(label, (str, int, float)) else ""
    if word not in GOOD_LABELS | BAD_LABELS:
        raise UnusableRow(f"unknown label {shorten(json.dumps(label))}")
    return word in GOOD_LABELS


def _parse_pair(layout: Layout, row: Row) -> tuple[Question, str, str]:
    if layout == "openai-dpo":
        question = _parse_openai_input(_parse_json_cell(row["input"]))
        better, worse = _require_text(row["preferred_output"]), _require_text(row["non_preferred_output"])
    else:
        before, better = _split_last_answer(row["chosen"])
        before_worse, worse = _split_last_answer(row["rejected"])
        if _comparable(before) != _comparable(before_worse):
            raise UnusableRow("the two answers belong to different conversations")
        question = _parse_question(row, before)
    if better == worse:
        raise UnusableRow("both answers are identical")
    return question, better, worse


def _parse_labelled_answer(row: Row) -> tuple[Question, str]:
    """Return question and answer of a labelled row. Raise UnusableRow."""
    before, text = _split_last_answer(row["completion"])
    return _parse_question(row, before), text


def _parse_openai_input(body: Any) -> Question:
    if not isinstance(body, dict):
        raise UnusableRow("input is not an object with messages")
    if body.get("tools"):
        raise UnusableRow("tools are not supported")
    turns = _turns_or_none(body.get("messages"))
    if turns is None:
        raise UnusableRow("input has no list of messages")
    return _question_from_turns(turns)


def _split_last_answer(value: Any) -> tuple[list[Turn], str]:
    """Return the conversation before an answer (empty where only the answer is given), and the answer. Raise
    UnusableRow."""
    turns = _turns_or_none(value)
    if turns is None:
        return [], _require_text(value)
    if not turns or turns[-1].role != "assistant":
        raise UnusableRow("the conversation does not end with an answer")
    return turns[:-1], _turn_text(turns[-1])


def _parse_question(row: Row, earlier_turns: list[Turn]) -> Question:
    """Return the question of a row: its prompt, or the conversation before its answers. Where both are given, they
    must agree. Raise UnusableRow."""
    prompt = row.get("prompt")
    if not prompt and not earlier_turns:
        raise UnusableRow("it has no prompt, and its answers are not whole conversations")
    turns = _turns_or_none(prompt)
    if turns is None and prompt:
        if not isinstance(prompt, str):
            raise UnusableRow("the prompt is neither text nor a list of messages")
        turns = [Turn("user", prompt)]
    if earlier_turns and turns:
        without_system = [turn for turn in earlier_turns if turn.role != "system"]
        if _comparable(turns) not in (
            _comparable(earlier_turns),
            _comparable(without_system),
            _comparable(without_system[-1:]),
        ):
            raise UnusableRow("the prompt does not match the conversation of the answers")
    question = _question_from_turns(earlier_turns or turns or [])
    system = row.get("system")
    if isinstance(system, str) and system.strip() and system.strip() != question.system.strip():
        question = Question(
            question.text, _require_text("\n\n".join(part for part in (system, question.system) if part.strip()))
        )
    return question


def _comparable(turns: list[Turn]) -> list[tuple[str, str]]:
    """Return turns for comparison, ignoring surrounding space."""
    return [(turn.role, turn.text.strip()) for turn in turns]


def _question_from_turns(turns: list[Turn]) -> Question:
    """Return the question of turns that are an optional system prompt and one user message. Raise UnusableRow."""
    system_texts = [
        _turn_text(turn) for turn in turns if turn.role == "system" and (turn.text.strip() or not turn.is_text_only)
    ]
    other_turns = [turn for turn in turns if turn.role != "system"]
    if len(other_turns) != 1 or other_turns[0].role != "user":
        raise UnusableRow("multi-turn conversations are not supported")
    return Question(_turn_text(other_turns[0]), _require_text("\n\n".join(system_texts)) if system_texts else "")


def _turns_or_none(value: Any) -> list[Turn] | None:
    try:
        return parse_turns(value)
    except NotJSON:
        raise UnusableRow("a list of messages is not valid JSON") from None


def _parse_json_cell(value: Any) -> Any:
    """Parse JSON that stands as text in a table; return other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _parse_raw_row(row: Row) -> ParsedChoice:
    texts, finish = _parse_json_cell(row["options"]), _parse_json_cell(row.get("finish"))
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_OPTIONS:
        raise UnusableRow(f"it does not have 1 to {MAX_OPTIONS} options")
    ends = finish if isinstance(finish, list) and len(finish) == len(texts) else ["stop"] * len(texts)
    options = tuple(_make_option(_require_text(text), end == "stop") for text, end in zip(texts, ends, strict=True))
    try:
        choice = CHOICE.validate_python(_parse_json_cell(row["choice"]))
    except ValidationError:
        raise UnusableRow(f"invalid choice “{shorten(json.dumps(row['choice']))}”") from None
    if choice == "skip":
        raise UnusableRow("skipped prompts teach nothing")
    chosen_indexes = choice.ranking if isinstance(choice, Ranking) else (choice,) if isinstance(choice, int) else choice
    if isinstance(chosen_indexes, tuple):
        if not all(0 <= index < len(texts) for index in chosen_indexes):
            raise UnusableRow("the choice refers to a missing option")
        if len(set(chosen_indexes)) != len(chosen_indexes):
            raise UnusableRow("the choice names an option twice")
    system = row.get("system") or ""
    return (
        Question(_require_text(row["prompt"]), _require_text(system) if system else ""),
        options,
        with_equal_options(choice, options),
    )


def _turn_text(turn: Turn) -> str:
    if not turn.is_text_only:
        raise UnusableRow("a message contains more than text (such as an image or a tool call)")
    return _require_text(turn.text)


def _require_text(value: Any) -> str:
    """Return an answer given as text or as one message. Raise UnusableRow."""
    turns = None if isinstance(value, str) else _turns_or_none(value)
    if turns is not None:
        if len(turns) != 1:
            raise UnusableRow("an answer is more than one message")
        return _turn_text(turns[0])
    if not isinstance(value, str) or not value.strip():
        raise UnusableRow("a prompt or an answer is empty or not text")
    if len(value) > PROMPT_LIMIT:
        raise UnusableRow(f"a prompt or an answer is longer than {PROMPT_LIMIT} characters")
    try:
        return require_storable(value)
    except ValueError:
        raise UnusableRow("a prompt or an answer has invalid characters") from None


def _make_option(text: str, is_complete: bool = True) -> Option:
    return Option(text=text, tokens=(), finish="stop" if is_complete else "length")
