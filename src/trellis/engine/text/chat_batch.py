"""Continuous batching of chats with one model: a conversation gets a slot when there is room, is prefilled in chunks
between the decode steps of the others, and leaves when its answer is complete or cancelled.

Among waiting conversations, the next one is of the owner with the fewest slots. It does not know rooms or sockets.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import TrellisError
from ...messages import AnswerDone, Cancelled, PromptRead, QueuePosition, SampledToken, TextDelta
from ..known_errors import explain_error
from ..parallel import lower_thread_priority
from ..scheduler import RequestEvents
from .answer_text import AnswerText, token_label
from .chat_sampling import sample_each
from .chat_slots import ChatModel, ChatSlot, PendingChat, PreparedChat
from .kv_cache import SequenceCache
from .sampling import overflow_error
from .vocabulary import IncrementalDetokenizer, vocabulary_of

PREFILL_TOKENS = 256
"""Tokens of a conversation prefilled between two decode steps."""

MAX_SLOTS = 64
"""Conversations in one batch."""


PREPARE_SECONDS = 0.01
"""How long arriving conversations are prepared within one step."""


TOKENIZER_THREADS = 2
"""Threads that prepare long conversations."""

IDLE_WAIT_SECONDS = 0.005
"""How long an otherwise idle step waits for a conversation being prepared."""


class ChatBatch:
    """The batch of one model, run by the scheduler. `join` and `leave` are thread-safe.

    `get_cache_bytes` limits the KV cache and adapters of the batch; a single conversation may always run, however long
    it is.
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
        """Ids of requests that have not had their last event."""
        self._leaving: set[int] = set()
        self._tokenizer_threads = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer", lower_thread_priority)
        self._preparing: set[int] = set()
        """Ids of requests being prepared on a thread of their own."""
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
        """Add and remove conversations, prefill a chunk of one, and decode a token of all others."""
        events: RequestEvents = []
        self._remove_cancelled(events)
        self._prepare_arrivals(events)
        self._fill_slots(events)
        if prefilling := next((slot for slot in self._slots if slot.is_prefilling), None):
            self._prefill(prefilling, events)
        if decoding := [slot for slot in self._slots if slot.next_token is not None]:
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
        for slot in [slot for slot in (*self._waiting, *self._slots) if slot.number in leaving]:
            cancelled.append(slot.number)
            self._remove(slot)
        events += [(number, Cancelled(), True) for number in cancelled]

    def _prepare_arrivals(self, events: RequestEvents) -> None:
        """Tokenize arriving conversations for a moment; long ones on other threads. An error is reported to its own
        request only."""
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
                if arrival.number in self._preparing:  # not cancelled meanwhile
                    self._preparing.remove(arrival.number)
                    self._enqueue(arrival, prepared, events)

    def _prepare(self, arrival: PendingChat) -> PreparedChat | Exception:
        if arrival.number not in self._unfinished:
            return TimeoutError()
        try:
            return self._get_model().prepare_chat(arrival.request)
        except Exception as error:  # noqa: BLE001 - from a template or a tokenizer; unknown errors are logged
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
        """Give free slots to waiting conversations."""
        while self._waiting:
            slots_by_owner = Counter(slot.owner for slot in self._slots)
            slot = min(self._waiting, key=lambda slot: slots_by_owner[slot.owner])
            if self._slots and not self._fits_in_cache(slot):
                break
            try:
                slot.sequence = self._get_cache().start(slot.request.weights, slot.prepared.tokens)
            except Exception as error:  # noqa: BLE001 - affects one conversation only
                events.append((slot.number, explain_error(error), True))
                self._waiting.remove(slot)
                continue
            self._waiting.remove(slot)
            slot.cached_tokens = len(slot.sequence.tokens)
            self._slots.append(slot)
            self._report_prompt_read(slot, events)
        for place, slot in enumerate(self._waiting, start=1):
            if slot.queue_position is None or place < slot.queue_position:
                slot.queue_position = place
                events.append((slot.number, QueuePosition(place=place), False))

    def _fits_in_cache(self, slot: ChatSlot) -> bool:
        slots = (*self._slots, slot)
        longest = max(each.max_tokens for each in slots)
        needed = self._get_cache().bytes_for(len(slots), longest, {each.request.weights for each in slots})
        return len(slots) <= MAX_SLOTS and needed <= self._get_cache_bytes()

    def _prefill(self, slot: ChatSlot, events: RequestEvents) -> None:
        """Prefill a chunk and move the slot to the end of the queue; sample the first token after the last chunk."""
        assert slot.sequence is not None
        tokens = slot.prepared.tokens
        prefilled = len(slot.sequence.tokens)
        try:
            chunk = len(tokens) if self._get_cache().reads_in_one_chunk else PREFILL_TOKENS
            logits = self._get_cache().prefill(slot.sequence, tokens[prefilled : prefilled + chunk])
        except Exception as error:  # noqa: BLE001 - affects one conversation only: the others are untouched
            self._fail(slot, error, events)
            return
        self._slots.remove(slot)
        self._slots.append(slot)
        self._report_prompt_read(slot, events)
        if len(slot.sequence.tokens) == len(tokens):
            self._sample([slot], logits[None], events)

    def _decode(self, slots: list[ChatSlot], events: RequestEvents) -> None:
        sequences = [slot.sequence for slot in slots if slot.sequence is not None]
        try:
            logits = self._get_cache().decode(
                sequences, [slot.next_token for slot in slots if slot.next_token is not None]
            )
        except Exception as error:
            if len(slots) == 1 or explain_error(error).code != "out_of_memory":
                raise
            # No sequence has grown. End the one that takes the most memory; the others continue in the room it leaves.
            self._fail(max(slots, key=lambda slot: len(slot.prepared.tokens) + slot.answer_tokens), error, events)
            return
        self._sample(slots, logits, events)

    def _sample(self, slots: list[ChatSlot], logits: Tensor, events: RequestEvents) -> None:
        """Sample each slot's next token from logits (R, V). A slot whose logits are not finite ends with an error."""
        with torch.inference_mode():
            tokens = sample_each(logits, slots, self._get_model().end_tokens)
            for slot, token, row in zip(slots, tokens, logits, strict=True):
                if token is None:
                    assert slot.sequence is not None
                    self._fail(slot, slot.sequence.error or overflow_error(), events)
                else:
                    self._append_token(slot, token, row, events)

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
        """Return a token with its log-probability at temperature 1, and those of the likeliest candidates."""
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
        """End one conversation with an error; its sequence is not kept as a prefix."""
        events.append((slot.number, explain_error(error), True))
        self._remove(slot, keep_prefix=False)

    def _remove(self, slot: ChatSlot, keep_prefix: bool = True) -> None:
        if slot.sequence is not None:
            self._get_cache().release(slot.sequence, keep_prefix)
            self._slots.remove(slot)
        else:
            self._waiting.remove(slot)
