"""Many conversations with one model at once: each joins the batch when there is room, its words are read piece by piece
between the steps of the others, and leaves when its answer is whole or nobody wants it any more.

Who asks for much comes after who asks for little: of those that wait, the one goes next whose owner has the fewest in
the batch. It does not know rooms or sockets.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import Invalid, TrellisError
from ..messages import Answered, Cancelled, Chat, Drawn, Heard, Queued, Spoke
from .decode import TextReader
from .lines import Line, Lines
from .loop import Told, explained
from .sampling import drawn_from, is_greedy

PIECE = 256
"""Tokens of a conversation that are read between two steps of those that speak."""

MOST = 64
"""Conversations in one batch."""

RESERVED = 1024
"""Tokens of an answer that room is kept for at least; few answers are as long as they may be."""

TAKING_SECONDS = 0.01
"""How long conversations that have come are made ready within one step."""


@dataclass(frozen=True)
class Prepared:
    """A conversation as tokens. `limit` is how many there may be with the answer, `most` how long that may be."""

    tokens: list[int]
    left_out: int
    limit: int
    most: int
    stop: tuple[str, ...]


class Speaker(Protocol):
    """What a batch needs of a loaded model beside its lines."""

    tokenizer: Any
    ends: frozenset[int]

    def conversation(self, request: Chat) -> Prepared:
        """A conversation made ready. Raises Invalid for one that does not fit."""


@dataclass(eq=False)
class Seat:
    """One conversation in the batch, or on its way there."""

    number: int
    owner: str
    request: Chat
    arrived: float
    prepared: Prepared
    reader: TextReader
    chances: random.Random
    place: int | None = None
    line: Line | None = None
    warm: int = 0
    count: int = 0
    """Tokens of the answer."""
    next: int | None = None
    """The token that was drawn and is not read yet."""
    first: float = 0.0
    held: str = ""
    """Text that may yet turn out to begin what the answer is to stop at."""
    finish: Literal["stop", "length"] | None = None
    drawn: list[Drawn] = field(default_factory=list)

    @property
    def reading(self) -> bool:
        return self.line is not None and self.next is None and self.finish is None

    @property
    def needs(self) -> int:
        """So many tokens, as far as can be told."""
        longest = max(min(self.prepared.most, RESERVED), self.count)
        return min(self.prepared.limit, len(self.prepared.tokens) + longest)


class Chats:
    """The batch of one model: what the loop works on together. Joining and leaving is safe from any thread.

    `room` are the bytes that keys, values and adapters of a batch may take; one conversation may, however long it is.
    """

    def __init__(self, lines: Callable[[], Lines], speaker: Callable[[], Speaker], room: Callable[[], int]) -> None:
        self._lines, self._speaker, self._room = lines, speaker, room
        self._lock = threading.Lock()
        self._coming: deque[tuple[int, str, Chat, float]] = deque()
        self._live: set[int] = set()
        """All that were not told yet how they ended."""
        self._leaving: set[int] = set()
        self._waiting: list[Seat] = []
        self._seats: list[Seat] = []

    def join(self, number: int, owner: str, request: Any) -> None:
        with self._lock:
            self._live.add(number)
            self._coming.append((number, owner, request, time.monotonic()))

    def leave(self, number: int) -> None:
        with self._lock:
            if number in self._live:
                self._leaving.add(number)

    @property
    def wanted(self) -> bool:
        return bool(self._live)

    def give_up(self) -> list[int]:
        with self._lock:
            numbers, self._live = sorted(self._live), set()
            self._coming.clear()
            self._leaving.clear()
        self._waiting, self._seats = [], []
        with suppress(TrellisError):  # no model is loaded
            self._lines().clear()
        return numbers

    def step(self) -> Told:
        """Let come and go, read a piece of one conversation, and have all others say one more token."""
        told: Told = []
        self._let_go(told)
        self._take_in(told)
        self._seat(told)
        if reading := next((seat for seat in self._seats if seat.reading), None):
            self._read(reading, told)
        if speaking := [seat for seat in self._seats if seat.next is not None]:
            self._speak(speaking, told)
        with self._lock:
            self._live -= {number for number, _, last in told if last}
        return told

    def _let_go(self, told: Told) -> None:
        with self._lock:
            leaving, self._leaving = self._leaving, set()
            gone = [number for number, *_ in self._coming if number in leaving]
            self._coming = deque(each for each in self._coming if each[0] not in leaving)
        for seat in [seat for seat in (*self._waiting, *self._seats) if seat.number in leaving]:
            gone.append(seat.number)
            self._remove(seat)
        told += [(number, Cancelled(), True) for number in gone]

    def _take_in(self, told: Told) -> None:
        """Those that have come, as tokens, for a moment. What is wrong with one is said to it alone."""
        until = time.monotonic() + TAKING_SECONDS
        while self._coming and time.monotonic() < until:
            with self._lock:
                number, owner, request, arrived = self._coming.popleft()
            try:
                prepared = self._speaker().conversation(request)
            except Exception as error:  # noqa: BLE001 - whatever a template or a tokenizer does; what is not known is logged
                told.append((number, explained(error), True))
                continue
            reader, chances = TextReader(self._speaker().tokenizer), random.Random(request.seed)
            self._waiting.append(Seat(number, owner, request, arrived, prepared, reader, chances))

    def _seat(self, told: Told) -> None:
        """Give seats to those that wait, as long as there are any."""
        while self._waiting:
            taken = Counter(seat.owner for seat in self._seats)
            seat = min(self._waiting, key=lambda seat: taken[seat.owner])
            if self._seats and not self._room_for(seat):
                break
            try:
                seat.line = self._lines().begin(seat.request.weights, seat.prepared.tokens)
            except Exception as error:  # noqa: BLE001 - of one conversation alone
                told.append((seat.number, explained(error), True))
                self._waiting.remove(seat)
                continue
            self._waiting.remove(seat)
            seat.warm = len(seat.line.tokens)
            self._seats.append(seat)
            self._say_heard(seat, told)
        for place, seat in enumerate(self._waiting, start=1):
            if seat.place is None or place < seat.place:
                seat.place = place
                told.append((seat.number, Queued(place=place), False))

    def _room_for(self, seat: Seat) -> bool:
        seats = (*self._seats, seat)
        longest = max(each.needs for each in seats)
        taken = self._lines().takes(len(seats), longest, {each.request.weights for each in seats})
        return len(seats) <= MOST and taken <= self._room()

    def _read(self, seat: Seat, told: Told) -> None:
        """Read a piece, after the others that read have had their turn; at the end the first token is drawn."""
        assert seat.line is not None
        tokens = seat.prepared.tokens
        done = len(seat.line.tokens)
        try:
            piece = len(tokens) if self._lines().reads_whole else PIECE
            logits = self._lines().read(seat.line, tokens[done : done + piece])
        except Exception as error:  # noqa: BLE001 - of one conversation alone: the others have not been touched
            told.append((seat.number, explained(error), True))
            self._remove(seat)
            return
        self._seats.remove(seat)
        self._seats.append(seat)
        self._say_heard(seat, told)
        if len(seat.line.tokens) == len(tokens):
            self._draw([seat], logits[None], told)

    def _speak(self, seats: list[Seat], told: Told) -> None:
        lines = [seat.line for seat in seats if seat.line is not None]
        logits = self._lines().grow(lines, [seat.next for seat in seats if seat.next is not None])
        self._draw(seats, logits, told)

    def _draw(self, seats: list[Seat], logits: Tensor, told: Told) -> None:
        """The next token of each, from logits (R, V)."""
        with torch.inference_mode():
            tokens = draw_each(logits, seats)
            for seat, token, row in zip(seats, tokens, logits, strict=True):
                if seat.request.top is not None:
                    seat.drawn.append(self._told_of(token, row, seat.request.top))
                self._grow(seat, token, told)

    def _grow(self, seat: Seat, token: int, told: Told) -> None:
        seat.count += 1
        seat.next = token
        seat.first = seat.first or time.monotonic() - seat.arrived
        text = ""
        if token in self._speaker().ends:
            seat.finish = "stop"
        else:
            text = seat.reader.read([token])
            if seat.count == seat.prepared.most or len(seat.prepared.tokens) + seat.count >= seat.prepared.limit:
                seat.finish = "length"
        if seat.finish:
            text += seat.reader.rest()
        text, stopped = until(seat.held + text, seat.prepared.stop)
        if stopped:
            seat.finish, seat.held = "stop", ""
        elif not seat.finish:
            keep = begins(text, seat.prepared.stop)
            text, seat.held = text[: len(text) - keep], text[len(text) - keep :]
        if text or seat.drawn:
            told.append((seat.number, Spoke(text=text, tokens=seat.count, drawn=tuple(seat.drawn)), False))
            seat.drawn.clear()
        if seat.finish:
            told.append((seat.number, self._answered(seat, seat.finish), True))
            self._remove(seat)

    def _answered(self, seat: Seat, finish: Literal["stop", "length"]) -> Answered:
        return Answered(
            finish=finish,
            tokens=seat.count,
            prompt_tokens=len(seat.prepared.tokens),
            seconds_to_first=seat.first,
            seconds=time.monotonic() - seat.arrived,
        )

    def _say_heard(self, seat: Seat, told: Told) -> None:
        assert seat.line is not None
        heard = Heard(
            read=len(seat.line.tokens), prompt_tokens=len(seat.prepared.tokens), warm=seat.warm,
            left_out=seat.prepared.left_out, context_length=seat.prepared.limit,
        )  # fmt: skip
        told.append((seat.number, heard, False))

    def _told_of(self, token: int, logits: Tensor, count: int) -> Drawn:
        """A token with its log-probability at temperature 1, and those of the likeliest."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        values, places = logprobs.topk(min(count, len(logprobs)))
        top = [(*self._written(place), value) for place, value in zip(places.tolist(), values.tolist(), strict=True)]
        text, raw = self._written(token)
        return Drawn(text=text, bytes=raw, logprob=float(logprobs[token]), top=tuple(top))

    def _written(self, token: int) -> tuple[str, tuple[int, ...]]:
        text = str(self._speaker().tokenizer.decode([token]))
        return text, tuple(text.encode("utf-8", "replace"))

    def _remove(self, seat: Seat) -> None:
        if seat.line is not None:
            self._lines().end(seat.line)
            self._seats.remove(seat)
        else:
            self._waiting.remove(seat)


