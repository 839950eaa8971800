"""Markdown as HTML that is safe to show, whoever wrote it: rendered without raw HTML, highlighted, then sanitised.

Text that grows is rendered piece by piece, each once, when it is whole (`markdown_blocks.py`); what is defined after it
is used (references, footnotes) is shown when all has come. It does not know what is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from html import escape
from itertools import accumulate
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore, block, normalize
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.footnote import footnote_plugin
from mdit_py_plugins.footnote.index import footnote_tail
from mdit_py_plugins.gfm_autolink import gfm_autolink_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from .markdown_blocks import THINK_CLOSE, THINK_OPEN, BlockSplitter

_TAGS = {"p", "h1", "h2", "h3", "h4", "blockquote", "strong", "em", "code", "pre", "ul", "ol", "li", "hr", "br", "a",
         "table", "thead", "tbody", "tr", "th", "td", "s", "span", "sup"}  # fmt: skip
_ATTRIBUTES = {"a": {"href"}, "span": {"class"}, "pre": {"data-lang"}, "ol": {"start"}, "p": {"class"}}

FAST_LEXERS = frozenset({
    "python", "pycon", "json", "toml", "bash", "sql", "diff", "rust", "c", "cpp", "kotlin", "swift", "scala", "ruby",
    "php", "lua", "r", "julia", "haskell", "elixir", "erlang", "clojure", "dart", "zig", "nim", "matlab", "latex",
    "markdown", "docker", "cmake", "nginx", "graphql", "protobuf", "scss", "powershell",
})  # fmt: skip
SLOW_LEXERS = frozenset({"javascript", "jsx", "html", "xml", "css", "yaml", "ini", "console", "go", "perl", "ocaml"})
SUBSTITUTE_LEXERS = {
    "typescript": "javascript",
    "tsx": "jsx",
    "java": "cpp",
    "csharp": "cpp",
    "json5": "json",
    "make": "bash",
}
"""Languages that are coloured. A lexer is a set of regular expressions that nobody timed on text that is made to hold
them up: those here were (docs/log.md). What is not among them is coloured as something like it, or shown plain."""

FAST_LEXER_LIMIT, SLOW_LEXER_LIMIT = 8000, 4000
"""Characters of one piece of code that are coloured; more is shown plain."""

MAX_BLOCK_LENGTH = 20_000
"""Characters of one block that are read as Markdown; a longer one is shown as it was written."""

MAX_FORMULA_OPENERS, MAX_TABLE_BARS = 200, 2000
"""Openings of formulas, and bars of tables, that are looked at in one block: both are quadratic work."""

MAX_REFERENCE_CHARACTERS = 500_000
"""Characters of addresses that the references of one text bring into it: a short text could grow without bounds."""

_CODE_FORMATTER = HtmlFormatter(nowrap=True)
_LONG_BLANKS = re.compile(r"(?:[ \t]*\n){6}|[ \t]{120}")
"""Long runs of nothing, which hold many lexers up and show nothing."""

_LANGUAGE_NAME = re.compile(r"[A-Za-z0-9+#._-]{1,30}")


def _render_code(text: str, language: str, attributes: str) -> str:
    """Code in a frame that says which language it is in, coloured where that is known. Both are escaped."""
    name = language if _LANGUAGE_NAME.fullmatch(language) else ""
    lexer = _find_lexer(name.lower()) if len(text) <= FAST_LEXER_LIMIT and not _LONG_BLANKS.search(text) else None
    if lexer and len(text) > SLOW_LEXER_LIMIT and lexer.aliases[0] in SLOW_LEXERS:
        lexer = None
    inside = highlight(text, lexer, _CODE_FORMATTER) if lexer else escape(text)
    return f'<pre data-lang="{name}"><code>{inside}</code></pre>'


@lru_cache(maxsize=256)
def _find_lexer(name: str) -> Lexer | None:
    """Return the lexer of a language, if it is known and fast."""
    try:
        lexer = get_lexer_by_name(name, stripnl=False) if name else None
        kind = lexer.aliases[0] if lexer else ""
        if kind in SUBSTITUTE_LEXERS:
            lexer, kind = get_lexer_by_name(SUBSTITUTE_LEXERS[kind], stripnl=False), SUBSTITUTE_LEXERS[kind]
    except ClassNotFound:
        return None
    return lexer if kind in FAST_LEXERS or kind in SLOW_LEXERS else None


_FORMULA_DELIMITERS = {
    "math_inline": ("$", "$"), "math_inline_double": ("$$", "$$"), "math_block": ("$$", "$$"),
    "math_inline_bracket": ("\\(", "\\)"), "math_display_bracket": ("\\[", "\\]"),
    "math_block_bracket": ("\\[", "\\]"),
}  # fmt: skip


def _render_formula(self: object, tokens: list[Token], index: int, options: object, env: object) -> str:
    """Formulas, kept as text: they are not typeset here, and TeX must not be parsed as Markdown."""
    left, right = _FORMULA_DELIMITERS[tokens[index].type]
    inside = f'<span class="maths">{escape(left + tokens[index].content + right)}</span>'
    return f"<p>{inside}</p>\n" if "block" in tokens[index].type else inside


def _parse_inline_formula(state: StateInline, silent: bool) -> bool:
    r"""Formulas between \( and \), or \[ and \]."""
    kind = {"\\(": "math_inline_bracket", "\\[": "math_display_bracket"}.get(state.src[state.pos : state.pos + 2])
    if kind is None:
        return False
    end = state.src.find(_FORMULA_DELIMITERS[kind][1], state.pos + 2, state.posMax)
    if end <= state.pos + 2:
        return False
    if not silent:
        state.push(kind, "math", 0).content = state.src[state.pos + 2 : end]
    state.pos = end + 2
    return True


def _parse_block_formula(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    r"""Formulas between \[ and \] that have lines of their own, without empty ones between them."""
    if state.is_code_block(start) or not state.src.startswith("\\[", state.bMarks[start] + state.tShift[start]):
        return False
    line = start
    while True:
        text = state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]].strip()
        if "\\]" in (text[2:] if line == start else text):
            break
        line += 1
        if line >= end or state.isEmpty(line) or state.sCount[line] < state.blkIndent:
            return False
    if not text.endswith("\\]"):
        return False
    if not silent:
        content = state.getLines(start, line + 1, state.blkIndent, False).strip()
        token = state.push("math_block_bracket", "math", 0)
        token.content, token.map = content[2:-2], [start, line + 1]
    state.line = line + 1
    return True


def _replace_task_boxes(state: StateCore) -> None:
    """Boxes of task lists, as the characters for them."""
    for at, token in enumerate(state.tokens[:-2]):
        if token.type != "list_item_open" or state.tokens[at + 1].type != "paragraph_open":
            continue
        children = state.tokens[at + 2].children or []
        if children and children[0].type == "text" and (box := _TASK_BOX.match(children[0].content)):
            children[0].content = ("☐ " if box[1] == " " else "☑ ") + children[0].content[box.end() :]


_TASK_BOX = re.compile(r"\[([ xX])\][ \t]+(?=\S)")


def _render_footnote_number(self: object, tokens: list[Token], index: int, options: object, env: object) -> str:
    return f"<sup>{tokens[index].meta['id'] + 1}</sup>"


def _render_plain(self: object, tokens: list[Token], index: int, options: object, env: object) -> str:
    return f'<p class="plain">{escape(tokens[index].content)}</p>'


_FOOTNOTE_RULES: dict[str, Callable[..., str]] = {
    "footnote_ref": _render_footnote_number, "footnote_anchor": lambda *_: "", "footnote_open": lambda *_: "<li>",
    "footnote_close": lambda *_: "</li>\n", "footnote_block_open": lambda *_: "<hr>\n<ol>\n",
    "footnote_block_close": lambda *_: "</ol>\n",
}  # fmt: skip
"""Footnotes stand at the end, under their numbers. They are not links: a page has many texts with the same numbers."""


def _make_parser(formulas: bool, tables: bool) -> MarkdownIt:
    parser = (
        MarkdownIt("commonmark", {"html": False, "highlight": _render_code}).enable("strikethrough").disable("image")
    )
    parser.use(gfm_autolink_plugin).use(footnote_plugin, inline=False, move_to_end=False)
    parser.core.ruler.push("tasks", _replace_task_boxes)
    if tables:
        parser.enable("table")
    if formulas:
        parser.use(
            dollarmath_plugin, allow_labels=False, allow_digits=False, double_inline=True, allow_blank_lines=False
        )
        parser.inline.ruler.before("escape", "brackets", _parse_inline_formula)
        parser.block.ruler.before(
            "fence", "brackets", _parse_block_formula, {"alt": ["paragraph", "reference", "blockquote"]}
        )
    for kind in _FORMULA_DELIMITERS:
        parser.add_render_rule(kind, _render_formula)
    for kind, rule in _FOOTNOTE_RULES.items():
        parser.add_render_rule(kind, rule)
    parser.add_render_rule("too_long", _render_plain)
    return parser


_PARSERS = {(maths, tables): _make_parser(maths, tables) for maths in (True, False) for tables in (True, False)}


def _parser_for(text: str) -> MarkdownIt:
    """The parser for a piece, without what would take too long in it."""
    openers = text.count("\\(") + text.count("\\[") + text.count("$")
    lines = text.count("\n")
    wide = max((line.count("|") for line in text.split("\n", 200)), default=0)
    return _PARSERS[openers <= MAX_FORMULA_OPENERS, max(text.count("|"), wide * lines) <= MAX_TABLE_BARS]


class _LimitedReferences(dict[str, Any]):
    """Reference definitions. Links to a long address become text once it has been repeated often."""

    _characters = 0

    def get(self, label: str, default: Any = None) -> Any:
        found = super().get(label, default)
        if found:
            self._characters += len(found["href"]) + len(found["title"])
        return found if self._characters <= MAX_REFERENCE_CHARACTERS else default


def to_html(text: str) -> str:
    """Render one block: no images (an address can leak data), no raw HTML, links without a referrer."""
    return _pieces_to_html([text])


def _pieces_to_html(pieces: Sequence[str]) -> str:
    """The pieces of a text as HTML. Each is read by itself, but what one defines holds in all of them."""
    env: dict[str, Any] = {}
    states = [StateCore(piece, _parser_for(piece), env) for piece in pieces]
    for state in states:
        normalize(state)
        if len(state.src) > MAX_BLOCK_LENGTH:
            state.tokens.append(Token("too_long", "", 0, content=state.src))
        else:
            block(state)
    if "references" in env:
        env["references"] = _LimitedReferences(env["references"])
    for state in states:
        for rule in state.md.core.ruler.getRules(""):
            if rule not in (normalize, block):
                rule(state)
    whole = StateCore("", _PARSERS[True, True], env, [token for state in states for token in state.tokens])
    footnote_tail(whole)
    return nh3.clean(
        whole.md.renderer.render(whole.tokens, whole.md.options, env),
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )


def block_to_html(text: str) -> str:
    """Render one block of an answer; a thought is folded."""
    opened = text.lstrip()
    if not opened.startswith(THINK_OPEN):
        return to_html(text)
    thought, _, rest = opened.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    return thought_to_html(thought) + to_html(rest)


def thought_to_html(text: str) -> str:
    """Render a thought, with or without its tags, folded."""
    text = text.strip().removeprefix(THINK_OPEN).removesuffix(THINK_CLOSE).strip()
    inside = _pieces_to_html(split_pieces(text))
    return f'<details class="thought"><summary>What it thought first</summary>{inside}</details>'


def split_pieces(text: str) -> list[str]:
    blocks = BlockSplitter()
    return [*blocks.feed(text), *blocks.flush()]


def text_to_html(text: str) -> str:
    """A whole text: what it thought first, folded, and the rest."""
    blocks = BlockSplitter()
    pieces = [*blocks.feed(text), *blocks.flush()]
    if blocks.implied_thought_length:
        return thought_to_html(text[: blocks.implied_thought_length]) + _pieces_to_html(
            _pieces_after(pieces, blocks.implied_thought_length)
        )
    if pieces and pieces[0].lstrip().startswith(THINK_OPEN):
        thought, rest = pieces[0], pieces[1:]
        return thought_to_html(thought) + (_pieces_to_html(rest) if rest else "")
    return _pieces_to_html(pieces)


def _pieces_after(pieces: list[str], characters: int) -> list[str]:
    """Return the blocks after a number of characters."""
    ends = accumulate(map(len, pieces))
    return [piece for piece, end in zip(pieces, ends, strict=True) if end > characters]


DEFINITION_PATTERN = re.compile(r"^[ >\t]{0,8}\[[^\]\n]+\]:", re.MULTILINE)


def needs_full_render(text: str) -> bool:
    """Whether a text may show otherwise as a whole than piece by piece: something may be defined after it is used."""
    return DEFINITION_PATTERN.search(text) is not None
