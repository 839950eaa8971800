"""The text of an answer while it is generated: up to the first stop string, in pieces that are never taken back, each
with the tokens that wrote it.

It knows tokens and text; not models, sampling or listeners.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ...messages import SampledToken
from .vocabulary import IncrementalDetokenizer, TextPiece


@dataclass
class TokenSpan:
    """A token and the characters of the answer that it wrote, from `start` to `end`. The last `pending` of its bytes
    belong to the next character."""

    sampled: SampledToken
    start: int
    end: int
    pending: int

    @property
    def character_end(self) -> int:
        """The end of the last character that the token contributes to."""
        return self.end + bool(self.pending)


class AnswerText:
    """Grows token by token. `stops` end the answer and are not sent; text that may turn out to begin one is held back.
    A token is sent with the text it wrote, or not at all."""

    def __init__(self, detokenizer: IncrementalDetokenizer, stops: Sequence[str]) -> None:
        self.detokenizer = detokenizer
        self.stops = tuple(stops)
        self.stopped = False
        self._pending = ""
        self._sent = 0
        """Number of characters sent."""
        self._spans: deque[TokenSpan] = deque()

    def add(self, token: int, sampled: SampledToken | None = None, check_stops: bool = True) -> None:
        """Append a token. The text and bytes of `sampled` are filled in here. Special tokens write nothing and are not
        sent."""
        start = self._sent + len(self._pending)
        piece = self.detokenizer.add(token)
        self._pending += piece.text
        if sampled is not None and (piece.raw or piece.text):
            sampled = sampled.model_copy(update={"text": piece.text, "bytes": tuple(piece.raw)})
            self._spans.append(TokenSpan(sampled, start, start + len(piece.text), piece.pending))
        if check_stops:
            self._apply_stops()

    def end(self) -> None:
        """Finish: an incomplete character is sent as a replacement character."""
        if self.stopped:
            return
        rest = self.detokenizer.flush()
        self._pending += rest
        if rest and self._spans:
            last = self._spans[-1]
            last.sampled = last.sampled.model_copy(update={"text": last.sampled.text + rest})
            last.end += len(rest)
            last.pending = 0
        self._apply_stops()

    def take(self, ended: bool) -> tuple[str, tuple[SampledToken, ...]]:
        """Return the text that can be sent now and the tokens that wrote it; everything left once the answer has
        `ended`."""
        end = self._sent + len(self._pending)
        if not ended:
            end -= partial_stop_length(self._pending, self.stops)
            for entry in self._spans:
                if entry.start < end < entry.character_end:
                    end = entry.start
        text, self._pending = self._pending[: end - self._sent], self._pending[end - self._sent :]
        self._sent = end
        sampled: list[SampledToken] = []
        while self._spans and self._spans[0].start < end and self._spans[0].character_end <= end:
            sampled.append(self._spans.popleft().sampled)
        return text, tuple(sampled)

    def _apply_stops(self) -> None:
        """Cut text and tokens at the first stop string."""
        if self.stopped:
            return
        text, self.stopped = cut_at_stop(self._pending, self.stops)
        if not self.stopped:
            return
        cut, self._pending = self._pending, text
        end = self._sent + len(text)
        spans: deque[TokenSpan] = deque()
        for entry in self._spans:
            if entry.start >= end:
                break
            if entry.character_end > end:
                removed = cut[end - self._sent : entry.end - self._sent]
                entry.sampled = _shorten_token(entry.sampled, removed, entry.pending)
                entry.end = min(entry.end, end)
                entry.pending = 0
            spans.append(entry)
        self._spans = spans


def _shorten_token(sampled: SampledToken, removed: str, pending: int) -> SampledToken:
    """Return a token without the removed end of its text, and without the bytes of an incomplete character."""
    text, raw = sampled.text[: len(sampled.text) - len(removed)], bytes(sampled.bytes)
    raw, cut = raw[: len(raw) - pending], removed.encode("utf-8", "replace")
    raw = raw[: len(raw) - len(cut)] if raw.endswith(cut) else text.encode("utf-8", "replace")
    return sampled.model_copy(update={"text": text, "bytes": tuple(raw)})


def token_label(piece: TextPiece, name: str, special: bool) -> tuple[str, tuple[int, ...]]:
    """Return how a candidate token is shown: its text, or what identifies it if it has none of its own."""
    text = piece.text
    if special:
        text = name
    elif not text and piece.raw:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece.raw)
    return text, tuple(piece.raw)


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return the text up to the first stop string, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def partial_stop_length(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest suffix that may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if stop[length - 1] == text[-1] and text.endswith(stop[:length]):
                longest = length
                break
    return longest
