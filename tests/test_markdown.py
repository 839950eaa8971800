"""Markdown that grows: cut into whole blocks in linear time, each rendered once, and nothing of it is ever markup."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.markdown import Blocks, block_to_html, blocks_to_html

PIECES = st.sampled_from([
    "a *b*", "\n", "\n\n", "- one\n", "  deeper\n", "3. three\n", "```python\n", "```\n", "~~~\n", "$x_1$", "> said\n",
    "| a | b |\n|---|---|\n", "<think>\n", "</think>\n", "\\[ a \\]", "# Title\n", "    code\n", "<b>", "🌱",
    "![x](http://e/)",
])  # fmt: skip
TEXTS = st.lists(PIECES, max_size=30).map("".join)


@given(TEXTS, st.randoms(use_true_random=False))
def test_blocks_are_the_text_however_it_comes(text: str, chance: object) -> None:
    whole = Blocks()
    expected = [*whole.feed(text), whole.rest()]
    assert "".join(expected) == text
    assert whole.end == len(text)
    pieces = Blocks()
    found: list[str] = []
    at = 0
    while at < len(text):
        size = chance.randint(1, 5)  # type: ignore[attr-defined]
        found += pieces.feed(text[at : at + size])
        assert pieces.end == len("".join(found))
        at += size
    assert [*found, pieces.rest()] == expected


@given(TEXTS)
def test_no_text_becomes_markup(text: str) -> None:
    html = blocks_to_html(text)
    assert "<b>" not in html
    assert "<img" not in html
    assert not re.search(r"<(script|iframe|style)", html)


def test_a_fence_is_one_block_and_coloured() -> None:
    blocks = Blocks()
    assert blocks.feed("Look:\n```python\ndef f():\n\n    return 1\n") == ["Look:\n"]
    (code,) = blocks.feed("```\nmore")
    assert 'data-lang="python"' in block_to_html(code)
    assert '<span class="k">def</span>' in block_to_html(code)
    assert blocks.rest() == "more"


def test_a_list_with_gaps_is_one_block() -> None:
    blocks = Blocks()
    assert blocks.feed("1. one\n\n   still\n\n2. two\n\nafter\n") == ["1. one\n\n   still\n\n2. two\n\n"]
    assert block_to_html("1. one\n\n   still\n\n2. two\n\n").count("<ol>") == 1


def test_what_was_thought_is_folded() -> None:
    blocks = Blocks()
    assert blocks.feed("<think>\nOne.\n\nTwo.\n") == []
    (thought,) = blocks.feed("</think>\nSo: 2.\n")
    html = block_to_html(thought)
    assert html.startswith("<details")
    assert html.count("<p>") == 2
    assert "think&gt;" not in html


@pytest.mark.parametrize("maths", ["$a_1 * b_2 * c$", r"\(a_1 * b * c\)", "$$\n\\sum_i x_i * y_i * z\n$$"])
def test_formulas_stay_as_they_were_written(maths: str) -> None:
    html = block_to_html(f"So {maths} holds." if "\n" not in maths else maths)
    assert "<em>" not in html
    assert maths.strip("$\\()").strip() in html


@pytest.mark.parametrize("language", ['"><script>', "no such language", "python onload=x", "x" * 50])
def test_the_name_of_a_language_is_no_markup(language: str) -> None:
    html = block_to_html(f"```{language}\nx = 1\n```\n")
    assert "<script" not in html
    assert "onload" not in re.sub(r">[^<]*<", "><", html)
    assert "x = 1" in re.sub(r"<[^>]*>", "", html)


HOSTILE = [
    "```mcschema\n" + "‹!--" * 2000 + "\n```", "```xpp\n" + "a\n" * 4000 + "```", "```java\n" + "\n" * 8000 + "```",
    "```csharp\n" + "a\n" * 4000 + "```", "\\(" * 10_000, "\\[" * 10_000, "$" * 10_000, "![" * 10_000, "[" * 10_000,
    "|" * 4000 + "\n" + "-|" * 4000 + "\n" + "a\n" * 3000, "|a|b|\n|-|-|\n" + "|\n" * 6000, "*a_" * 6000, "`" * 19_999,
    "> " * 5000, "- " * 5000, "<" * 19_000, "&" * 19_000, "x" * 3_000_000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_that_is_made_to_hold_the_renderer_up_does_not(text: str) -> None:
    """In a process that is ended if it takes a hundred times as long as it should."""
    program = "import sys; from trellis.markdown import blocks_to_html; print(len(blocks_to_html(sys.stdin.read())))"
    done = subprocess.run(
        [sys.executable, "-c", program], input=text.encode(), capture_output=True, timeout=60, check=True
    )  # fmt: skip
    assert int(done.stdout) > 0


def test_what_follows_a_thought_on_its_line_is_the_answer() -> None:
    html = block_to_html("<think>a</think> hello *world*\n")
    assert html.endswith("</details><p>hello <em>world</em></p>\n")
    assert block_to_html(" <think>a</think>").startswith("<details")


def test_code_that_nobody_timed_is_shown_plain() -> None:
    assert "<span" not in block_to_html("```brainfuck\n+++\n```")
    assert "<span" in block_to_html("```typescript\nconst a = 1\n```")
    assert "<span" not in block_to_html("```python\n" + "x = 1\n" * 5000 + "```")


def test_a_block_that_is_too_long_is_shown_as_it_was_written() -> None:
    html = block_to_html("*a* <b> " * 5000)
    assert html.startswith('<p class="plain">*a* &lt;b&gt;')
