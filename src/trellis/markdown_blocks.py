"""Cut Markdown that grows into pieces that can be rendered one by one, as CommonMark reads the whole, in linear time.

A piece ends only where no container can still be open, whatever comes next; where that is not certain, it goes on. It
imports nothing of ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

_FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})")
_LIST_ITEM = re.compile(r"([-*+]|(\d{1,9})[.)])(?:([ \t]+)(?=(\S?))|$)")
_THEMATIC_BREAK = re.compile(r"([-*_])[ \t]*(?:\1[ \t]*){2,}$")
_HEADING = re.compile(r"#{1,6}(?:[ \t]|$)")
_TABLE_DELIMITER_ROW = re.compile(r"[-+*:| \t]+$")
"""What stands under the head of a table."""
_FOOTNOTE = re.compile(r"\[\^[^\]\s]+\]:")
_FORMULA_DELIMITERS = {"$$": "$$", "\\[": "\\]"}


def is_thought_end(line: str) -> bool:
    """Whether a line has the tag that ends a thought as a tag, and does not speak of it."""
    stripped = line.strip()
    return stripped.startswith(THINK_CLOSE) or (stripped.endswith(THINK_CLOSE) and "`" not in stripped)


@dataclass
class _Line:
    """A line: its text without indentation, how many columns that had, and how much it is indented in a tab's way."""

    text: str
    indent: int

    @classmethod
    def parse(cls, raw: str) -> _Line:
        columns = 0
        for place, letter in enumerate(raw):
            if letter == " ":
                columns += 1
            elif letter == "\t":
                columns += 4 - columns % 4
            else:
                return cls(raw[place:].rstrip(" \t"), columns)
        return cls("", columns)


