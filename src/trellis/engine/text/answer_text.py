"""The text of one answer while it grows: up to the first stop string, in pieces that need never be taken back, each
with the tokens that wrote it.

It knows tokens and text; not models, sampling or who listens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ...messages import Drawn
from .vocabulary import Piece, TextReader


@dataclass
class Entry:
    """A token as it is told, and which characters of the answer it wrote: from `start` up to `end`. `pending` of its
    bytes belong to the character after them."""

    drawn: Drawn
    start: int
    end: int
    pending: int

    @property
    def whole(self) -> int:
        """Where the last character ends that it has a part in."""
        return self.end + bool(self.pending)


class AnswerText:
    """Grows token by token. `stops` are strings that end the answer and are not told; what may yet turn out to begin
    one is held back, and a token is told with the text that it wrote, or not at all."""

    def __init__(self, reader: TextReader, stops: Sequence[str]) -> None:
        self.reader = reader
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""
        self._told = 0
        """Characters that were told."""
        self._entries: deque[Entry] = deque()

    def add(self, token: int, drawn: Drawn | None = None, looks_for_stops: bool = True) -> None:
        """Go on with a token. `drawn` is how it is told; its text and bytes are filled in here. A special token writes
        nothing, and is not told."""
        start = self._told + len(self._held)
        piece = self.reader.piece(token)
        self._held += piece.text
        if drawn is not None and (piece.raw or piece.text):
            drawn = drawn.model_copy(update={"text": piece.text, "bytes": tuple(piece.raw)})
            self._entries.append(Entry(drawn, start, start + len(piece.text), piece.pending))
        if looks_for_stops:
            self._look()

    def end(self) -> None:
        """No more tokens come: half a character is told as what it is."""
        if self.stopped:
            return
        rest = self.reader.rest()
        self._held += rest
        if rest and self._entries:
            last = self._entries[-1]
            last.drawn = last.drawn.model_copy(update={"text": last.drawn.text + rest})
            last.end += len(rest)
            last.pending = 0
        self._look()

    def take(self, ended: bool) -> tuple[str, tuple[Drawn, ...]]:
        """The text that can be told now, and the tokens that wrote it; all there is, once the answer has ended."""
        upto = self._told + len(self._held)
        if not ended:
            upto -= begins(self._held, self.stops)
            for entry in self._entries:
                if entry.start < upto < entry.whole:
                    upto = entry.start
        text, self._held = self._held[: upto - self._told], self._held[upto - self._told :]
        self._told = upto
        told: list[Drawn] = []
        while self._entries and self._entries[0].start < upto and self._entries[0].whole <= upto:
            told.append(self._entries.popleft().drawn)
        return text, tuple(told)

    def _look(self) -> None:
        """Cut at the first stop string, tokens as well as text."""
        if self.stopped:
            return
        text, self.stopped = until(self._held, self.stops)
        if not self.stopped:
            return
        cut, self._held = self._held, text
        end = self._told + len(text)
        kept: deque[Entry] = deque()
        for entry in self._entries:
            if entry.start >= end:
                break
            if entry.whole > end:
                lost = cut[end - self._told : entry.end - self._told]
                entry.drawn = _shortened(entry.drawn, lost, entry.pending)
                entry.end = min(entry.end, end)
                entry.pending = 0
            kept.append(entry)
        self._entries = kept


def _shortened(drawn: Drawn, lost: str, pending: int) -> Drawn:
    """A token without the end of its text, and without the bytes of a character that is not whole."""
    text, raw = drawn.text[: len(drawn.text) - len(lost)], bytes(drawn.bytes)
    raw, cut = raw[: len(raw) - pending], lost.encode("utf-8", "replace")
    raw = raw[: len(raw) - len(cut)] if raw.endswith(cut) else text.encode("utf-8", "replace")
    return drawn.model_copy(update={"text": text, "bytes": tuple(raw)})


def named(piece: Piece, name: str, special: bool) -> tuple[str, tuple[int, ...]]:
    """How a token is told that might have been drawn: its text; where it has none of its own, what tells it apart."""
    text = piece.text
    if special:
        text = name
    elif not text and piece.raw:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece.raw)
    return text, tuple(piece.raw)


def until(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Text up to where it is to stop, and whether it is."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def begins(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of what to stop at."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if stop[length - 1] == text[-1] and text.endswith(stop[:length]):
                longest = length
                break
    return longest
