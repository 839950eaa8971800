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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ...errors import Invalid, TrellisError
from ...messages import Answered, Cancelled, Chat, Drawn, Heard, Queued, Spoke
from ..known_errors import explained
from ..parallel import stand_back
from ..scheduler import Told
from .answer_text import AnswerText, named
from .kv_cache import Line, Lines
from .sampling import drawn_from, is_greedy, overflowed
from .vocabulary import TextReader, vocabulary_of

PIECE = 256
"""Tokens of a conversation that are read between two steps of those that speak."""

MOST = 64
"""Conversations in one batch."""

RESERVED = 1024
"""Tokens of an answer that room is kept for at least; few answers are as long as they may be."""

TAKING_SECONDS = 0.01
"""How long conversations that have come are made ready within one step."""

SHORT = 10_000
"""Characters of a conversation that is made ready within a step; a longer one is tokenized on a thread of its own,
while the others go on."""

TURN = 64
"""Characters that a turn counts as beside its text, for what a template makes of it."""

READERS = 2
"""Threads that make long conversations ready."""

IDLE_SECONDS = 0.005
"""How long a step waits for one of those where there is nothing else to do."""


@dataclass(frozen=True)
class Prepared:
    """A conversation as tokens. `limit` is how many there may be with the answer, `most` how long that may be."""

    tokens: list[int]
    left_out: int
    limit: int
    most: int
    stop: tuple[str, ...]
    in_thought: bool = False
    """Whether the answer begins in a thought that the chat template has opened."""


class Speaker(Protocol):
    """What a batch needs of a loaded model beside its lines."""

    tokenizer: Any
    ends: frozenset[int]

    def conversation(self, request: Chat) -> Prepared:
        """A conversation made ready. Raises Invalid for one that does not fit."""


@dataclass(frozen=True)
class Arrival:
    """A conversation that has come and is not made ready yet."""

    number: int
    owner: str
    request: Chat
    time: float

    @property
    def is_long(self) -> bool:
        turns = self.request.turns
        return len(self.request.text) + sum(TURN + len(turn.text) for turn in turns) > SHORT