def draw_each(logits: Tensor, seats: list[Seat]) -> list[int]:
    """A token for each row of logits (R, V), each by the sampling that was asked for it."""
    device = logits.device
    asked = [seat.request.sampling for seat in seats]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    scaled = logits.float() / column([1.0 if is_greedy(each) else each.temperature for each in asked])
    chances = torch.tensor([seat.chances.random() * (1 - 2**-20) for seat in seats], device=device)
    top_p: float | Tensor = column([each.top_p for each in asked]) if any(each.top_p < 1 for each in asked) else 1.0
    drawn, _ = drawn_from(scaled, column([each.min_p for each in asked]), top_p, chances)
    if any(map(is_greedy, asked)):
        greedy = torch.tensor(list(map(is_greedy, asked)), device=device)
        drawn = torch.where(greedy, scaled.argmax(dim=-1), drawn)
    tokens: list[int] = drawn.tolist()
    return tokens


def until(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """Text up to where it is to stop, and whether it is."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def begins(text: str, stops: tuple[str, ...]) -> int:
    """How many of the last characters may be the beginning of what to stop at."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


def too_long(tokens: int, limit: int) -> Invalid:
    return Invalid(
        f"The conversation has {tokens} tokens; with room for an answer it does not fit into the context of {limit}.",
        code="prompt_too_long",
        field="messages",
        next_step="Shorten the last message, or use a model with a longer context.",
    )
