"""Cut Markdown that grows into pieces that can be rendered one by one, as CommonMark reads the whole, in linear time.

A piece ends only where no container can still be open, whatever comes next; where that is not certain, it goes on. It
imports nothing of ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

THINK = "<think>"
THOUGHT = "</think>"

_FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})")
_ITEM = re.compile(r"([-*+]|(\d{1,9})[.)])(?:([ \t]+)(?=(\S?))|$)")
_RULE = re.compile(r"([-*_])[ \t]*(?:\1[ \t]*){2,}$")
_HEADING = re.compile(r"#{1,6}(?:[ \t]|$)")
_DELIMITERS = re.compile(r"[-+*:| \t]+$")
"""What stands under the head of a table."""
_FOOTNOTE = re.compile(r"\[\^[^\]\s]+\]:")
_MATHS = {"$$": "$$", "\\[": "\\]"}


def ends_a_thought(line: str) -> bool:
    """Whether a line has the tag that ends a thought as a tag, and does not speak of it."""
    stripped = line.strip()
    return stripped.startswith(THOUGHT) or (stripped.endswith(THOUGHT) and "`" not in stripped)


@dataclass
class _Line:
    """A line: its text without indentation, how many columns that had, and how much it is indented in a tab's way."""

    text: str
    indent: int

    @classmethod
    def of(cls, raw: str) -> _Line:
        columns = 0
        for place, letter in enumerate(raw):
            if letter == " ":
                columns += 1
            elif letter == "\t":
                columns += 4 - columns % 4
            else:
                return cls(raw[place:].rstrip(" \t"), columns)
        return cls("", columns)