@dataclass(eq=False)
class Seat:
    """One conversation in the batch, or on its way there."""

    number: int
    owner: str
    request: Chat
    arrived: float
    prepared: Prepared
    answer: AnswerText
    chances: random.Random
    place: int | None = None
    line: Line | None = None
    warm: int = 0
    count: int = 0
    """Tokens of the answer."""
    next: int | None = None
    """The token that was drawn and is not read yet."""
    first: float = 0.0
    finish: Literal["stop", "length"] | None = None
    penalized: Tensor | None = None
    """Which tokens (V,) have been read or drawn, where repeating them is penalized."""

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
        self._coming: deque[Arrival] = deque()
        self._live: set[int] = set()
        """All that were not told yet how they ended."""
        self._leaving: set[int] = set()
        self._readers = ThreadPoolExecutor(READERS, "tokenizer", stand_back)
        self._beside: set[int] = set()
        """Those that are made ready on a thread of their own."""
        self._ready: SimpleQueue[tuple[Arrival, Prepared | Exception]] = SimpleQueue()
        self._waiting: list[Seat] = []
        self._seats: list[Seat] = []

    def join(self, number: int, owner: str, request: Any) -> None:
        with self._lock:
            self._live.add(number)
            self._coming.append(Arrival(number, owner, request, time.monotonic()))

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
        self._beside.clear()
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
            gone = [each.number for each in self._coming if each.number in leaving]
            self._coming = deque(each for each in self._coming if each.number not in leaving)
        gone += self._beside & leaving
        self._beside -= leaving
        for seat in [seat for seat in (*self._waiting, *self._seats) if seat.number in leaving]:
            gone.append(seat.number)
            self._remove(seat)
        told += [(number, Cancelled(), True) for number in gone]

    def _take_in(self, told: Told) -> None:
        """Those that have come, as tokens, for a moment; long ones on threads of their own. What is wrong with one is
        said to it alone."""
        until = time.monotonic() + TAKING_SECONDS
        while self._coming and time.monotonic() < until:
            with self._lock:
                arrival = self._coming.popleft()
            if arrival.is_long:
                self._beside.add(arrival.number)
                self._readers.submit(lambda each: self._ready.put((each, self._prepared(each))), arrival)
            else:
                self._admit(arrival, self._prepared(arrival), told)
        idle = not (told or self._seats or self._waiting or self._coming)
        with suppress(Empty):
            while self._beside:
                arrival, prepared = self._ready.get(idle, IDLE_SECONDS)
                idle = False
                if arrival.number in self._beside:  # it has not left meanwhile
                    self._beside.remove(arrival.number)
                    self._admit(arrival, prepared, told)

    def _prepared(self, arrival: Arrival) -> Prepared | Exception:
        if arrival.number not in self._live:
            return TimeoutError()
        try:
            return self._speaker().conversation(arrival.request)
        except Exception as error:  # noqa: BLE001 - whatever a template or a tokenizer does; what is not known is logged
            return error

    def _admit(self, arrival: Arrival, prepared: Prepared | Exception, told: Told) -> None:
        if isinstance(prepared, Exception):
            told.append((arrival.number, explained(prepared), True))
            return
        request = arrival.request
        answer = AnswerText(TextReader(self._speaker().tokenizer, prepared.tokens), prepared.stop)
        chances = random.Random(request.seed)
        self._waiting.append(Seat(arrival.number, arrival.owner, request, arrival.time, prepared, answer, chances))

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
            self._fail(seat, error, told)
            return
        self._seats.remove(seat)
        self._seats.append(seat)
        self._say_heard(seat, told)
        if len(seat.line.tokens) == len(tokens):
            self._draw([seat], logits[None], told)

    def _speak(self, seats: list[Seat], told: Told) -> None:
        lines = [seat.line for seat in seats if seat.line is not None]
        try:
            logits = self._lines().grow(lines, [seat.next for seat in seats if seat.next is not None])
        except Exception as error:
            if len(seats) == 1 or explained(error).code != "out_of_memory":
                raise
            # Nobody has grown. The one that takes the most ends, the others go on in the room that it leaves.
            self._fail(max(seats, key=lambda seat: len(seat.prepared.tokens) + seat.count), error, told)
            return
        self._draw(seats, logits, told)

    def _draw(self, seats: list[Seat], logits: Tensor, told: Told) -> None:
        """The next token of each, from logits (R, V). One whose row holds no numbers ends, and says why."""
        with torch.inference_mode():
            tokens = draw_each(logits, seats, self._speaker().ends)
            for seat, token, row in zip(seats, tokens, logits, strict=True):
                if token is None:
                    assert seat.line is not None
                    self._fail(seat, seat.line.error or overflowed(), told)
                else:
                    self._grow(seat, token, row, told)

    def _grow(self, seat: Seat, token: int, logits: Tensor, told: Told) -> None:
        seat.count += 1
        seat.next = token
        seat.first = seat.first or time.monotonic() - seat.arrived
        if token in self._speaker().ends:
            seat.finish = "stop"
        else:
            drawn = self._told_of(seat, token, logits) if seat.request.top is not None else None
            seat.answer.add(token, drawn, looks_for_stops=seat.count >= seat.request.min_tokens)
            if seat.count == seat.prepared.most or len(seat.prepared.tokens) + seat.count >= seat.prepared.limit:
                seat.finish = "length"
        if seat.finish:
            seat.answer.end()
        if seat.answer.stopped:
            seat.finish = "stop"
        text, entries = seat.answer.take(ended=seat.finish is not None)
        if text or entries:
            told.append((seat.number, Spoke(text=text, tokens=seat.count, drawn=entries), False))
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
            in_thought=seat.prepared.in_thought,
        )  # fmt: skip
        told.append((seat.number, heard, False))

    def _told_of(self, seat: Seat, token: int, logits: Tensor) -> Drawn:
        """A token with its log-probability at temperature 1, and those of the likeliest with what they would write."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        values, places = logprobs.topk(min(seat.request.top or 0, len(logprobs)))
        words = vocabulary_of(self._speaker().tokenizer)
        top = []
        for place, value in zip(places.tolist(), values.tolist(), strict=True):
            special = words.is_special(place)
            name = words.name(place) if special else ""
            top.append((*named(seat.answer.reader.peek(place), name, special), value))
        return Drawn(text="", bytes=(), logprob=float(logprobs[token]), top=tuple(top))

    def _fail(self, seat: Seat, error: Exception, told: Told) -> None:
        """End one conversation with an error; nothing of what it has read is used again."""
        told.append((seat.number, explained(error), True))
        self._remove(seat, keep=False)

    def _remove(self, seat: Seat, keep: bool = True) -> None:
        if seat.line is not None:
            self._lines().end(seat.line, keep)
            self._seats.remove(seat)
        else:
            self._waiting.remove(seat)


def draw_each(logits: Tensor, seats: list[Seat], ends: frozenset[int] = frozenset()) -> list[int | None]:
    """A token for each row of logits (R, V), each by the sampling that was asked for it; None where a row holds NaN or
    infinity."""
    device = logits.device
    asked = [seat.request.sampling for seat in seats]
    if any(seat.request.repetition_penalty != 1 or seat.count < seat.request.min_tokens for seat in seats):
        logits = torch.stack([_penalized(row, seat, ends) for row, seat in zip(logits, seats, strict=True)])

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    scaled = logits.float() / column([1.0 if is_greedy(each) else each.temperature for each in asked])
    for row, seat in enumerate(seats):
        if 0 < seat.request.top_k < scaled.shape[-1]:
            least = scaled[row].topk(seat.request.top_k).values[-1]
            scaled[row] = scaled[row].masked_fill(scaled[row] < least, float("-inf"))
    chances = torch.tensor([seat.chances.random() * (1 - 2**-20) for seat in seats], device=device)
    top_p: float | Tensor = column([each.top_p for each in asked]) if any(each.top_p < 1 for each in asked) else 1.0
    drawn, logprobs = drawn_from(scaled, column([each.min_p for each in asked]), top_p, chances)
    if any(map(is_greedy, asked)):
        greedy = torch.tensor(list(map(is_greedy, asked)), device=device)
        drawn = torch.where(greedy, scaled.argmax(dim=-1), drawn)
    tokens: list[int] = drawn.masked_fill(logprobs.isnan(), -1).tolist()
    return [None if token < 0 else token for token in tokens]


def _penalized(logits: Tensor, seat: Seat, ends: frozenset[int]) -> Tensor:
    """A row of logits (V,) in which what was read or said before is less likely by the repetition penalty (CTRL, arXiv
    1909.05858), and an end is impossible before the least number of tokens."""
    logits = logits.float()
    if (penalty := seat.request.repetition_penalty) != 1:
        if seat.penalized is None:
            seat.penalized = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
            seat.penalized[seat.prepared.tokens] = True
        if seat.next is not None:
            seat.penalized[seat.next] = True
        changed = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seat.penalized, changed, logits)
    if seat.count < seat.request.min_tokens and ends:
        known = [token for token in ends if token < len(logits)]
        logits = logits.index_fill(0, torch.tensor(known, device=logits.device, dtype=torch.long), float("-inf"))
    return logits


def too_long(tokens: int, limit: int, at_least: bool = False) -> Invalid:
    counted = f"at least {tokens}" if at_least else str(tokens)
    return Invalid(
        f"The conversation has {counted} tokens; with room for an answer it does not fit into the context of {limit}.",
        code="prompt_too_long",
        field="messages",
        next_step="Shorten the last message, or use a model with a longer context.",
    )
