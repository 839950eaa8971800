"""Preference files as lessons: every layout there and back, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.errors import Invalid
from trellis.messages import Lesson, Prompt, Ranking, Written
from trellis.studio.review.preference_files import MAX_OPTIONS, ParsedPreferences, parse_preferences
from trellis.text_rules import PROMPT_LIMIT


def read(*rows: Any) -> ParsedPreferences:
    placed = [(f"line {number}", json.loads(json.dumps(row))) for number, row in enumerate(rows, 1) if row]
    return parse_preferences(placed, 1.0, lambda text, system: Prompt(text=text, system=system))


def one(*rows: Any) -> Lesson:
    (lesson,) = read(*rows).lessons
    return lesson


def texts(lesson: Lesson) -> list[str]:
    return [option.text for option in lesson.options]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_pairs_on_one_answer_become_one_choice_again() -> None:
    rows = [{"prompt": "Why?", "chosen": "Because.", "rejected": worse} for worse in ("No.", "Hm.", "No.")]
    lesson = one(*rows)
    assert (lesson.prompt.text, texts(lesson), lesson.choice) == ("Why?", ["Because.", "No.", "Hm."], 0)
    assert all(option.tokens == () and option.finish == "stop" for option in lesson.options)


def test_a_conversation_has_its_system_prompt_and_openais_layout_is_the_same() -> None:
    asked = [{"role": "system", "content": "Be kind."}, user("Why?")]
    trl = one({"prompt": asked, "chosen": [answer("Because.")], "rejected": [answer("No.")]})
    openai = one(
        {
            "input": {"messages": asked, "tools": []},
            "preferred_output": [answer("Because.")],
            "non_preferred_output": [answer("No.")],
        }
    )
    assert trl == openai
    assert trl.prompt == Prompt(text="Why?", system="Be kind.")


def test_the_prompt_may_be_the_beginning_of_both_answers() -> None:
    lesson = one({"chosen": [user("Why?"), answer("Because.")], "rejected": [user("Why?"), answer("No.")]})
    assert (lesson.prompt.text, texts(lesson)) == ("Why?", ["Because.", "No."])


def test_labelled_answers_to_one_prompt_become_one_choice() -> None:
    def row(text: str, label: bool, prompt: str = "Why?") -> dict[str, Any]:
        return {"prompt": prompt, "completion": text, "label": label}

    found = read(row("A", False), row("B", True), row("C", True), row("D", False, "How?"), row("E", True, "Who?"))
    assert [(texts(lesson), lesson.choice) for lesson in found.lessons] == [
        (["A", "B", "C"], (1, 2)),
        (["D"], "none"),
        (["E"], 0),
    ]


@pytest.mark.parametrize("choice", [1, [0, 2], "none", {"ranking": [2, 0]}, {"written": "Mine."}])
def test_our_own_log_comes_back_as_it_was(choice: Any) -> None:
    row = {
        "prompt": "Why?", "options": ["A", "B", "C"], "finish": ["stop", "length", "stop"], "choice": choice,
        "system": "Be kind.", "node": "n1", "metrics": None,
    }  # fmt: skip
    lesson = one(row)
    assert lesson.model_dump(mode="json")["choice"] == choice
    assert [option.finish for option in lesson.options] == ["stop", "length", "stop"]
    assert lesson.prompt.system == "Be kind."
    assert isinstance(lesson.choice, int | tuple | str | Ranking | Written)


def test_rows_that_cannot_be_choices_are_left_out_and_counted() -> None:
    good = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    turns = [user("Hello"), answer("Hi"), user("Why?")]
    found = read(
        good,
        good | {"rejected": "Because."},
        "",
        good | {"prompt": turns},
        good | {"prompt": turns[:1] + turns[:1]},
        good | {"chosen": "  "},
        good | {"chosen": 7},
        good | {"chosen": "a\x00b"},
        good | {"chosen": "x" * (PROMPT_LIMIT + 1)},
        good | {"prompt": [["odd"]]},
    )
    assert len(found.lessons) == 1
    assert found.rows == 9
    told = found.sentences()
    assert told[0] == "1 of 9 rows skipped, the first in line 2: both answers are identical."
    assert any(sentence.startswith("2 of 9 rows skipped, the first in line 4: multi-turn") for sentence in told)
    assert len(told) == 6


def test_rows_that_lack_something_or_say_it_oddly_are_left_out() -> None:
    good = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    system = {"role": "system", "content": "x\ud800"}
    found = read(good, {"prompt": "Why?", "chosen": "A"}, good | {"prompt": [system, user("Why?")]})
    assert len(found.lessons) == 1
    assert found.sentences()[0] == "1 of 3 rows skipped, the first in line 2: missing rejected."
    row = {"prompt": "Why?", "completion": "A"}
    found = read(row | {"label": 1}, *(row | {"label": odd} for odd in ("maybe", None, 2, [])))
    assert [lesson.choice for lesson in found.lessons] == [0]
    assert len(found.skipped_rows) == 4
    raw = {"prompt": "Why?", "options": ["A", "B"], "choice": 0}
    assert len(read(raw, raw | {"choice": [0, 0]}, raw | {"choice": {"ranking": [1, 1]}}).lessons) == 1


def test_more_labelled_answers_than_an_offer_holds_make_no_refusal_of_a_choice() -> None:
    rows = [{"prompt": "Why?", "completion": f"B{n}", "label": False} for n in range(9)]
    rows.insert(7, {"prompt": "Why?", "completion": "G", "label": True})
    found = read(*rows).lessons
    assert [lesson.choice for lesson in found] == [0, 0]
    assert all(texts(lesson)[0] == "G" for lesson in found)
    assert sorted(text for lesson in found for text in texts(lesson)[1:]) == [f"B{n}" for n in range(9)]
    assert [lesson.choice for lesson in read(*[row | {"label": False} for row in rows]).lessons] == ["none", "none"]
    assert len(read(*[row | {"label": True} for row in rows]).lessons) == 10


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "is empty"),
        ([{"text": [1, 2]}], "line 1 has the keys text"),
        ([{"prompt": "Why?", "text": "Because."}], "line 1 has the keys prompt, text"),
        ([{"prompt": "Why?", "chosen": "A", "rejected": "A"}], "no usable choices (rows read: 1)"),
        ([{"prompt": "Why?", "options": ["A"], "choice": 4}], "refers to a missing option"),
        ([{"prompt": "Why?", "options": ["A"], "choice": "skip"}], "skipped prompts"),
        ([{"prompt": "Why?", "options": ["A"], "choice": {"odd": 1}}], "invalid choice"),
        ([{"prompt": "Why?", "options": "A", "choice": 0}], "does not have 1 to 8 options"),
        (
            [{"chosen": [user("Why?"), answer("A")], "rejected": [user("How?"), answer("B")]}],
            "belong to different conversations",
        ),
    ],
)
def test_a_file_that_holds_no_choices_is_refused_in_words(rows: list[Any], words: str) -> None:
    with pytest.raises(Invalid, match="file: ") as raised:
        read(*rows)
    assert words in raised.value.message
    assert raised.value.field == "file"


CONTEXT = [user("Why?"), answer("Because."), user("And then?")]
OPENAI = {"preferred_output": "A", "non_preferred_output": "B"}
PAIR = {"chosen": "A", "rejected": "B"}


SYSTEM = {"role": "system", "content": "Be kind."}


def both(*before: dict[str, str]) -> dict[str, Any]:
    """Two whole conversations that differ in their last answer."""
    return {"chosen": [*before, answer("A")], "rejected": [*before, answer("B")]}


def hh(*said: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[number % 2]}: {text}" for number, text in enumerate(said))


@pytest.mark.parametrize(
    ("row", "prompt", "system"),
    [
        ({"prompt": "Why?", **both(user("Why?"))}, "Why?", ""),
        ({"prompt": " Why?\n", **both(user("Why? "))}, "Why? ", ""),
        ({"prompt": "", **both(user("Why?"))}, "Why?", ""),
        ({"prompt": [user("Why?")], **both(user("Why?"))}, "Why?", ""),
        ({"prompt": "Why?", "chosen": answer("A"), "rejected": answer("B")}, "Why?", ""),
        ({"prompt": "Why?", **both(user("Why?")), "chosen": str([user("Why?"), answer("A")])}, "Why?", ""),
        ({"prompt": "Why?", "system": "Be kind.", **PAIR}, "Why?", "Be kind."),
        ({"system": "Be kind.", "question": "Why?", **PAIR}, "Why?", "Be kind."),
        ({"system_prompt": "X", "prompt": [SYSTEM, user("Why?")], **PAIR}, "Why?", "X\n\nBe kind."),
        ({"system": "Be kind.", "prompt": [SYSTEM, user("Why?")], **PAIR}, "Why?", "Be kind."),
        ({"prompt": "Why?", **both(SYSTEM, user("Why?"))}, "Why?", "Be kind."),
        ({"instruction": "Translate.", "input": "Hund", **PAIR}, "Translate.\n\nHund", ""),
        ({"Prompt": "Why?", " Chosen": "A", "REJECTED": "B"}, "Why?", ""),
        ({"chosen": hh("Why?", "A"), "rejected": hh("Why?", "B")}, "Why?", ""),
        ({"prompt": hh("Why?", ""), **PAIR}, "Why?", ""),
        ({"prompt": "<|system|>\nBe kind.</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n", **PAIR}, "Why?", "Be kind."),
        ({"prompt": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", **PAIR}, "Why?", ""),
        ({"prompt": json.dumps([user("Why?")]), **PAIR}, "Why?", ""),
    ],
)  # fmt: skip
def test_pairs_are_read_in_the_layouts_that_people_use(row: dict[str, Any], prompt: str, system: str) -> None:
    lesson = one(row)
    assert (lesson.prompt.text, lesson.prompt.system) == (prompt, system)
    assert (texts(lesson), lesson.choice) == (["A", "B"], 0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Why?", **both(*CONTEXT)}, "does not match the conversation"),
        ({"prompt": "And then?", **both(*CONTEXT)}, "multi-turn"),
        ({"chosen": hh("Why?", "So.", "And?", "A"), "rejected": hh("Why?", "So.", "And?", "B")}, "multi-turn"),
        ({"prompt": hh("Why?", "So.", "And?", ""), **PAIR}, "multi-turn"),
        ({"chosen": hh("Why?", "A"), "rejected": hh("How?", "B")}, "belong to different conversations"),
        ({"prompt": "Why?", **both(user("Why?")), "chosen": [user("Why?")]}, "does not end with an answer"),
        ({"chosen": "A", "rejected": "B"}, "it has no prompt"),
        ({"prompt": 7, **PAIR}, "neither text nor a list of messages"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url"}, "Why?"]}], **PAIR}, "more than text"),
        ({"prompt": "Why?", **PAIR, "chosen": [answer("A") | {"tool_calls": [{}]}]}, "more than text"),
        ({"prompt": "[{'role': 'user'\n 'content': 'Why?'}]", **PAIR}, "a list of messages is not valid JSON"),
        ({"input": {"messages": [user("Why?")], "tools": [{"type": "function"}]}, **OPENAI}, "tools are not supported"),
        ({"input": {"messages": "Why?"}, **OPENAI}, "no list of messages"),
        ({"input": "Why?", **OPENAI}, "not an object with messages"),
    ],
)  # fmt: skip
def test_what_a_lesson_cannot_hold_is_refused_and_not_cut(row: dict[str, Any], words: str) -> None:
    with pytest.raises(Invalid, match=r"no usable choices \(rows read: 1\)") as raised:
        read(row)
    assert words in raised.value.message


@pytest.mark.parametrize(
    ("good", "bad"),
    [(True, False), (1, 0), (1.0, 0.0), (1, -1), ("true", "FALSE"), ("1", "0"), ("Good", "bad"),
     (" chosen ", "rejected"), ("desirable", "undesirable"), ("yes", "no")],
)  # fmt: skip
def test_labels_may_be_words(good: Any, bad: Any) -> None:
    row = {"prompt": "Why?", "completion": "A"}
    assert one(row | {"label": good}).choice == 0
    assert one(row | {"label": bad}).choice == "none"


def test_a_labelled_answer_may_be_a_whole_conversation() -> None:
    whole = [{"role": "system", "content": "Be kind."}, user("Why?"), answer("A")]
    rows = [
        {"completion": whole, "label": True},
        {"prompt": "Why?", "response": "B", "label": "bad", "system": "Be kind."},
    ]
    lesson = one(*rows)
    assert (lesson.prompt, texts(lesson), lesson.choice) == (Prompt(text="Why?", system="Be kind."), ["A", "B"], 0)


def test_our_own_log_comes_back_from_a_table_of_text() -> None:
    row = {"prompt": "Why?", "options": '["A", "B"]', "finish": '["stop", "length"]', "choice": "1"}
    lesson = one(row)
    assert (texts(lesson), lesson.choice, lesson.options[1].finish) == (["A", "B"], 1, "length")
    assert one(row | {"choice": "none"}).choice == "none"
    assert one(row | {"choice": '{"ranking": [1, 0]}'}).choice == Ranking(ranking=(1, 0))


WORDS = st.text("abc é", min_size=1, max_size=8).filter(str.strip)


@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=2, max_size=20, unique=True)), min_size=1, max_size=6))
def test_no_pair_is_lost_or_made_up(log: list[tuple[str, list[str]]]) -> None:
    pairs = [(prompt, answers[0], worse) for prompt, answers in log for worse in answers[1:]]
    found = read(*({"prompt": prompt, "chosen": better, "rejected": worse} for prompt, better, worse in pairs))
    back = {(lesson.prompt.text, texts(lesson)[0], worse) for lesson in found.lessons for worse in texts(lesson)[1:]}
    assert back == set(pairs)
    assert all(2 <= len(lesson.options) <= MAX_OPTIONS and lesson.choice == 0 for lesson in found.lessons)


KEYS = ["prompt", "chosen", "rejected", "completion", "label", "options", "choice", "input", "messages", "role",
        "content", "preferred_output", "non_preferred_output", "system"]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.sampled_from(["", "a", "user", "assistant", "[", hh("a", "b")]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


@given(st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6), max_size=4))
def test_no_row_is_more_than_can_be_told(rows: list[dict[str, Any]]) -> None:
    try:
        found = read(*rows)
    except Invalid as error:
        assert error.message.startswith("file: ")
    else:
        assert found.lessons
        assert sum(count for count, _ in found.skipped_rows.values()) < found.rows
