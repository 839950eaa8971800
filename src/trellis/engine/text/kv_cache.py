"""The KV cache of a chat batch: sequences of different lengths, each with its own weights, that grow by one token per
step. Ended conversations are kept as prefixes for their next turn.

It knows models and tokens; not text, sampling or requests.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...options import Adapter
from .adapters import AdapterSlots
from .cache_support import ModelCache
from .fast_forward import AdaptedLayers, FastForward, KVCache
from .fused_layers import FusedLayer
from .group_forward import GenericGroupForward
from .stacked_adapters import FindWeights, StackedAdapters

log = logging.getLogger(__name__)

CAPACITY_MULTIPLE = 64
"""Capacities in positions are multiples of this."""


MAX_SINGLE_TOKEN_STEPS = 64
"""Up to this many tokens are read one by one rather than with all before them, where a model can only do either."""

MAX_PREFIXES = 64
"""How many prefixes are kept, least recently used first out."""


@dataclass(eq=False)
class CachedSequence:
    """One conversation: the tokens read, and the weights they were read with (empty: the base model)."""

    weights: str
    tokens: list[int] = field(default_factory=list)
    error: Exception | None = None
    """Why the last token could not be read."""


class SequenceCache(ABC):
    """All sequences of one model. Not thread-safe."""

    @property
    def reads_in_one_chunk(self) -> bool:
        """Whether a text should be read in one chunk, since what follows a first chunk is read token by token."""
        return False

    @abstractmethod
    def start(self, weights: str, tokens: Sequence[int]) -> CachedSequence:
        """Start a sequence with the longest cached prefix of some tokens, without the last one. Raises
        WeightsMissing."""

    @abstractmethod
    def prefill(self, sequence: CachedSequence, tokens: Sequence[int]) -> Tensor:
        """Read tokens into a sequence. Returns logits (V,) after the last one."""

    @abstractmethod
    def decode(self, sequences: Sequence[CachedSequence], ids: Sequence[int]) -> Tensor:
        """Read one token into each of some sequences. Returns logits (R, V); NaN for a sequence that failed, which then
        has an `error`."""

    @abstractmethod
    def release(self, sequence: CachedSequence, keep_prefix: bool = True) -> None:
        """End a sequence. Keep what it has read as a prefix while there is room, if `keep_prefix`; else it may hold NaN
        and is zeroed."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all sequences after a step failed midway. Needs no memory."""

    @abstractmethod
    def bytes_for(self, sequences: int, tokens: int, weights: Collection[str]) -> int:
        """Return the bytes that so many sequences take, the longest of so many tokens, with these weights among
        them."""