class Blocks:
    """Cuts Markdown that grows into whole pieces. `end` is how many characters they hold so far."""

    def __init__(self) -> None:
        self.end = 0
        self._line: list[str] = []
        """The parts of a line that is not whole yet."""
        self._block: list[str] = []
        self._thinks: bool | None = None
        self._fence = ""
        self._inside: int | None = None
        """The columns by which lines are indented that belong to a list's item, or to a footnote; None outside."""
        self._doubt = False
        """Whether it may be a paragraph outside after all."""
        self._fresh = True
        """Whether no paragraph is open for certain, which some lines would go on with."""
        self._gap = False
        """Whether the last line was empty."""
        self._maths = ""
        """What would end a formula that was begun."""
        self._lost = False
        """Whether it is no longer certain what is code: then all that comes is one piece."""
        self._closed = False
        """Whether the line that was read has closed a fence outside of everything."""
        self._has_thought = False
        self.implied = 0
        """How many characters at the beginning turned out to be a thought that the template had opened."""

    def feed(self, text: str) -> list[str]:
        """The pieces that are whole now."""
        self._line.append(text)
        if "\n" not in text:
            return []
        *lines, last = "".join(self._line).split("\n")
        self._line = [last]
        return [block for line in lines for block in self._take(f"{line}\n")]

    def rest(self) -> list[str]:
        """What is left when no more comes, in whole pieces."""
        last, self._line = "".join(self._line), []
        return [*(self._take(last) if last else []), *self._cut()]

    def _take(self, line: str) -> list[str]:
        if self._thinks is None and line.strip():
            self._thinks = line.lstrip().startswith(THINK)
            self._has_thought = self._thinks
        if self._thinks or (not self._has_thought and not self._fence and ends_a_thought(line)):
            return self._think(line)
        whole: list[str] = []
        parts = re.split(r"\r\n?|\n", line)
        for number, part in enumerate(parts[:-1] if not parts[-1] else parts):
            whole += self._read(_Line.of(part), may_cut=number == 0)
        self._block.append(line)
        if self._closed:
            whole += self._cut()
        return whole

    def _think(self, line: str) -> list[str]:
        """Of a thought, all is one piece, up to the tag that ends it and what is empty behind it."""
        at = line.find(THOUGHT)
        if at < 0:
            self._block.append(line)
            return []
        end = at + len(THOUGHT)
        end += len(line[end:]) - len(line[end:].lstrip())
        self._block.append(line[:end])
        whole = self._cut()
        self.implied = 0 if self._thinks else self.end
        self._thinks, self._has_thought = False, True
        self._forget()
        return [*whole, *(self._take(line[end:]) if line[end:] else [])]

    def _forget(self) -> None:
        """Begin as with a new text."""
        self._fence, self._inside, self._doubt, self._fresh, self._gap = "", None, False, True, False
        self._maths, self._lost, self._closed = "", False, False

    def _read(self, line: _Line, may_cut: bool) -> list[str]:
        """Take account of a line. Gives back what was before it, where it is certain that this has ended."""
        self._closed = False
        if self._fence:
            if line.indent <= 3 and line.text.startswith(self._fence) and not line.text.strip(self._fence[0]):
                self._fence, self._fresh, self._gap = "", True, False
                self._closed = not self._lost
            return []
        if not line.text:
            self._gap, self._maths = True, ""
            self._fresh = self._fresh or self._inside is None
            return []
        whole: list[str] = []
        formula = self._maths
        self._follow_formula(line)
        if self._inside is not None and not self._leave(line, bool(formula)):
            self._gap = False
            return []
        opens = _FENCE.match(line.text) if line.indent <= 3 else None
        if opens and formula:
            self._lost = True
        if may_cut and not self._lost and (opens or (self._gap and line.indent == 0)):
            whole = self._cut()
        if opens:
            self._fence, self._maths = opens[1] or opens[2], ""
        else:
            self._begin(line)
        self._gap = False
        return whole

    def _follow_formula(self, line: _Line) -> None:
        """Whether a formula of several lines may be open after a line: it has no empty lines."""
        if self._maths:
            self._maths = "" if self._maths in line.text else self._maths
            return
        text = line.text.lstrip("> \t")
        while found := _ITEM.match(text):
            text = text[found.end() :].lstrip("> \t")
        mark = text[:2]
        self._maths = _MATHS[mark] if mark in _MATHS and _MATHS[mark] not in text[2:] else ""

    def _leave(self, line: _Line, formula: bool) -> bool:
        """Whether a line ends the list or the footnote that may be open, and is to be read as one outside of it."""
        assert self._inside is not None
        if formula:  # which may go on whatever the line looks like
            self._doubt = True
            self._lost = self._lost or bool(_FENCE.match(line.text))
            if (item := self._item(line)) is not None:
                self._inside = min(self._inside, item[0])
            return False
        if line.indent >= self._inside:
            self._lost = self._lost or (self._doubt and line.indent <= 3 and bool(_FENCE.match(line.text)))
            return False
        item = self._item(line)
        if item is not None:
            columns, weak, unsure = item
            self._doubt = unsure or (self._doubt and weak and not self._gap)
            self._inside = columns
            return False
        if self._gap or self._starts(line):
            self._inside, self._doubt, self._fresh = None, False, self._gap
            return True
        self._doubt = True  # it may go on with the last paragraph of the item
        return False

    def _begin(self, line: _Line) -> None:
        """Read a line outside of all containers, which is no fence."""
        item = self._item(line)
        if item is not None:
            self._inside, weak, unsure = item
            self._doubt = unsure or (weak and not self._fresh) or bool(self._maths)
        elif line.indent <= 3 and _FOOTNOTE.match(line.text):
            self._inside, self._doubt = 4, True
        elif line.indent <= 3 and (_HEADING.match(line.text) or _RULE.match(line.text)):
            self._fresh = True
        else:
            self._fresh = False

    @staticmethod
    def _item(line: _Line) -> tuple[int, bool, bool] | None:
        """The columns by which the content of a list's item is indented, whether it cannot end a paragraph, and whether
        it may be something else or be over at once; None for a line that begins no item."""
        found = _ITEM.match(line.text)
        if found is None or line.indent > 3 or _RULE.match(line.text):
            return None
        marker = line.indent + len(found[1])
        gap = _Line.of(" " * marker + (found[3] or "") + "x").indent - marker
        weak = not found[4] or (found[2] is not None and int(found[2]) != 1)
        return (
            marker + (gap if found[4] and 1 <= gap <= 4 else 1),
            weak,
            not found[4] or bool(_DELIMITERS.match(line.text)),
        )

    @staticmethod
    def _starts(line: _Line) -> bool:
        """Whether a line begins something that ends any paragraph."""
        if line.indent > 3:
            return False
        starts = (_FENCE, _HEADING, _RULE)
        return line.text.startswith(">") or any(each.match(line.text) for each in starts)

    def _cut(self) -> list[str]:
        block, self._block = "".join(self._block), []
        self.end += len(block)
        return [block] if block else []