class BlockSplitter:
    """Cuts Markdown that grows into whole pieces. `end` is how many characters they hold so far."""

    def __init__(self) -> None:
        self.consumed = 0
        self._partial_line: list[str] = []
        """The parts of a line that is not whole yet."""
        self._block_lines: list[str] = []
        self._is_in_thought: bool | None = None
        self._fence = ""
        self._container_indent: int | None = None
        """The columns by which lines are indented that belong to a list's item, or to a footnote; None outside."""
        self._may_be_paragraph = False
        """Whether it may be a paragraph outside after all."""
        self._no_open_paragraph = True
        """Whether certainly no paragraph is open that a line could continue."""
        self._is_after_blank = False
        """Whether the last line was empty."""
        self._formula_end = ""
        """The end of an open formula."""
        self._is_uncertain = False
        """Whether it is no longer certain what is code: then all that comes is one piece."""
        self._fence_closed = False
        """Whether the line that was read has closed a fence outside of everything."""
        self._has_thought = False
        self.implied_thought_length = 0
        """Number of first characters that turned out to be a thought opened by the template."""

    def feed(self, text: str) -> list[str]:
        """The pieces that are whole now."""
        self._partial_line.append(text)
        if "\n" not in text:
            return []
        *lines, last = "".join(self._partial_line).split("\n")
        self._partial_line = [last]
        return [block for line in lines for block in self._feed_line(f"{line}\n")]

    def flush(self) -> list[str]:
        """Return the remaining blocks at the end of the text."""
        last, self._partial_line = "".join(self._partial_line), []
        return [*(self._feed_line(last) if last else []), *self._flush_block()]

    def _feed_line(self, line: str) -> list[str]:
        if self._is_in_thought is None and line.strip():
            self._is_in_thought = line.lstrip().startswith(THINK_OPEN)
            self._has_thought = self._is_in_thought
        if self._is_in_thought or (not self._has_thought and not self._fence and is_thought_end(line)):
            return self._feed_thought(line)
        whole: list[str] = []
        parts = re.split(r"\r\n?|\n", line)
        for number, part in enumerate(parts[:-1] if not parts[-1] else parts):
            whole += self._process_line(_Line.parse(part), may_cut=number == 0)
        self._block_lines.append(line)
        if self._fence_closed:
            whole += self._flush_block()
        return whole

    def _feed_thought(self, line: str) -> list[str]:
        """Of a thought, all is one piece, up to the tag that ends it and what is empty behind it."""
        at = line.find(THINK_CLOSE)
        if at < 0:
            self._block_lines.append(line)
            return []
        end = at + len(THINK_CLOSE)
        end += len(line[end:]) - len(line[end:].lstrip())
        self._block_lines.append(line[:end])
        whole = self._flush_block()
        self.implied_thought_length = 0 if self._is_in_thought else self.consumed
        self._is_in_thought, self._has_thought = False, True
        self._reset()
        return [*whole, *(self._feed_line(line[end:]) if line[end:] else [])]

    def _reset(self) -> None:
        """Begin as with a new text."""
        self._fence, self._container_indent, self._may_be_paragraph, self._no_open_paragraph, self._is_after_blank = (
            "",
            None,
            False,
            True,
            False,
        )
        self._formula_end, self._is_uncertain, self._fence_closed = "", False, False

    def _process_line(self, line: _Line, may_cut: bool) -> list[str]:
        """Take account of a line. Gives back what was before it, where it is certain that this has ended."""
        self._fence_closed = False
        if self._fence:
            if line.indent <= 3 and line.text.startswith(self._fence) and not line.text.strip(self._fence[0]):
                self._fence, self._no_open_paragraph, self._is_after_blank = "", True, False
                self._fence_closed = not self._is_uncertain
            return []
        if not line.text:
            self._is_after_blank, self._formula_end = True, ""
            self._no_open_paragraph = self._no_open_paragraph or self._container_indent is None
            return []
        whole: list[str] = []
        formula = self._formula_end
        self._track_formula(line)
        if self._container_indent is not None and not self._leaves_container(line, bool(formula)):
            self._is_after_blank = False
            return []
        opens = _FENCE.match(line.text) if line.indent <= 3 else None
        if opens and formula:
            self._is_uncertain = True
        if may_cut and not self._is_uncertain and (opens or (self._is_after_blank and line.indent == 0)):
            whole = self._flush_block()
        if opens:
            self._fence, self._formula_end = opens[1] or opens[2], ""
        else:
            self._begin_block(line)
        self._is_after_blank = False
        return whole

    def _track_formula(self, line: _Line) -> None:
        """Whether a formula of several lines may be open after a line: it has no empty lines."""
        if self._formula_end:
            self._formula_end = "" if self._formula_end in line.text else self._formula_end
            return
        text = line.text.lstrip("> \t")
        while found := _LIST_ITEM.match(text):
            text = text[found.end() :].lstrip("> \t")
        mark = text[:2]
        self._formula_end = (
            _FORMULA_DELIMITERS[mark]
            if mark in _FORMULA_DELIMITERS and _FORMULA_DELIMITERS[mark] not in text[2:]
            else ""
        )

    def _leaves_container(self, line: _Line, formula: bool) -> bool:
        """Whether a line ends the list or the footnote that may be open, and is to be read as one outside of it."""
        assert self._container_indent is not None
        if formula:  # which may go on whatever the line looks like
            self._may_be_paragraph = True
            self._is_uncertain = self._is_uncertain or bool(_FENCE.match(line.text))
            if (item := self._parse_list_item(line)) is not None:
                self._container_indent = min(self._container_indent, item[0])
            return False
        if line.indent >= self._container_indent:
            self._is_uncertain = self._is_uncertain or (
                self._may_be_paragraph and line.indent <= 3 and bool(_FENCE.match(line.text))
            )
            return False
        item = self._parse_list_item(line)
        if item is not None:
            columns, weak, unsure = item
            self._may_be_paragraph = unsure or (self._may_be_paragraph and weak and not self._is_after_blank)
            self._container_indent = columns
            return False
        if self._is_after_blank or self._interrupts_paragraph(line):
            self._container_indent, self._may_be_paragraph, self._no_open_paragraph = None, False, self._is_after_blank
            return True
        self._may_be_paragraph = True  # it may go on with the last paragraph of the item
        return False

    def _begin_block(self, line: _Line) -> None:
        """Read a line outside of all containers, which is no fence."""
        item = self._parse_list_item(line)
        if item is not None:
            self._container_indent, weak, unsure = item
            self._may_be_paragraph = unsure or (weak and not self._no_open_paragraph) or bool(self._formula_end)
        elif line.indent <= 3 and _FOOTNOTE.match(line.text):
            self._container_indent, self._may_be_paragraph = 4, True
        elif line.indent <= 3 and (_HEADING.match(line.text) or _THEMATIC_BREAK.match(line.text)):
            self._no_open_paragraph = True
        else:
            self._no_open_paragraph = False

    @staticmethod
    def _parse_list_item(line: _Line) -> tuple[int, bool, bool] | None:
        """The columns by which the content of a list's item is indented, whether it cannot end a paragraph, and whether
        it may be something else or be over at once; None for a line that begins no item."""
        found = _LIST_ITEM.match(line.text)
        if found is None or line.indent > 3 or _THEMATIC_BREAK.match(line.text):
            return None
        marker = line.indent + len(found[1])
        gap = _Line.parse(" " * marker + (found[3] or "") + "x").indent - marker
        weak = not found[4] or (found[2] is not None and int(found[2]) != 1)
        return (
            marker + (gap if found[4] and 1 <= gap <= 4 else 1),
            weak,
            not found[4] or bool(_TABLE_DELIMITER_ROW.match(line.text)),
        )

    @staticmethod
    def _interrupts_paragraph(line: _Line) -> bool:
        """Whether a line begins something that ends any paragraph."""
        if line.indent > 3:
            return False
        starts = (_FENCE, _HEADING, _THEMATIC_BREAK)
        return line.text.startswith(">") or any(each.match(line.text) for each in starts)

    def _flush_block(self) -> list[str]:
        block, self._block_lines = "".join(self._block_lines), []
        self.consumed += len(block)
        return [block] if block else []
