"""Markdown as HTML that is safe to show, whoever wrote it: rendered without raw HTML, highlighted, then sanitised.

Text that grows is rendered block by block, each once, when it is whole. It imports nothing of ours.
"""

from __future__ import annotations

import re
from functools import lru_cache

import nh3
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.texmath import texmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

_TAGS = {"p", "h1", "h2", "h3", "h4", "blockquote", "strong", "em", "code", "pre", "ul", "ol", "li", "hr", "br", "a",
         "table", "thead", "tbody", "tr", "th", "td", "s", "span"}  # fmt: skip
_ATTRIBUTES = {"a": {"href"}, "span": {"class"}, "pre": {"data-lang"}, "ol": {"start"}}

HIGHLIGHTED = 50_000
"""Characters of one piece of code that are coloured; more is shown plain."""

THINK = "<think>"
THOUGHT = "</think>"

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ITEM = re.compile(r" {0,3}([-*+]|\d{1,9}[.)])(\s|$)")
_SPANS = HtmlFormatter(nowrap=True)
_LANGUAGE = re.compile(r"[A-Za-z0-9+#._-]{1,30}")


def _code(text: str, language: str, attributes: str) -> str:
    """Code in a frame that says which language it is in, coloured where that is known. Both are escaped."""
    name = language if _LANGUAGE.fullmatch(language) else ""
    lexer = _lexer(name) if len(text) <= HIGHLIGHTED else None
    inside = highlight(text, lexer, _SPANS) if lexer else nh3.clean_text(text)
    return f'<pre data-lang="{name}"><code>{inside}</code></pre>'


@lru_cache(maxsize=64)
def _lexer(name: str) -> Lexer | None:
    """How a language is read, where that is known."""
    try:
        return get_lexer_by_name(name, stripnl=False) if name else None
    except ClassNotFound:
        return None


_MARKDOWN = (
    MarkdownIt("commonmark", {"html": False, "highlight": _code})
    .enable(["table", "strikethrough"])
    .disable("image")
    .use(dollarmath_plugin, allow_labels=False, allow_digits=False, double_inline=True)
    .use(texmath_plugin, delimiters="brackets")
)


def _keep_maths(self: object, tokens: list[object], index: int, options: object, env: object) -> str:
    """Formulas as they were written: nobody sets them here, and what reads like TeX must not be eaten as Markdown."""
    token = tokens[index]
    left, right = _MATHS[token.type]  # type: ignore[attr-defined]
    block = "block" in token.type  # type: ignore[attr-defined]
    inside = f'<span class="maths">{nh3.clean_text(left + token.content + right)}</span>'  # type: ignore[attr-defined]
    return f"<p>{inside}</p>" if block else inside


_MATHS = {
    "math_inline": ("$", "$"), "math_inline_double": ("$$", "$$"), "math_block": ("$$", "$$"),
    "math_block_eqno": ("$$", "$$"),
}  # fmt: skip
for _kind in _MATHS:
    _MARKDOWN.add_render_rule(_kind, _keep_maths)


def to_html(text: str) -> str:
    """No images (a picture's address can carry data out), no raw HTML, links that tell nobody where they were."""
    return nh3.clean(
        _MARKDOWN.render(text),
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https"},
        link_rel="noopener noreferrer nofollow",
    )


def block_to_html(text: str) -> str:
    """One block. What a model thought before it spoke is folded."""
    if not text.startswith(THINK):
        return to_html(text)
    thought = to_html(text.removeprefix(THINK).strip().removesuffix(THOUGHT))
    return f'<details class="thought"><summary>What it thought first</summary>{thought}</details>'


def blocks_to_html(text: str) -> str:
    """A whole text, as its blocks would have been shown one after the other."""
    blocks = Blocks()
    return "".join(map(block_to_html, [*blocks.feed(text), blocks.rest()]))


class Blocks:
    """Cuts Markdown that grows into whole blocks, in linear time. `end` is how many characters they hold so far."""

    def __init__(self) -> None:
        self.end = 0
        self._line: list[str] = []
        """The pieces of a line that is not whole yet."""
        self._block: list[str] = []
        self._fence = ""
        self._in_list = False
        self._gap = False
        """Whether an empty line has come, after which the block may still go on."""
        self._thinks: bool | None = None

    def feed(self, text: str) -> list[str]:
        """The blocks that are whole now."""
        self._line.append(text)
        if "\n" not in text:
            return []
        *lines, last = "".join(self._line).split("\n")
        self._line = [last]
        return [block for line in lines for block in self._take(f"{line}\n")]

    def rest(self) -> str:
        """What is left when no more comes."""
        block = "".join(self._block + self._line)
        self._block, self._line = [], []
        self.end += len(block)
        return block

    def _take(self, line: str) -> list[str]:
        if self._thinks is None and line.strip():
            self._thinks = line.lstrip().startswith(THINK)
        self._block.append(line)
        if self._thinks:
            if THOUGHT in line:
                self._thinks = False
                return self._cut(len(self._block))
            return []
        if self._fence:
            closes = line.strip()
            if closes.startswith(self._fence) and not closes.strip(self._fence[0]):
                self._fence = ""
                return [] if self._in_list else self._cut(len(self._block))
            return []
        if not line.strip():
            self._gap = True
            # Of a list or a quote it is not known yet whether it goes on; all else has ended.
            return [] if self._in_list else self._cut(len(self._block))
        whole: list[str] = []
        goes_on = line.startswith((" ", "\t")) or _ITEM.match(line)
        if self._in_list and self._gap and not goes_on:
            whole = self._cut(len(self._block) - 1)
        self._gap = False
        if fence := _FENCE.match(line.lstrip() if self._in_list else line):
            if not self._in_list:
                whole += self._cut(len(self._block) - 1)
            self._fence = fence[1]
        elif len(self._block) == 1:
            self._in_list = bool(_ITEM.match(line))
        return whole

    def _cut(self, lines: int) -> list[str]:
        block, self._block = "".join(self._block[:lines]), self._block[lines:]
        self._in_list = self._gap = False
        self.end += len(block)
        return [block] if block else []
