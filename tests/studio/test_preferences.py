"""Preference files as lessons: every layout there and back, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.errors import Invalid
from trellis.messages import Lesson, Prompt, Ranking, Written
from trellis.studio.preferences import MOST_OPTIONS, Read, lessons_from
from trellis.texts import PROMPT_LIMIT


def read(*rows: Any) -> Read:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return lessons_from(lines, 1.0, lambda text, system: Prompt(text=text, system=system))


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
    assert told[0] == "1 row left out, the first in line 2: both answers are the same."
    assert any(sentence.startswith("2 rows left out, the first in line 4: its conversation has") for sentence in told)
    assert len(told) == 6


def test_rows_that_lack_something_or_say_it_oddly_are_left_out() -> None:
    good = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    system = {"role": "system", "content": "x\ud800"}
    found = read(good, {"prompt": "Why?", "chosen": "A"}, good | {"prompt": [system, user("Why?")]})
    assert len(found.lessons) == 1
    assert found.sentences()[0] == "1 row left out, the first in line 2: it lacks rejected."
    row = {"prompt": "Why?", "completion": "A"}
    found = read(row | {"label": 1}, *(row | {"label": odd} for odd in ("true", None, 2, [])))
    assert [lesson.choice for lesson in found.lessons] == [0]
    assert len(found.left_out) == 4
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
        (["", "  "], "is empty"),
        (["{nope"], "line 1 is not a JSON object"),
        (["[" * 100_000], "line 1 is not a JSON object"),
        (["[1, 2]"], "line 1 is not a JSON object"),
        ([{"prompt": "Why?", "text": "Because."}], "line 1 has the keys prompt, text"),
        ([{"prompt": "Why?", "chosen": "A", "rejected": "A"}], "none of its 1 rows is a choice"),
        ([{"prompt": "Why?", "options": ["A"], "choice": 4}], "names an option that is not there"),
        ([{"prompt": "Why?", "options": ["A"], "choice": "skip"}], "was skipped"),
        ([{"prompt": "Why?", "options": ["A"], "choice": {"odd": 1}}], "is not a choice"),
        ([{"prompt": "Why?", "options": "A", "choice": 0}], "does not have 1 to 8 options"),
        ([{"chosen": [user("Why?"), answer("A")], "rejected": [user("How?"), answer("B")]}], "do not end the same"),
    ],
)
def test_a_file_that_holds_no_choices_is_refused_in_words(rows: list[Any], words: str) -> None:
    with pytest.raises(Invalid, match="file: ") as raised:
        read(*rows)
    assert words in raised.value.message
    assert raised.value.field == "file"


WORDS = st.text("abc é", min_size=1, max_size=8).filter(str.strip)


@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=2, max_size=20, unique=True)), min_size=1, max_size=6))
def test_no_pair_is_lost_or_made_up(log: list[tuple[str, list[str]]]) -> None:
    pairs = [(prompt, answers[0], worse) for prompt, answers in log for worse in answers[1:]]
    found = read(*({"prompt": prompt, "chosen": better, "rejected": worse} for prompt, better, worse in pairs))
    back = {(lesson.prompt.text, texts(lesson)[0], worse) for lesson in found.lessons for worse in texts(lesson)[1:]}
    assert back == set(pairs)
    assert all(2 <= len(lesson.options) <= MOST_OPTIONS and lesson.choice == 0 for lesson in found.lessons)
