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
from ...messages import AnswerDone, Cancelled, Chat, PromptRead, QueuePosition, SampledToken, TextDelta
from ..known_errors import explain_error
from ..parallel import lower_thread_priority
from ..scheduler import RequestEvents
from .answer_text import AnswerText, token_label
from .kv_cache import CachedSequence, SequenceCache
from .sampling import is_greedy, overflow_error, sample_scaled
from .vocabulary import IncrementalDetokenizer, vocabulary_of

PREFILL_TOKENS = 256
"""Tokens of a conversation that are read between two steps of those that speak."""

MAX_SLOTS = 64
"""Conversations in one batch."""

RESERVED_ANSWER_TOKENS = 1024
"""Tokens of an answer that room is kept for at least; few answers are as long as they may be."""

PREPARE_SECONDS = 0.01
"""How long conversations that have come are made ready within one step."""

MAX_INLINE_CHARACTERS = 10_000
"""Characters of a conversation that is made ready within a step; a longer one is tokenized on a thread of its own,
while the others go on."""

TURN_OVERHEAD = 64
"""Characters that a turn counts as beside its text, for what a template makes of it."""

TOKENIZER_THREADS = 2
"""Threads that make long conversations ready."""

IDLE_WAIT_SECONDS = 0.005
"""How long a step waits for one of those where there is nothing else to do."""


@dataclass(frozen=True)
class PreparedChat:
    """A conversation as tokens. `limit` is how many there may be with the answer, `most` how long that may be."""

    tokens: list[int]
    left_out: int
    context_length: int
    max_new_tokens: int
    stop: tuple[str, ...]
    in_thinking: bool = False
    """Whether the answer begins in a thought that the chat template has opened."""


class ChatModel(Protocol):
    """What a batch needs of a loaded model beside its lines."""

    tokenizer: Any
    end_tokens: frozenset[int]

    def prepare_chat(self, request: Chat) -> PreparedChat:
        """A conversation made ready. Raises Invalid for one that does not fit."""


@dataclass(frozen=True)
class PendingChat:
    """A conversation that has come and is not made ready yet."""

    number: int
    owner: str
    request: Chat
    arrived: float

    @property
    def is_long(self) -> bool:
        turns = self.request.turns
        return len(self.request.text) + sum(TURN_OVERHEAD + len(turn.text) for turn in turns) > MAX_INLINE_CHARACTERS


@dataclass(eq=False)
class ChatSlot:
    """One conversation in the batch, or on its way there."""

    number: int
    owner: str
    request: Chat
    arrived: float
    prepared: PreparedChat
    answer: AnswerText
    rng: random.Random
    queue_position: int | None = None
    sequence: CachedSequence | None = None
    cached_tokens: int = 0
    answer_tokens: int = 0
    """Tokens of the answer."""
    next_token: int | None = None
    """The token that was drawn and is not read yet."""
    seconds_to_first: float = 0.0
    finish: Literal["stop", "length"] | None = None
    seen_tokens: Tensor | None = None
    """Which tokens (V,) have been read or drawn, where repeating them is penalized."""

    @property
    def is_prefilling(self) -> bool:
        return self.sequence is not None and self.next_token is None and self.finish is None

    @property
    def max_tokens(self) -> int:
        """So many tokens, as far as can be told."""
        longest = max(min(self.prepared.max_new_tokens, RESERVED_ANSWER_TOKENS), self.answer_tokens)
        return min(self.prepared.context_length, len(self.prepared.tokens) + longest)


