"""Markdown that grows: cut where CommonMark would read the same, rendered once, and nothing of it is ever markup."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trellis.markdown import block_to_html, needs_full_render, split_pieces, text_to_html, to_html
from trellis.markdown_blocks import THINK_CLOSE, BlockSplitter

LINES = st.sampled_from([
    "a *b*", "more words", "- one", "- ", "* two", "+ three", "  deeper", "  - nested", "    - more nested", "3. three",
    "1. one", "2) two", "10. ten", "   under a number", "```python", "```", "````", "  ```", "   ```", "    ```", "~~~",
    "$x_1$", "$$", "$$ a $$", "\\[", "\\]", "  \\[", "- \\[", "- $$", "> said", "> - said", "> ```", ">", "| a | b |",
    "|---|---|", "- | -", "a | b", "# Title", "===", "---", "- - -", "***", "    code", "\tcode", "        deep code",
    "[ref]: /url", "[^1]: note", "    note goes on", "see [ref] and[^1]", "- [ ] do", "- [x] done", "<b>", "🌱",
    "![x](http://e/)", "http://example.org/a_b", "\\[ a \\] b", "-\tx", " - x", "   - y", "1.", "", "", "", "", " ",
    "\u00a0", "a  ", "\r", "x\r```", "`", "``` a ` b", "- ```", "1. ```sh", "- # h", "- > q", "-     code", "\\- no",
])  # fmt: skip
TEXTS = st.lists(LINES, max_size=14).map("\n".join)


def visible(html: str) -> str:
    """HTML without line breaks between elements, which nobody sees."""
    return re.sub(r"\s*\n\s*(?=<)|(?<=>)\s*\n\s*", "", html)


@settings(max_examples=600, deadline=None)
@given(TEXTS)
@example("a | b\n- | -\n\n  ```\n\nx")
@example("para\n2. foo\n  ```\ncode\n\nmore\n  ```\n\nend")
@example("- a\n\n      code\n\n  ```\n  x\n\n  y\n  ```\n\nb")
@example("-\n\n  ```\n\nx")
@example("- $$\n```\n$$\n\nx")
@example("$$\n-\tx\n- [x] done\n\n  ```\n\nx\n")
@example("- $$\n***\n$$ a $$\n  ```\n````\n\\]\n1. ```sh\n<b>\n \n\\- no\n$x_1$")
def test_piece_by_piece_shows_what_the_whole_shows(text: str) -> None:
    """One at a time where nothing is defined later; all together always."""
    whole = visible(to_html(text))
    assert visible(text_to_html(text)) == whole
    if not needs_full_render(text):
        assert visible("".join(map(block_to_html, split_pieces(text)))) == whole


CORPUS = {
    "code in an item": "Steps:\n- one\n\n  ```python\n  x = 1\n\n  y = 2\n  ```\n- two\n",
    "code in a numbered item": "1. Do this:\n\n   ```bash\n   make\n\n   make test\n   ```\n\n2. Then that.\n\nDone.\n",
    "bullets under numbers": "Plan:\n1. **One**\n\n   - a\n\n   - b\n\n2. **Two**\n   - c\n\nEnd.\n",
    "a loose list": "- a\n\n- b\n\n- c\n\nText.\n",
    "a tight list": "- a\n- b\n  - c\n\nText.\n",
    "paragraphs in an item": "* a\n\n  still a\n\n  and still\n\n* b\n",
    "a list after a paragraph": "Text:\n* a\n\n  more of a\n* b\n",
    "indented code with gaps": "    a = 1\n\n    b = 2\n\nText.\n",
    "a quote with a list": "> - a\n>\n>   b\n> - c\n\nText\n",
    "code in a quote": "> ```\n> a\n>\n> b\n> ```\n\nText.\n",
    "a setext heading": "Title\n=====\n\nSub\n---\n\nText.\n",
    "a table in an item": "- look\n\n  | a | b |\n  |---|---|\n  | 1 | 2 |\n\n- b\n",
    "a long fence": "````md\n```\ncode\n```\n\nmore\n````\n\nText.\n",
    "a tilde fence": "~~~\n```\n\na\n~~~\nText.\n",
    "inline backticks at the start": "```a``` is code\n\nText with ```b```.\n\nMore.\n",
    "references before": "[a]: https://example.org\n\nSee [a].\n",
    "references after": "See [a] and [b][].\n\n[a]: https://example.org 'T'\n[B]: <https://example.com>\n",
    "footnotes": "One[^1], two[^two].\n\nA.\n\n[^1]: First.\n\n[^two]: Second,\n    longer.\n\n    And more.\n\nEnd.\n",
    "a footnote in a list": "- a[^x]\n- b\n\n[^x]: Note.\n",
    "a reference in a quote": "> [q]: https://q.example\n\nSee [q].\n",
    "formulas of several lines": "So:\n\\[\na\n= b\n+ c\n\\]\nand\n$$\nx\n- y\n$$\nEnd.\n",
    "a formula in an item": "1. Then\n   \\[\n   a + b\n   \\]\n2. Next\n",
    "words after a formula": "\\[ a_1 * b_2 * c \\] where a is *big*.\n",
    "raw html": "<div>\n\n*a*\n\n</div>\n",
    "rules": "a\n\n---\n\n* * *\n\n- - -\nb\n",
    "tabs": "-\ta\n\n\tb\n-\tc\n",
    "carriage returns": "- a\r\n\r\n  b\r\n\r\nc\r\n",
    "tasks": "- [ ] open\n- [x] done\n  - [X] below\n1. [ ] numbered\n- [link](https://e.org)\n",
    "a lazy item": "- a\nlazy\n\n  in the item\n\nout\n",
    "an item that is code": "- ```\n  a\n\n  b\n  ```\n\nText.\n",
    "a fence that never closes": "Text\n\n```py\na\n\nb\n",
    "a number in a text": "It was\n2026. A year.\n\nText.\n",
    "nested quotes": "> a\n> > b\n\n> c\nlazy\n\nd\n",
    "deep nesting": "- a\n  1. b\n\n     - c\n\n       ```\n       d\n\n       e\n       ```\n\n  2. f\n- g\n\nh\n",
}


@pytest.mark.parametrize("name", CORPUS)
def test_what_models_write_is_shown_as_the_whole_would_be(name: str) -> None:
    text = CORPUS[name]
    whole = visible(to_html(text))
    assert visible(text_to_html(text)) == whole
    if not needs_full_render(text):
        assert visible("".join(map(block_to_html, split_pieces(text)))) == whole


@given(TEXTS, st.randoms(use_true_random=False))
def test_pieces_are_the_text_however_it_comes(text: str, chance: random.Random) -> None:
    whole = BlockSplitter()
    expected = [*whole.feed(text), *whole.flush()]
    assert "".join(expected) == text
    assert whole.consumed == len(text)
    pieces = BlockSplitter()
    found: list[str] = []
    at = 0
    while at < len(text):
        size = chance.randint(1, 5)
        found += pieces.feed(text[at : at + size])
        assert pieces.consumed == len("".join(found))
        at += size
    assert [*found, *pieces.flush()] == expected


@given(TEXTS)
def test_no_text_becomes_markup(text: str) -> None:
    html = text_to_html(text)
    assert "<b>" not in html
    assert "<img" not in html
    assert not re.search(r"<(script|iframe|style)", html)


def test_a_fence_is_one_piece_and_coloured() -> None:
    blocks = BlockSplitter()
    assert blocks.feed("Look:\n```python\ndef f():\n\n    return 1\n") == ["Look:\n"]
    (code,) = blocks.feed("```\nmore")
    assert 'data-lang="python"' in block_to_html(code)
    assert '<span class="k">def</span>' in block_to_html(code)
    assert blocks.flush() == ["more"]


def test_a_list_with_gaps_is_one_piece_and_paragraphs_are_not() -> None:
    blocks = BlockSplitter()
    listed = "1. one\n\n   still\n\n2. two\n\n"
    assert blocks.feed(f"{listed}after\n\nthat\n\n") == [listed, "after\n\n"]
    assert block_to_html(listed).count("<ol>") == 1


def test_references_and_footnotes_are_found_wherever_they_are_defined() -> None:
    html = text_to_html(CORPUS["references after"])
    assert html.count("<a href=") == 2
    notes = text_to_html(CORPUS["footnotes"])
    assert "<sup>1</sup>" in notes
    assert notes.rindex("<ol>") > notes.index("End.")
    assert notes.count("<li>") == 2
    assert "[^" not in notes


def test_bare_addresses_are_links_and_boxes_of_tasks_are_boxes() -> None:
    html = to_html("See https://example.org/a_b?c=d*e, www.example.org (or http://x.org/).")
    assert 'href="https://example.org/a_b?c=d*e"' in html
    assert 'href="http://x.org/"' in html
    assert html.count('rel="noopener noreferrer nofollow"') == 3
    assert "href" not in to_html("`https://example.org` javascript:alert(1) data:text/html,x")
    tasks = to_html(CORPUS["tasks"])
    assert re.findall("[☐☑]", tasks) == ["☐", "☑", "☑", "☐"]
    assert "[ ]" not in tasks


def test_nothing_after_a_formula_is_lost() -> None:
    html = to_html(CORPUS["words after a formula"])
    assert r"\[ a_1 * b_2 * c \]" in html
    assert "where a is <em>big</em>." in html


def test_what_was_thought_is_folded() -> None:
    blocks = BlockSplitter()
    assert blocks.feed("<think>\nOne.\n\nTwo.\n") == []
    (thought,) = blocks.feed("</think>\nSo: 2.\n")
    html = block_to_html(thought)
    assert html.startswith("<details")
    assert html.count("<p>") == 2
    assert "think&gt;" not in html


def test_a_thought_that_the_template_opened_is_folded_when_it_ends() -> None:
    text = "Let me see.\n\n- one\n\nSo.\n</think>\n\nThe *answer*.\n\nMore.\n"
    blocks = BlockSplitter()
    pieces = [*blocks.feed(text), *blocks.flush()]
    assert text[blocks.implied_thought_length :].lstrip() == text[text.index("The") :]
    assert "".join(pieces) == text
    html = text_to_html(text)
    assert html.startswith("<details")
    assert html.endswith("</details><p>The <em>answer</em>.</p>\n<p>More.</p>\n")
    assert html.count(THINK_CLOSE) == 0
    assert "think&gt;" not in html


@pytest.mark.parametrize("text", [
    "The tag `</think>` ends it.", "```\n</think>\n```\n", "Write </think> there, and go on.", "`</think>`",
])  # fmt: skip
def test_who_speaks_of_the_tag_does_not_end_a_thought(text: str) -> None:
    assert "<details" not in text_to_html(text)


def test_what_follows_a_thought_on_its_line_is_the_answer() -> None:
    for text in ("<think>a</think> hello *world*\nand more\n", "a\n</think> hello *world*\nand more\n"):
        assert text_to_html(text).endswith("</details><p>hello <em>world</em>\nand more</p>\n")
    assert text_to_html(" <think>a</think>").startswith("<details")
    assert "".join(map(block_to_html, split_pieces("<think>a</think>    b\n- c\n"))) == text_to_html(
        "<think>a</think>    b\n- c\n"
    )


@pytest.mark.parametrize("maths", [r"$a_1 * b_2 * c$", r"\(a_1 * b * c\)", "$$\n\\sum_i x_i * y_i * z\n$$"])
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
    "\\[\n" * 6000, "- \\[\n" * 4000, "[^1]" * 4000 + "\n\n[^1]: x", "[^1]: " * 3000, "".join(f"[^{n}]: x\n\n" for n in
    range(1500)) + "".join(f"[^{n}]" for n in range(1500)), "".join(f"[{n}]: /u\n\n" for n in range(2000)),
    "http://" * 2500, "www." * 4500, "w" * 19_000, "a@" * 9000, "http://a" + "(" * 9000 + ")" * 9000, "&a;" * 6000,
    "https://a.b/" + "&amp;" * 3500, "- [ ] " * 3000, "a@" + "b." * 9000, ("- a\n" * 2000 + "\n") * 3, "1. " * 6000,
    "x\r" * 9000, "```\n" * 5000, "- ```\n" * 4000, "</think>\n" * 4000, "\n" * 100_000 + "x", "_" * 19_000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_that_is_made_to_hold_the_renderer_up_does_not(text: str) -> None:
    """In a process that is ended if it takes a hundred times as long as it should."""
    program = "import sys; from trellis.markdown import text_to_html; print(len(text_to_html(sys.stdin.read())))"
    done = subprocess.run(
        [sys.executable, "-c", program], input=text.encode(), capture_output=True, timeout=60, check=True
    )  # fmt: skip
    assert done.stdout.strip().isdigit()


def test_code_that_nobody_timed_is_shown_plain() -> None:
    assert "<span" not in block_to_html("```brainfuck\n+++\n```")
    assert "<span" in block_to_html("```typescript\nconst a = 1\n```")
    assert "<span" not in block_to_html("```python\n" + "x = 1\n" * 5000 + "```")


def test_a_piece_that_is_too_long_is_shown_as_it_was_written() -> None:
    html = block_to_html("*a* <b> " * 5000)
    assert html.startswith('<p class="plain">*a* &lt;b&gt;')


@pytest.mark.parametrize(
    "line", ["- a\nb\n", "> a\n2. b\n\n", "```\n", "  - x\n\n", "\\[\n", "</think>\n", "[^1]: x\n"]
)
def test_cutting_takes_time_in_proportion_to_the_text(line: str) -> None:
    def seconds(lines: int) -> float:
        blocks, started = BlockSplitter(), time.process_time()
        for _ in range(lines):
            blocks.feed(line)
        blocks.flush()
        assert blocks.consumed == lines * len(line)
        return time.process_time() - started

    assert seconds(40_000) < 10 * seconds(5_000) + 0.5, "eight times the text; with the square of it, 64 times"


@pytest.mark.parametrize("definition", ["[a]: /{long}", "[a]: /u '{long}'"])
def test_a_short_text_does_not_become_endless_by_references(definition: str) -> None:
    text = definition.format(long="u" * 15_000) + "\n\n" + "\n\n".join("[a] " * 4000 for _ in range(12))
    html = text_to_html(text)
    assert len(html) < 2_000_000
    assert html.count(">a</a>") > 20
    assert html.endswith("[a] [a]</p>\n")


def test_many_short_references_are_all_links() -> None:
    assert text_to_html("[a]: /u\n\n" + "\n\n".join("[a] " * 4000 for _ in range(10))).count("</a>") == 40_000
