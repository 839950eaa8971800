"""The keys and values of many conversations at once: lines of different lengths, each with weights of its own, that
grow by one token a step together. What a conversation began with is kept warm for its next turn.

It knows models and tokens; not text, sampling or who asks.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...params import Adapter
from .adapters import Slot, Slots, Weights
from .cache_support import Past
from .fast_forward import Adapted, Cache, Layer, Lean, Linear, Mix
from .group_forward import GeneralForward

log = logging.getLogger(__name__)

ROUND = 64
"""Room for positions is taken in steps of this."""

SPARE = 8
"""Adapters that stay beside the others when nobody talks to them any more, for a next message."""

FEW = 64
"""So many tokens are rather read one by one than with all that was before them, where a model knows only these ways."""

KEPT = 64
"""So many conversations at most are kept warm, those that were read last."""

Find = Callable[[str], tuple[Slot, Weights]]
"""Weights by id, and the slot that they go into. Raises WeightsMissing."""


@dataclass(eq=False)
class Line:
    """One conversation: the tokens that have been read into it, under which weights (none: the base model's)."""

    weights: str
    tokens: list[int] = field(default_factory=list)
    error: Exception | None = None
    """Why a token could not be read into it, after it was to grow."""


class Lines(ABC):
    """All lines of one model. Not safe to use from two threads at once."""

    @property
    def reads_whole(self) -> bool:
        """Whether a text is best read in one piece, since what follows a first piece is read token by token."""
        return False

    @abstractmethod
    def begin(self, weights: str, tokens: Sequence[int]) -> Line:
        """A line that has read as much of some tokens as is warm, and at least the last one not. Raises
        WeightsMissing."""

    @abstractmethod
    def read(self, line: Line, tokens: Sequence[int]) -> Tensor:
        """Read tokens into a line. Returns logits (V,) after the last one."""

    @abstractmethod
    def grow(self, lines: Sequence[Line], ids: Sequence[int]) -> Tensor:
        """Read one token into each of some lines. Returns logits (R, V); NaN for a line that could not be read, which
        says why in its `error`."""

    @abstractmethod
    def end(self, line: Line, keep: bool = True) -> None:
        """A line is not needed any more; what it has read is kept warm as long as there is room, if it is to be
        kept. What is not may hold NaN, and is wiped."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all lines, after something failed in the midst of them. Needs no memory."""

    @abstractmethod
    def takes(self, lines: int, tokens: int, weights: Collection[str]) -> int:
        """Bytes that so many lines take, the longest of so many tokens, with these weights among them."""


def lines_of(slots: Slots, lean: Lean | None, find: Find, warm: int) -> Lines:
    """The lines of a loaded model. `warm` bytes are kept of conversations that have ended."""
    general = GeneralLines(slots, find)
    return general if lean is None or lean.window is not None else LeanLines(lean, find, warm, general)


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # whole slices are compared much faster than places one by one
        middle = (low + high + 1) // 2
        if list(one[low:middle]) == list(other[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(eq=False)
class Warm:
    """What was read before. `kept`: (layers, 2, kv heads, T, D)."""

    tokens: list[int]
    kept: Tensor


class Beside:
    """The adapters of a batch, each in a place of its own beside the others; only one that is new is written."""

    def __init__(self, lean: Lean, find: Find) -> None:
        self._lean, self._find = lean, find
        self._places: dict[str, int] = {}
        self._downs: list[list[Tensor]] = []
        self._ups: list[list[Tensor]] = []
        """Of each linear layer of each layer: (K, in, r) and (K, r, out)."""

    @property
    def bytes_of_one(self) -> int:
        """What one more adapter takes; 0 where none is known yet."""
        return sum(each[0].nbytes for both in (self._downs, self._ups) for layer in both for each in layer)

    def take(self, weights: str, used: Collection[str]) -> int:
        """The place of some weights, which are put there if need be; `used` stay. Raises WeightsMissing."""
        if weights in self._places:  # an id names what never changes
            return self._places[weights]
        slot, found = self._find(weights)
        with torch.inference_mode():
            adapted = slot.beside(self._lean)
            adapted.install(found.flat)
            return self._put(weights, adapted.layers, used)

    def layers(self, weights: Sequence[str]) -> list[Layer]:
        """The layers for rows with these weights, all of which have a place."""
        places = [self._places[each] if each else None for each in weights]
        if all(place is None for place in places):
            return self._lean.layers
        with torch.inference_mode():
            mix = Mix(places, len(self._downs[0][0]), self._lean.device) if len(set(places)) > 1 else None
        only = next(place for place in places if place is not None)
        return [
            self._layer(base, downs, ups, mix, only)
            for base, downs, ups in zip(self._lean.layers, self._downs, self._ups, strict=True)
        ]

    def shrink(self) -> None:
        """Nobody uses any of them: many are not kept."""
        if self._downs and len(self._downs[0][0]) > SPARE:
            self.forget()

    def forget(self) -> None:
        self._places, self._downs, self._ups = {}, [], []

    def _layer(self, base: Layer, downs: list[Tensor], ups: list[Tensor], mix: Mix | None, only: int) -> Layer:
        made = []
        for each, down, up in zip(base.linears(), downs, ups, strict=True):
            both = (down, up) if mix else (down[only].T, up[only])
            made.append(Linear(each.weight, each.bias, each.parts, *both, each.packed, mix))
        qkv, out, gate_up, last = made
        return Layer(base.before_attention, qkv, base.qk_norm, out, base.before_mlp, gate_up, last)

    def _put(self, weights: str, layers: Sequence[Layer], used: Collection[str]) -> int:
        free = [place for each, place in self._places.items() if each not in used]
        there, known = (len(self._downs[0][0]), self._downs[0][0].shape[2]) if self._downs else (0, 0)
        ranks = max((len(each.down) for one in layers for each in one.linears() if each.down is not None), default=1)
        full = len(self._places) == there and not (free and there > SPARE)
        if full or ranks > known:
            self._grow(layers, there + (max(1, there // 4) if full else 0), max(ranks, known))
            there = len(self._downs[0][0])
        place = next((each for each in range(there) if each not in self._places.values()), None)
        if place is None:
            place = free[0]
            self._places = {each: at for each, at in self._places.items() if at != place}
        for layer, downs, ups in zip(layers, self._downs, self._ups, strict=True):
            for each, down, up in zip(layer.linears(), downs, ups, strict=True):
                down[place].zero_()
                up[place].zero_()
                if each.down is not None and each.up is not None:
                    down[place, :, : len(each.down)] = each.down.T
                    up[place, : len(each.up)] = each.up
        self._places[weights] = place
        return place

    def _grow(self, layers: Sequence[Layer], count: int, ranks: int) -> None:
        """Room for so many adapters of such ranks; those that are there stay."""
        old_downs, old_ups = self._downs, self._ups
        weights = [[each.weight for each in one.linears()] for one in layers]
        self._downs = [[each.new_zeros(count, each.shape[1], ranks) for each in one] for one in weights]
        self._ups = [[each.new_zeros(count, ranks, each.shape[0]) for each in one] for one in weights]
        for mine, theirs in zip(self._downs, old_downs, strict=False):
            for here, there in zip(mine, theirs, strict=True):
                here[: len(there), :, : there.shape[2]] = there
        for mine, theirs in zip(self._ups, old_ups, strict=False):
            for here, there in zip(mine, theirs, strict=True):
                here[: len(there), : there.shape[1]] = there


class LeanLines(Lines):
    """Through the lean pass: one batch, in which each row has a length and an adapter of its own. An adapter that the
    lean pass does not know goes the general way."""

    def __init__(self, lean: Lean, find: Find, warm: int, general: GeneralLines) -> None:
        self._lean, self._find, self._general = lean, find, general
        self._lines: list[Line] = []
        """The line of each row."""
        self._cache = Cache.empty(lean, 0, ROUND)
        self._rows = 0
        self._room = ROUND
        self._beside = Beside(lean, find)
        self._layers: tuple[list[str], list[Layer]] | None = None
        """The layers for a step of all rows, and for which weights they are."""
        self._most_warm = warm
        self._warm: OrderedDict[tuple[str, int], Warm] = OrderedDict()
        self._numbers = 0

    def begin(self, weights: str, tokens: Sequence[int]) -> Line:
        if weights:
            slot, _ = self._find(weights)
            if not Adapted.fits(self._lean, slot.slices):
                return self._general.begin(weights, tokens)
            self._beside.take(weights, {line.weights for line in self._lines})
            self._layers = None  # one that nobody used may have been put out
        line = Line(weights)
        key, known, best = None, 0, None
        for (of, number), each in self._warm.items():
            if of == weights and (alike := shared(each.tokens, tokens)) > known:
                key, known, best = (of, number), alike, each
        known = min(known, len(tokens) - 1)
        self._make_room(known + 2, len(self._lines) + 1)
        if best is not None and key is not None and known > 0:
            self._warm.move_to_end(key)
            row = len(self._lines)
            with torch.inference_mode():
                for number, (keys, values) in enumerate(zip(self._cache.keys, self._cache.values, strict=True)):
                    keys[row, :, :known] = best.kept[number, 0, :, :known]
                    values[row, :, :known] = best.kept[number, 1, :, :known]
            line.tokens += tokens[:known]
        self._lines.append(line)  # from now on there is such a row
        return line

    def read(self, line: Line, tokens: Sequence[int]) -> Tensor:
        if isinstance(line, GeneralLine):
            return self._general.read(line, tokens)
        row, start = self._lines.index(line), len(line.tokens)
        self._make_room(start + len(tokens) + 1, len(self._lines))
        layers = self._beside.layers([line.weights])
        lean = self._lean
        with torch.inference_mode():
            one = slice(row, row + 1)
            keys, values = ([each[one] for each in both] for both in (self._cache.keys, self._cache.values))
            ids = torch.tensor([list(tokens)], device=lean.device)
            logits = lean.logits(lean.forward(layers, ids, Cache(keys, values, start))[:, -1])[0]
        line.tokens += tokens
        return logits

    def grow(self, lines: Sequence[Line], ids: Sequence[int]) -> Tensor:
        apart = [place for place, line in enumerate(lines) if isinstance(line, GeneralLine)]
        if apart:
            own = [place for place in range(len(lines)) if place not in apart]
            parts = [
                of.grow([lines[place] for place in places], [ids[place] for place in places])
                for of, places in ((self._general, apart), (self, own))
                if places
            ]
            order = torch.tensor([*apart, *own], device=self._lean.device).argsort()
            return torch.cat(parts)[order]
        # Rows that only wait grow by a token that nobody looks at, in a place that is written over when they go on.
        lengths = [len(line.tokens) for line in self._lines]
        room = max(lengths) + 1
        self._make_room(room, len(self._lines))
        weights = [line.weights for line in self._lines]
        if self._layers is None or self._layers[0] != weights:
            self._layers = weights, self._beside.layers(weights)
        lean, device = self._lean, self._lean.device
        next_of = dict(zip(lines, ids, strict=True))
        with torch.inference_mode():
            fed = torch.tensor([next_of.get(line, 0) for line in self._lines], device=device)
            hidden = lean.step(self._layers[1], fed, self._cache, torch.tensor(lengths, device=device), room)
            logits = lean.logits(hidden[[self._lines.index(line) for line in lines]])
        for line, token in next_of.items():
            line.tokens.append(token)
        return logits

    def end(self, line: Line, keep: bool = True) -> None:
        if isinstance(line, GeneralLine):
            self._general.end(line, keep)
            return
        row = self._lines.index(line)
        if keep:
            try:
                self._keep_warm(line, row)
            except (MemoryError, RuntimeError):  # no room to remember it; whoever else is here goes on
                log.warning("a conversation of %d tokens could not be kept warm", len(line.tokens), exc_info=True)
        else:  # masked places count nothing only where they hold numbers: 0 × NaN is NaN
            with torch.inference_mode():
                for each in (*self._cache.keys, *self._cache.values):
                    each[row].zero_()
        last = self._lines.pop()
        if last is not line:  # the last row moves into the place that is free now
            self._lines[row] = last
            with torch.inference_mode():
                for each in (*self._cache.keys, *self._cache.values):
                    each[row, :, : len(last.tokens)] = each[len(self._lines), :, : len(last.tokens)]
        if not self._lines:  # what many or long ones needed is given back
            self._forget_rows()
            self._beside.shrink()

    def clear(self) -> None:
        self._lines.clear()
        self._warm.clear()
        self._beside.forget()
        self._forget_rows()
        self._general.clear()

    def takes(self, lines: int, tokens: int, weights: Collection[str]) -> int:
        lean = self._lean
        one = 2 * len(lean.layers) * lean.kv_heads * tokens * lean.head_dim * lean.embedding.element_size()
        return lines * one + sum(bool(each) for each in set(weights)) * self._beside.bytes_of_one

    def _forget_rows(self) -> None:
        self._rows, self._room, self._cache = 0, ROUND, Cache.empty(self._lean, 0, ROUND)
        self._layers = None  # it would hold adapters that have been put out

    def _keep_warm(self, line: Line, row: int) -> None:
        length = len(line.tokens)
        if not length or self.takes(1, length, ()) > self._most_warm:
            return
        for key, each in list(self._warm.items()):
            if key[0] == line.weights and shared(each.tokens, line.tokens) == len(each.tokens):
                del self._warm[key]  # this one goes on from there
        kept = torch.stack([
            torch.stack([keys[row, :, :length], values[row, :, :length]])
            for keys, values in zip(self._cache.keys, self._cache.values, strict=True)
        ])  # fmt: skip
        self._numbers += 1
        self._warm[line.weights, self._numbers] = Warm(list(line.tokens), kept)
        while len(self._warm) > KEPT or sum(each.kept.nbytes for each in self._warm.values()) > self._most_warm:
            self._warm.popitem(last=False)

    def _make_room(self, length: int, rows: int) -> None:
        """Have room for so many positions in so many rows."""
        room = self._room
        if length > room:
            room = -(-max(length, room + room // 2) // ROUND) * ROUND
        rows = self._rows if rows <= self._rows else max(4, rows, self._rows + self._rows // 2)
        if (rows, room) == (self._rows, self._room):
            return
        with torch.inference_mode():
            old, made = self._cache, Cache.empty(self._lean, rows, room)
            filled = max((len(line.tokens) for line in self._lines), default=0)
            for mine, theirs in ((made.keys, old.keys), (made.values, old.values)):
                for here, there in zip(mine, theirs, strict=True):
                    here.zero_()  # what is masked must still be a number
                    here[: len(self._lines), :, :filled] = there[: len(self._lines), :, :filled]
        self._cache, self._rows, self._room = made, rows, room


@dataclass(eq=False)
class GeneralLine(Line):
    past: Past = field(kw_only=True)


class GeneralLines(Lines):
    """Through transformers' own forward, for any causal model: lines take turns within a step."""

    WARM = 4
    """So many lines that have ended are kept as they are."""

    def __init__(self, slots: Slots, find: Find) -> None:
        self._slots, self._find = slots, find
        self._warm: list[GeneralLine] = []

    @property
    def reads_whole(self) -> bool:
        return self._slots.caching.pieces == "single"

    def begin(self, weights: str, tokens: Sequence[int]) -> Line:
        forward = self._forward(weights)
        best, known = None, 0
        for each in self._warm:
            if each.weights == weights and (alike := min(shared(each.tokens, tokens), len(tokens) - 1)) > known:
                best, known = each, alike
        slow = self.reads_whole and len(tokens) - known > FEW
        if best is None or slow or not (len(best.tokens) == known or best.past.cut(len(best.tokens) - known)):
            return GeneralLine(weights, past=forward.past())
        self._warm.remove(best)
        best.tokens = best.tokens[:known]
        return best

    def read(self, line: Line, tokens: Sequence[int]) -> Tensor:
        assert isinstance(line, GeneralLine)
        forward = self._forward(line.weights)
        ids = torch.tensor([list(tokens)], device=forward.device)
        logits = forward.run(ids, line.past, not line.weights, last=True)[0, -1]
        line.tokens += tokens
        return logits

    def grow(self, lines: Sequence[Line], ids: Sequence[int]) -> Tensor:
        rows: list[Tensor | None] = []
        for line, token in zip(lines, ids, strict=True):
            try:
                rows.append(self.read(line, [token]))
            except Exception as error:  # noqa: BLE001 - of one line alone: it is told to whoever asked for it
                line.error = error
                rows.append(None)
        like = next((row for row in rows if row is not None), None)
        if like is None:
            slot = self._slots.get(Adapter())
            like = torch.empty(slot.model.config.get_text_config().vocab_size, device=slot.flat.device)
        return torch.stack([torch.full_like(like, float("nan")) if row is None else row for row in rows])

    def end(self, line: Line, keep: bool = True) -> None:
        assert isinstance(line, GeneralLine)
        if line.tokens and keep:
            self._warm = [*self._warm[1 - self.WARM :], line]

    def clear(self) -> None:
        self._warm = []

    def takes(self, lines: int, tokens: int, weights: Collection[str]) -> int:
        return lines * self._slots.caching.takes(tokens)

    def _forward(self, weights: str) -> GeneralForward:
        if weights:
            slot, found = self._find(weights)
            return GeneralForward(slot, found.flat)
        slot = self._slots.get(Adapter())
        return GeneralForward(slot, slot.still)