def sequence_cache_for(
    slots: AdapterSlots, fast_forward: FastForward | None, find_weights: FindWeights, prefix_bytes: int
) -> SequenceCache:
    """Return the sequence cache of a loaded model. `prefix_bytes` limits the prefixes of ended
    conversations in the fast cache; the generic one keeps a few."""
    generic = GenericSequenceCache(slots, find_weights)
    return (
        generic
        if fast_forward is None or fast_forward.window is not None
        else FastSequenceCache(fast_forward, find_weights, prefix_bytes, generic)
    )


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # binary search: comparing slices is much faster than single tokens
        middle = (low + high + 1) // 2
        if list(first[low:middle]) == list(second[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(eq=False)
class CachedPrefix:
    """A prefix read before. `keys_values`: (layers, 2, kv heads, T, D)."""

    tokens: list[int]
    keys_values: Tensor


class FastSequenceCache(SequenceCache):
    """Through the fast forward pass: one batch, in which each row has its own length and adapter. Sequences with an
    adapter that it does not support use the generic cache."""

    def __init__(
        self, fast_forward: FastForward, find_weights: FindWeights, prefix_bytes: int, generic: GenericSequenceCache
    ) -> None:
        self._fast_forward, self._find_weights, self._generic = fast_forward, find_weights, generic
        self._sequences: list[CachedSequence] = []
        """The sequence of each row."""
        self._cache = KVCache.empty(fast_forward, 0, CAPACITY_MULTIPLE)
        self._rows = 0
        self._capacity = CAPACITY_MULTIPLE
        self._adapters = StackedAdapters(fast_forward, find_weights)
        self._layers: tuple[list[str], list[FusedLayer]] | None = None
        """The layers for decoding all rows, and the weights they are for."""
        self._max_prefix_bytes = prefix_bytes
        self._prefixes: OrderedDict[tuple[str, int], CachedPrefix] = OrderedDict()
        self._prefix_number = 0

    def start(self, weights: str, tokens: Sequence[int]) -> CachedSequence:
        if weights:
            slot, _ = self._find_weights(weights)
            if not AdaptedLayers.is_supported(self._fast_forward, slot.slices):
                return self._generic.start(weights, tokens)
            self._adapters.add(weights, {sequence.weights for sequence in self._sequences})
            self._layers = None  # an unused adapter may have been replaced
        line = CachedSequence(weights)
        key, prefix_length, best = None, 0, None
        for (of, number), each in self._prefixes.items():
            if of == weights and (common := common_prefix_length(each.tokens, tokens)) > prefix_length:
                key, prefix_length, best = (of, number), common, each
        prefix_length = min(prefix_length, len(tokens) - 1)
        self._reserve(prefix_length + 2, len(self._sequences) + 1)
        if best is not None and key is not None and prefix_length > 0:
            self._prefixes.move_to_end(key)
            row = len(self._sequences)
            with torch.inference_mode():
                for number, (keys, values) in enumerate(zip(self._cache.keys, self._cache.values, strict=True)):
                    keys[row, :, :prefix_length] = best.keys_values[number, 0, :, :prefix_length]
                    values[row, :, :prefix_length] = best.keys_values[number, 1, :, :prefix_length]
            line.tokens += tokens[:prefix_length]
        self._sequences.append(line)  # the row exists from now on
        return line

    def prefill(self, sequence: CachedSequence, tokens: Sequence[int]) -> Tensor:
        if isinstance(sequence, GenericSequence):
            return self._generic.prefill(sequence, tokens)
        row, start = self._sequences.index(sequence), len(sequence.tokens)
        self._reserve(start + len(tokens) + 1, len(self._sequences))
        layers = self._adapters.layers([sequence.weights])
        fast_forward = self._fast_forward
        with torch.inference_mode():
            one = slice(row, row + 1)
            keys, values = ([each[one] for each in both] for both in (self._cache.keys, self._cache.values))
            ids = torch.tensor([list(tokens)], device=fast_forward.device)
            logits = fast_forward.logits(fast_forward.forward(layers, ids, KVCache(keys, values, start))[:, -1])[0]
        sequence.tokens += tokens
        return logits

    def decode(self, sequences: Sequence[CachedSequence], ids: Sequence[int]) -> Tensor:
        generic_places = [place for place, line in enumerate(sequences) if isinstance(line, GenericSequence)]
        if generic_places:
            own_places = [place for place in range(len(sequences)) if place not in generic_places]
            parts = [
                of.decode([sequences[place] for place in places], [ids[place] for place in places])
                for of, places in ((self._generic, generic_places), (self, own_places))
                if places
            ]
            order = torch.tensor([*generic_places, *own_places], device=self._fast_forward.device).argsort()
            return torch.cat(parts)[order]
        # Rows that only wait read a dummy token, in a position that is overwritten when they continue.
        lengths = [len(line.tokens) for line in self._sequences]
        capacity = max(lengths) + 1
        self._reserve(capacity, len(self._sequences))
        weights = [line.weights for line in self._sequences]
        if self._layers is None or self._layers[0] != weights:
            self._layers = weights, self._adapters.layers(weights)
        fast_forward, device = self._fast_forward, self._fast_forward.device
        next_tokens = dict(zip(sequences, ids, strict=True))
        with torch.inference_mode():
            input_ids = torch.tensor([next_tokens.get(line, 0) for line in self._sequences], device=device)
            hidden = fast_forward.step(
                self._layers[1], input_ids, self._cache, torch.tensor(lengths, device=device), capacity
            )
            logits = fast_forward.logits(hidden[[self._sequences.index(line) for line in sequences]])
        for line, token in next_tokens.items():
            line.tokens.append(token)
        return logits

    def release(self, sequence: CachedSequence, keep_prefix: bool = True) -> None:
        if isinstance(sequence, GenericSequence):
            self._generic.release(sequence, keep_prefix)
            return
        row = self._sequences.index(sequence)
        if keep_prefix:
            try:
                self._keep_prefix(sequence, row)
            except (MemoryError, RuntimeError):  # no memory for the prefix; all others continue
                log.warning("a conversation of %d tokens could not be kept warm", len(sequence.tokens), exc_info=True)
        else:  # masked positions only count nothing if they are finite: 0 × NaN is NaN
            with torch.inference_mode():
                for each in (*self._cache.keys, *self._cache.values):
                    each[row].zero_()
        last = self._sequences.pop()
        if last is not sequence:  # the last row moves to the free place
            self._sequences[row] = last
            with torch.inference_mode():
                for each in (*self._cache.keys, *self._cache.values):
                    each[row, :, : len(last.tokens)] = each[len(self._sequences), :, : len(last.tokens)]
        if not self._sequences:  # give memory back that many or long sequences needed
            self._clear_rows()
            self._adapters.release_unused()

    def clear(self) -> None:
        self._sequences.clear()
        self._prefixes.clear()
        self._adapters.clear()
        self._clear_rows()
        self._generic.clear()

    def bytes_for(self, sequences: int, tokens: int, weights: Collection[str]) -> int:
        fast_forward = self._fast_forward
        bytes_per_sequence = (
            2
            * len(fast_forward.layers)
            * fast_forward.kv_heads
            * tokens
            * fast_forward.head_dim
            * fast_forward.embedding.element_size()
        )
        return (
            sequences * bytes_per_sequence + sum(bool(each) for each in set(weights)) * self._adapters.bytes_per_adapter
        )

    def _clear_rows(self) -> None:
        self._rows, self._capacity, self._cache = (
            0,
            CAPACITY_MULTIPLE,
            KVCache.empty(self._fast_forward, 0, CAPACITY_MULTIPLE),
        )
        self._layers = None  # it refers to adapters that may have been replaced

    def _keep_prefix(self, sequence: CachedSequence, row: int) -> None:
        length = len(sequence.tokens)
        if not length or self.bytes_for(1, length, ()) > self._max_prefix_bytes:
            return
        for key, each in list(self._prefixes.items()):
            if key[0] == sequence.weights and common_prefix_length(each.tokens, sequence.tokens) == len(each.tokens):
                del self._prefixes[key]  # a prefix of the new one
        keys_values = torch.stack([
            torch.stack([keys[row, :, :length], values[row, :, :length]])
            for keys, values in zip(self._cache.keys, self._cache.values, strict=True)
        ])  # fmt: skip
        self._prefix_number += 1
        self._prefixes[sequence.weights, self._prefix_number] = CachedPrefix(list(sequence.tokens), keys_values)
        while (
            len(self._prefixes) > MAX_PREFIXES
            or sum(each.keys_values.nbytes for each in self._prefixes.values()) > self._max_prefix_bytes
        ):
            self._prefixes.popitem(last=False)

    def _reserve(self, length: int, rows: int) -> None:
        """Ensure capacity for so many positions in so many rows."""
        capacity = self._capacity
        if length > capacity:
            capacity = -(-max(length, capacity + capacity // 2) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        rows = self._rows if rows <= self._rows else max(4, rows, self._rows + self._rows // 2)
        if (rows, capacity) == (self._rows, self._capacity):
            return
        with torch.inference_mode():
            old, made = self._cache, KVCache.empty(self._fast_forward, rows, capacity)
            filled = max((len(line.tokens) for line in self._sequences), default=0)
            for mine, theirs in ((made.keys, old.keys), (made.values, old.values)):
                for here, there in zip(mine, theirs, strict=True):
                    here.zero_()  # masked values must be finite
                    here[: len(self._sequences), :, :filled] = there[: len(self._sequences), :, :filled]
        self._cache, self._rows, self._capacity = made, rows, capacity


@dataclass(eq=False)
class GenericSequence(CachedSequence):
    cache: ModelCache = field(kw_only=True)


class GenericSequenceCache(SequenceCache):
    """Through transformers' forward pass, for any causal model: sequences take turns within a step."""

    MAX_PREFIXES = 4
    """How many ended sequences are kept as they are."""

    def __init__(self, slots: AdapterSlots, find_weights: FindWeights) -> None:
        self._slots, self._find_weights = slots, find_weights
        self._prefixes: list[GenericSequence] = []

    @property
    def reads_in_one_chunk(self) -> bool:
        return self._slots.cache_support.chunks == "single"

    def start(self, weights: str, tokens: Sequence[int]) -> CachedSequence:
        forward = self._forward(weights)
        best, prefix_length = None, 0
        for each in self._prefixes:
            if (
                each.weights == weights
                and (common := min(common_prefix_length(each.tokens, tokens), len(tokens) - 1)) > prefix_length
            ):
                best, prefix_length = each, common
        is_slow = self.reads_in_one_chunk and len(tokens) - prefix_length > MAX_SINGLE_TOKEN_STEPS
        if (
            best is None
            or is_slow
            or not (len(best.tokens) == prefix_length or best.cache.crop(len(best.tokens) - prefix_length))
        ):
            return GenericSequence(weights, cache=forward.new_cache())
        self._prefixes.remove(best)
        best.tokens = best.tokens[:prefix_length]
        return best

    def prefill(self, sequence: CachedSequence, tokens: Sequence[int]) -> Tensor:
        assert isinstance(sequence, GenericSequence)
        forward = self._forward(sequence.weights)
        ids = torch.tensor([list(tokens)], device=forward.device)
        logits = forward.run(ids, sequence.cache, not sequence.weights, last=True)[0, -1]
        sequence.tokens += tokens
        return logits

    def decode(self, sequences: Sequence[CachedSequence], ids: Sequence[int]) -> Tensor:
        rows: list[Tensor | None] = []
        for line, token in zip(sequences, ids, strict=True):
            try:
                rows.append(self.prefill(line, [token]))
            except Exception as error:  # noqa: BLE001 - of one sequence only: reported to its request
                line.error = error
                rows.append(None)
        like = next((row for row in rows if row is not None), None)
        if like is None:
            slot = self._slots.get(Adapter())
            like = torch.empty(slot.model.config.get_text_config().vocab_size, device=slot.flat.device)
        return torch.stack([torch.full_like(like, float("nan")) if row is None else row for row in rows])

    def release(self, sequence: CachedSequence, keep_prefix: bool = True) -> None:
        assert isinstance(sequence, GenericSequence)
        if sequence.tokens and keep_prefix:
            self._prefixes = [*self._prefixes[1 - self.MAX_PREFIXES :], sequence]

    def clear(self) -> None:
        self._prefixes = []

    def bytes_for(self, sequences: int, tokens: int, weights: Collection[str]) -> int:
        return sequences * self._slots.cache_support.bytes_for(tokens)

    def _forward(self, weights: str) -> GenericGroupForward:
        if weights:
            slot, found = self._find_weights(weights)
            return GenericGroupForward(slot, found.flat)
        slot = self._slots.get(Adapter())
        return GenericGroupForward(slot, slot.zero_moments)
