"""Markdown as HTML that is safe to show, whoever wrote it: rendered without raw HTML, highlighted, then sanitised.

Text that grows is rendered block by block, each once, when it is whole. It imports nothing of ours.
"""

from __future__ import annotations

import re
from functools import lru_cache
from html import escape

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

QUICK = frozenset({
    "python", "pycon", "json", "toml", "bash", "sql", "diff", "rust", "c", "cpp", "kotlin", "swift", "scala", "ruby",
    "php", "lua", "r", "julia", "haskell", "elixir", "erlang", "clojure", "dart", "zig", "nim", "matlab", "latex",
    "markdown", "docker", "cmake", "nginx", "graphql", "protobuf", "scss", "powershell",
})  # fmt: skip
SLOW = frozenset({"javascript", "jsx", "html", "xml", "css", "yaml", "ini", "console", "go", "perl", "ocaml"})
LIKE = {"typescript": "javascript", "tsx": "jsx", "java": "cpp", "csharp": "cpp", "json5": "json", "make": "bash"}
"""Languages that are coloured. A lexer is a set of regular expressions that nobody timed on text that is made to hold
them up: those here were (docs/log.md). What is not among them is coloured as something like it, or shown plain."""

QUICKLY, SLOWLY = 8000, 4000
"""Characters of one piece of code that are coloured; more is shown plain."""

LONGEST = 20_000
"""Characters of one block that are read as Markdown; a longer one is shown as it was written."""

MOST_OPENERS, MOST_BARS = 200, 2000
"""Openings of formulas, and bars of tables, that are looked at in one block: both are quadratic work."""

THINK = "<think>"
THOUGHT = "</think>"

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ITEM = re.compile(r" {0,3}([-*+]|\d{1,9}[.)])(\s|$)")
_SPANS = HtmlFormatter(nowrap=True)
_WASTE = re.compile(r"(?:[ \t]*\n){6}|[ \t]{120}")
"""Long runs of nothing, which hold many lexers up and show nothing."""

_LANGUAGE = re.compile(r"[A-Za-z0-9+#._-]{1,30}")


def _code(text: str, language: str, attributes: str) -> str:
    """Code in a frame that says which language it is in, coloured where that is known. Both are escaped."""
    name = language if _LANGUAGE.fullmatch(language) else ""
    lexer = _lexer(name.lower()) if len(text) <= QUICKLY and not _WASTE.search(text) else None
    if lexer and len(text) > SLOWLY and lexer.aliases[0] in SLOW:
        lexer = None
    inside = highlight(text, lexer, _SPANS) if lexer else escape(text)
    return f'<pre data-lang="{name}"><code>{inside}</code></pre>'


@lru_cache(maxsize=256)
def _lexer(name: str) -> Lexer | None:
    """How a language is read, where that is known and quick."""
    try:
        lexer = get_lexer_by_name(name, stripnl=False) if name else None
        kind = lexer.aliases[0] if lexer else ""
        if kind in LIKE:
            lexer, kind = get_lexer_by_name(LIKE[kind], stripnl=False), LIKE[kind]
    except ClassNotFound:
        return None
    return lexer if kind in QUICK or kind in SLOW else None


_MATHS = {
    "math_inline": ("$", "$"), "math_inline_double": ("$$", "$$"), "math_block": ("$$", "$$"),
    "math_block_eqno": ("$$", "$$"),
}  # fmt: skip


def _keep_maths(self: object, tokens: list[object], index: int, options: object, env: object) -> str:
    """Formulas as they were written: nobody sets them here, and what reads like TeX must not be eaten as Markdown."""
    token = tokens[index]
    left, right = _MATHS[token.type]  # type: ignore[attr-defined]
    block = "block" in token.type  # type: ignore[attr-defined]
    inside = f'<span class="maths">{escape(left + token.content + right)}</span>'  # type: ignore[attr-defined]
    return f"<p>{inside}</p>" if block else inside


def _parser(maths: bool, tables: bool) -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "highlight": _code}).enable("strikethrough").disable("image")
    if tables:
        parser.enable("table")
    if maths:
        parser.use(dollarmath_plugin, allow_labels=False, allow_digits=False, double_inline=True)
        parser.use(texmath_plugin, delimiters="brackets")
    for kind in _MATHS:
        parser.add_render_rule(kind, _keep_maths)
    return parser


_PARSERS = {(maths, tables): _parser(maths, tables) for maths in (True, False) for tables in (True, False)}


def to_html(text: str) -> str:
    """No images (a picture's address can carry data out), no raw HTML, links that tell nobody where they were."""
    if len(text) > LONGEST:
        return f'<p class="plain">{escape(text)}</p>'
    openers = text.count("\\(") + text.count("\\[") + text.count("$")
    lines = text.count("\n")
    wide = max((line.count("|") for line in text.split("\n", 200)), default=0)
    parser = _PARSERS[openers <= MOST_OPENERS, max(text.count("|"), wide * lines) <= MOST_BARS]
    return nh3.clean(
        parser.render(text),
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https"},
        link_rel="noopener noreferrer nofollow",
    )


def block_to_html(text: str) -> str:
    """One block. What a model thought before it spoke is folded."""
    opened = text.lstrip()
    if not opened.startswith(THINK):
        return to_html(text)
    thought, _, rest = opened.removeprefix(THINK).partition(THOUGHT)
    inside, after = to_html(thought.strip()), to_html(rest)
    return f'<details class="thought"><summary>What it thought first</summary>{inside}</details>{after}'


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