class ChatBatch:
    """The batch of one model: what the loop works on together. Joining and leaving is safe from any thread.

    `room` are the bytes that keys, values and adapters of a batch may take; one conversation may, however long it is.
    """

    def __init__(
        self,
        get_cache: Callable[[], SequenceCache],
        get_model: Callable[[], ChatModel],
        get_cache_bytes: Callable[[], int],
    ) -> None:
        self._get_cache, self._get_model, self._get_cache_bytes = get_cache, get_model, get_cache_bytes
        self._lock = threading.Lock()
        self._arrivals: deque[PendingChat] = deque()
        self._unfinished: set[int] = set()
        """All that were not told yet how they ended."""
        self._leaving: set[int] = set()
        self._tokenizer_threads = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer", lower_thread_priority)
        self._preparing: set[int] = set()
        """Those that are made ready on a thread of their own."""
        self._prepared: SimpleQueue[tuple[PendingChat, PreparedChat | Exception]] = SimpleQueue()
        self._waiting: list[ChatSlot] = []
        self._slots: list[ChatSlot] = []

    def join(self, number: int, owner: str, request: Any) -> None:
        with self._lock:
            self._unfinished.add(number)
            self._arrivals.append(PendingChat(number, owner, request, time.monotonic()))

    def leave(self, number: int) -> None:
        with self._lock:
            if number in self._unfinished:
                self._leaving.add(number)

    @property
    def has_work(self) -> bool:
        return bool(self._unfinished)

    def abort(self) -> list[int]:
        with self._lock:
            numbers, self._unfinished = sorted(self._unfinished), set()
            self._arrivals.clear()
            self._leaving.clear()
        self._preparing.clear()
        self._waiting, self._slots = [], []
        with suppress(TrellisError):  # no model is loaded
            self._get_cache().clear()
        return numbers

    def step(self) -> RequestEvents:
        """Let come and go, read a piece of one conversation, and have all others say one more token."""
        events: RequestEvents = []
        self._remove_cancelled(events)
        self._prepare_arrivals(events)
        self._fill_slots(events)
        if prefilling := next((seat for seat in self._slots if seat.is_prefilling), None):
            self._prefill(prefilling, events)
        if decoding := [seat for seat in self._slots if seat.next_token is not None]:
            self._decode(decoding, events)
        with self._lock:
            self._unfinished -= {number for number, _, last in events if last}
        return events

    def _remove_cancelled(self, events: RequestEvents) -> None:
        with self._lock:
            leaving, self._leaving = self._leaving, set()
            cancelled = [each.number for each in self._arrivals if each.number in leaving]
            self._arrivals = deque(each for each in self._arrivals if each.number not in leaving)
        cancelled += self._preparing & leaving
        self._preparing -= leaving
        for seat in [seat for seat in (*self._waiting, *self._slots) if seat.number in leaving]:
            cancelled.append(seat.number)
            self._remove(seat)
        events += [(number, Cancelled(), True) for number in cancelled]

    def _prepare_arrivals(self, events: RequestEvents) -> None:
        """Those that have come, as tokens, for a moment; long ones on threads of their own. What is wrong with one is
        said to it alone."""
        until = time.monotonic() + PREPARE_SECONDS
        while self._arrivals and time.monotonic() < until:
            with self._lock:
                arrival = self._arrivals.popleft()
            if arrival.is_long:
                self._preparing.add(arrival.number)
                self._tokenizer_threads.submit(lambda each: self._prepared.put((each, self._prepare(each))), arrival)
            else:
                self._enqueue(arrival, self._prepare(arrival), events)
        is_idle = not (events or self._slots or self._waiting or self._arrivals)
        with suppress(Empty):
            while self._preparing:
                arrival, prepared = self._prepared.get(is_idle, IDLE_WAIT_SECONDS)
                is_idle = False
                if arrival.number in self._preparing:  # it has not left meanwhile
                    self._preparing.remove(arrival.number)
                    self._enqueue(arrival, prepared, events)

    def _prepare(self, arrival: PendingChat) -> PreparedChat | Exception:
        if arrival.number not in self._unfinished:
            return TimeoutError()
        try:
            return self._get_model().prepare_chat(arrival.request)
        except Exception as error:  # noqa: BLE001 - whatever a template or a tokenizer does; what is not known is logged
            return error

    def _enqueue(self, arrival: PendingChat, prepared: PreparedChat | Exception, events: RequestEvents) -> None:
        if isinstance(prepared, Exception):
            events.append((arrival.number, explain_error(prepared), True))
            return
        request = arrival.request
        answer = AnswerText(IncrementalDetokenizer(self._get_model().tokenizer, prepared.tokens), prepared.stop)
        rng = random.Random(request.seed)
        self._waiting.append(ChatSlot(arrival.number, arrival.owner, request, arrival.arrived, prepared, answer, rng))

    def _fill_slots(self, events: RequestEvents) -> None:
        """Give seats to those that wait, as long as there are any."""
        while self._waiting:
            slots_by_owner = Counter(slot.owner for slot in self._slots)
            seat = min(self._waiting, key=lambda seat: slots_by_owner[seat.owner])
            if self._slots and not self._fits_in_cache(seat):
                break
            try:
                seat.sequence = self._get_cache().start(seat.request.weights, seat.prepared.tokens)
            except Exception as error:  # noqa: BLE001 - of one conversation alone
                events.append((seat.number, explain_error(error), True))
                self._waiting.remove(seat)
                continue
            self._waiting.remove(seat)
            seat.cached_tokens = len(seat.sequence.tokens)
            self._slots.append(seat)
            self._report_prompt_read(seat, events)
        for place, seat in enumerate(self._waiting, start=1):
            if seat.queue_position is None or place < seat.queue_position:
                seat.queue_position = place
                events.append((seat.number, QueuePosition(place=place), False))

    def _fits_in_cache(self, slot: ChatSlot) -> bool:
        slots = (*self._slots, slot)
        longest = max(each.max_tokens for each in slots)
        needed = self._get_cache().bytes_for(len(slots), longest, {each.request.weights for each in slots})
        return len(slots) <= MAX_SLOTS and needed <= self._get_cache_bytes()

    def _prefill(self, slot: ChatSlot, events: RequestEvents) -> None:
        """Read a piece, after the others that read have had their turn; at the end the first token is drawn."""
        assert slot.sequence is not None
        tokens = slot.prepared.tokens
        prefilled = len(slot.sequence.tokens)
        try:
            chunk = len(tokens) if self._get_cache().reads_in_one_chunk else PREFILL_TOKENS
            logits = self._get_cache().prefill(slot.sequence, tokens[prefilled : prefilled + chunk])
        except Exception as error:  # noqa: BLE001 - of one conversation alone: the others have not been touched
            self._fail(slot, error, events)
            return
        self._slots.remove(slot)
        self._slots.append(slot)
        self._report_prompt_read(slot, events)
        if len(slot.sequence.tokens) == len(tokens):
            self._sample([slot], logits[None], events)

    def _decode(self, slots: list[ChatSlot], events: RequestEvents) -> None:
        sequences = [seat.sequence for seat in slots if seat.sequence is not None]
        try:
            logits = self._get_cache().decode(
                sequences, [seat.next_token for seat in slots if seat.next_token is not None]
            )
        except Exception as error:
            if len(slots) == 1 or explain_error(error).code != "out_of_memory":
                raise
            # Nobody has grown. The one that takes the most ends, the others go on in the room that it leaves.
            self._fail(max(slots, key=lambda seat: len(seat.prepared.tokens) + seat.answer_tokens), error, events)
            return
        self._sample(slots, logits, events)

    def _sample(self, slots: list[ChatSlot], logits: Tensor, events: RequestEvents) -> None:
        """The next token of each, from logits (R, V). One whose row holds no numbers ends, and says why."""
        with torch.inference_mode():
            tokens = sample_each(logits, slots, self._get_model().end_tokens)
            for seat, token, row in zip(slots, tokens, logits, strict=True):
                if token is None:
                    assert seat.sequence is not None
                    self._fail(seat, seat.sequence.error or overflow_error(), events)
                else:
                    self._append_token(seat, token, row, events)

    def _append_token(self, slot: ChatSlot, token: int, logits: Tensor, events: RequestEvents) -> None:
        slot.answer_tokens += 1
        slot.next_token = token
        slot.seconds_to_first = slot.seconds_to_first or time.monotonic() - slot.arrived
        if token in self._get_model().end_tokens:
            slot.finish = "stop"
        else:
            sampled = self._sampled_token(slot, token, logits) if slot.request.top is not None else None
            slot.answer.add(token, sampled, check_stops=slot.answer_tokens >= slot.request.min_tokens)
            if (
                slot.answer_tokens == slot.prepared.max_new_tokens
                or len(slot.prepared.tokens) + slot.answer_tokens >= slot.prepared.context_length
            ):
                slot.finish = "length"
        if slot.finish:
            slot.answer.end()
        if slot.answer.stopped:
            slot.finish = "stop"
        text, sampled_tokens = slot.answer.take(ended=slot.finish is not None)
        if text or sampled_tokens:
            events.append((slot.number, TextDelta(text=text, tokens=slot.answer_tokens, drawn=sampled_tokens), False))
        if slot.finish:
            events.append((slot.number, self._answer_done(slot, slot.finish), True))
            self._remove(slot)

    def _answer_done(self, slot: ChatSlot, finish: Literal["stop", "length"]) -> AnswerDone:
        return AnswerDone(
            finish=finish,
            tokens=slot.answer_tokens,
            prompt_tokens=len(slot.prepared.tokens),
            seconds_to_first=slot.seconds_to_first,
            seconds=time.monotonic() - slot.arrived,
        )

    def _report_prompt_read(self, slot: ChatSlot, events: RequestEvents) -> None:
        assert slot.sequence is not None
        prompt_read = PromptRead(
            read=len(slot.sequence.tokens), prompt_tokens=len(slot.prepared.tokens), warm=slot.cached_tokens,
            left_out=slot.prepared.left_out, context_length=slot.prepared.context_length,
            in_thought=slot.prepared.in_thinking,
        )  # fmt: skip
        events.append((slot.number, prompt_read, False))

    def _sampled_token(self, slot: ChatSlot, token: int, logits: Tensor) -> SampledToken:
        """A token with its log-probability at temperature 1, and those of the likeliest with what they would write."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        values, candidates = logprobs.topk(min(slot.request.top or 0, len(logprobs)))
        vocabulary = vocabulary_of(self._get_model().tokenizer)
        top = []
        for place, value in zip(candidates.tolist(), values.tolist(), strict=True):
            special = vocabulary.is_special(place)
            name = vocabulary.name(place) if special else ""
            top.append((*token_label(slot.answer.detokenizer.peek(place), name, special), value))
        return SampledToken(text="", bytes=(), logprob=float(logprobs[token]), top=tuple(top))

    def _fail(self, slot: ChatSlot, error: Exception, events: RequestEvents) -> None:
        """End one conversation with an error; nothing of what it has read is used again."""
        events.append((slot.number, explain_error(error), True))
        self._remove(slot, keep_prefix=False)

    def _remove(self, slot: ChatSlot, keep_prefix: bool = True) -> None:
        if slot.sequence is not None:
            self._get_cache().release(slot.sequence, keep_prefix)
            self._slots.remove(slot)
        else:
            self._waiting.remove(slot)


def sample_each(logits: Tensor, slots: list[ChatSlot], end_tokens: frozenset[int] = frozenset()) -> list[int | None]:
    """A token for each row of logits (R, V), each by the sampling that was asked for it; None where a row holds NaN or
    infinity."""
    device = logits.device
    samplings = [seat.request.sampling for seat in slots]
    if any(seat.request.repetition_penalty != 1 or seat.answer_tokens < seat.request.min_tokens for seat in slots):
        logits = torch.stack([_apply_penalties(row, seat, end_tokens) for row, seat in zip(logits, slots, strict=True)])

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    scaled = logits.float() / column([1.0 if is_greedy(each) else each.temperature for each in samplings])
    for row, seat in enumerate(slots):
        if 0 < seat.request.top_k < scaled.shape[-1]:
            threshold = scaled[row].topk(seat.request.top_k).values[-1]
            scaled[row] = scaled[row].masked_fill(scaled[row] < threshold, float("-inf"))
    uniforms = torch.tensor([seat.rng.random() * (1 - 2**-20) for seat in slots], device=device)
    top_p: float | Tensor = (
        column([each.top_p for each in samplings]) if any(each.top_p < 1 for each in samplings) else 1.0
    )
    sampled, logprobs = sample_scaled(scaled, column([each.min_p for each in samplings]), top_p, uniforms)
    if any(map(is_greedy, samplings)):
        greedy = torch.tensor(list(map(is_greedy, samplings)), device=device)
        sampled = torch.where(greedy, scaled.argmax(dim=-1), sampled)
    tokens: list[int] = sampled.masked_fill(logprobs.isnan(), -1).tolist()
    return [None if token < 0 else token for token in tokens]


def _apply_penalties(logits: Tensor, slot: ChatSlot, end_tokens: frozenset[int]) -> Tensor:
    """A row of logits (V,) in which what was read or said before is less likely by the repetition penalty (CTRL, arXiv
    1909.05858), and an end is impossible before the least number of tokens."""
    logits = logits.float()
    if (penalty := slot.request.repetition_penalty) != 1:
        if slot.seen_tokens is None:
            slot.seen_tokens = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
            slot.seen_tokens[slot.prepared.tokens] = True
        if slot.next_token is not None:
            slot.seen_tokens[slot.next_token] = True
        changed = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(slot.seen_tokens, changed, logits)
    if slot.answer_tokens < slot.request.min_tokens and end_tokens:
        known = [token for token in end_tokens if token < len(logits)]
        logits = logits.index_fill(0, torch.tensor(known, device=logits.device, dtype=torch.long), float("-inf"))
    return logits


def conversation_too_long(tokens: int, limit: int, at_least: bool = False) -> Invalid:
    counted = f"at least {tokens}" if at_least else str(tokens)
    return Invalid(
        f"The conversation has {counted} tokens; with room for an answer it does not fit into the context of {limit}.",
        code="prompt_too_long",
        field="messages",
        next_step="Shorten the last message, or use a model with a longer context.",
    )
