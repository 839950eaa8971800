"""The keys and values of many conversations at once: lines of different lengths, each with weights of its own, that
grow by one token a step together. What a conversation began with is kept warm for its next turn.

It knows models and tokens; not text, sampling or who asks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..params import Adapter
from .adapters import Slot, Slots, Weights
from .forward import GeneralForward
from .lean import Adapted, Cache, Layer, Lean, side_by_side

ROUND = 64
"""Room for positions is taken in steps of this."""

KEPT = 64
"""So many conversations at most are kept warm, those that were read last."""

Find = Callable[[str], tuple[Slot, Weights]]
"""Weights by id, and the slot that they go into. Raises WeightsMissing."""


@dataclass(eq=False)
class Line:
    """One conversation: the tokens that have been read into it, under which weights (none: the base model's)."""

    weights: str
    tokens: list[int] = field(default_factory=list)


class Lines(ABC):
    """All lines of one model. Not safe to use from two threads at once."""

    @abstractmethod
    def begin(self, weights: str, tokens: Sequence[int]) -> Line:
        """A line that has read as much of some tokens as is warm, and at least the last one not. Raises
        WeightsMissing."""

    @abstractmethod
    def read(self, line: Line, tokens: Sequence[int]) -> Tensor:
        """Read tokens into a line. Returns logits (V,) after the last one."""

    @abstractmethod
    def grow(self, lines: Sequence[Line], ids: Sequence[int]) -> Tensor:
        """Read one token into each of some lines. Returns logits (R, V)."""

    @abstractmethod
    def end(self, line: Line) -> None:
        """A line is not needed any more; what it has read is kept warm as long as there is room."""

    @abstractmethod
    def bytes_for(self, tokens: int) -> int:
        """What a line of so many tokens takes."""


def lines_of(slots: Slots, lean: Lean | None, model: Any, find: Find, warm: int) -> Lines:
    """The lines of a loaded model. `warm` bytes are kept of conversations that have ended."""
    general = GeneralLines(slots, model, find)
    return general if lean is None or lean.window is not None else LeanLines(lean, find, warm, general)


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(one), len(other))
    if list(one[:length]) == list(other[:length]):
        return length
    return next(place for place in range(length) if one[place] != other[place])


@dataclass(eq=False)
class Warm:
    """What was read before. `kept`: (layers, 2, kv heads, T, D)."""

    tokens: list[int]
    kept: Tensor


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
        self._layers: dict[str, tuple[Adapted, Tensor]] = {}
        self._mixed: tuple[list[str], list[Layer]] | None = None
        self._most_warm = warm
        self._warm: OrderedDict[tuple[str, int], Warm] = OrderedDict()
        self._numbers = 0

    def begin(self, weights: str, tokens: Sequence[int]) -> Line:
        if weights and not Adapted.fits(self._lean, self._find(weights)[0].slices):
            return self._general.begin(weights, tokens)
        self._layers_of(weights)
        line = Line(weights)
        key, known, best = None, 0, None
        for (of, number), each in self._warm.items():
            if of == weights and (alike := shared(each.tokens, tokens)) > known:
                key, known, best = (of, number), alike, each
        known = min(known, len(tokens) - 1)
        row = self._take_row(line, known + 1)
        if best is not None and key is not None and known > 0:
            self._warm.move_to_end(key)
            with torch.inference_mode():
                for number, (keys, values) in enumerate(zip(self._cache.keys, self._cache.values, strict=True)):
                    keys[row, :, :known] = best.kept[number, 0, :, :known]
                    values[row, :, :known] = best.kept[number, 1, :, :known]
            line.tokens += tokens[:known]
        return line

    def read(self, line: Line, tokens: Sequence[int]) -> Tensor:
        if isinstance(line, GeneralLine):
            return self._general.read(line, tokens)
        row, start = self._lines.index(line), len(line.tokens)
        self._make_room(start + len(tokens) + 1)
        lean = self._lean
        with torch.inference_mode():
            one = slice(row, row + 1)
            cache = Cache(
                [keys[one] for keys in self._cache.keys], [values[one] for values in self._cache.values], start
            )
            ids = torch.tensor([list(tokens)], device=lean.device)
            logits = lean.logits(lean.forward(self._layers_of(line.weights), ids, cache)[:, -1])[0]
        line.tokens += tokens
        return logits

    def grow(self, lines: Sequence[Line], ids: Sequence[int]) -> Tensor:
        apart = [isinstance(line, GeneralLine) for line in lines]
        if any(apart):
            return torch.stack([
                (self._general if general else self).grow([line], [token])[0]
                for line, token, general in zip(lines, ids, apart, strict=True)
            ])  # fmt: skip
        # Rows that only wait grow by a token that nobody looks at, in a place that is written over when they go on.
        lengths = [len(line.tokens) for line in self._lines]
        room = max(lengths) + 1
        self._make_room(room)
        layers = self._layers_now()
        lean, device = self._lean, self._lean.device
        next_of = dict(zip(lines, ids, strict=True))
        with torch.inference_mode():
            fed = torch.tensor([next_of.get(line, 0) for line in self._lines], device=device)
            hidden = lean.step(layers, fed, self._cache, torch.tensor(lengths, device=device), room)
            logits = lean.logits(hidden[[self._lines.index(line) for line in lines]])
        for line, token in next_of.items():
            line.tokens.append(token)
        return logits

    def end(self, line: Line) -> None:
        if isinstance(line, GeneralLine):
            self._general.end(line)
            return
        row = self._lines.index(line)
        self._keep_warm(line, row)
        last = self._lines.pop()
        if last is not line:  # the last row moves into the place that is free now
            self._lines[row] = last
            with torch.inference_mode():
                for each in (*self._cache.keys, *self._cache.values):
                    each[row, :, : len(last.tokens)] = each[len(self._lines), :, : len(last.tokens)]
        self._mixed = None
        used = {each.weights for each in self._lines}
        self._layers = {weights: layers for weights, layers in self._layers.items() if weights in used}
        if not self._lines:  # what many or long ones needed is given back
            self._rows, self._room, self._cache = 0, ROUND, Cache.empty(self._lean, 0, ROUND)

    def bytes_for(self, tokens: int) -> int:
        lean = self._lean
        return 2 * len(lean.layers) * lean.kv_heads * tokens * lean.head_dim * lean.embedding.element_size()

    def _keep_warm(self, line: Line, row: int) -> None:
        length = len(line.tokens)
        if not length or self.bytes_for(length) > self._most_warm:
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

    def _take_row(self, line: Line, length: int) -> int:
        self._make_room(length + 1)
        if len(self._lines) == self._rows:
            self._resize(max(4, 2 * self._rows), self._room)
        self._lines.append(line)
        self._mixed = None
        return len(self._lines) - 1

    def _make_room(self, length: int) -> None:
        if length > self._room:
            self._resize(self._rows, -(-max(length, self._room + self._room // 2) // ROUND) * ROUND)

    def _resize(self, rows: int, room: int) -> None:
        with torch.inference_mode():
            old, self._cache = self._cache, Cache.empty(self._lean, rows, room)
            filled = max((len(line.tokens) for line in self._lines), default=0)
            for mine, theirs in ((self._cache.keys, old.keys), (self._cache.values, old.values)):
                for here, there in zip(mine, theirs, strict=True):
                    here.zero_()  # what is masked must still be a number
                    here[: len(self._lines), :, :filled] = there[: len(self._lines), :, :filled]
        self._rows, self._room = rows, room

    def _layers_of(self, weights: str) -> list[Layer]:
        """The layers with an adapter beside the base model's weights. Raises WeightsMissing."""
        if not weights:
            return self._lean.layers
        slot, found = self._find(weights)
        known = self._layers.get(weights)
        if known is None or known[1] is not found.flat:
            with torch.inference_mode():
                adapted = slot.beside(self._lean)
                adapted.install(found.flat)
            known = self._layers[weights] = adapted, found.flat
            self._mixed = None
        return known[0].layers

    def _layers_now(self) -> list[Layer]:
        """The layers for one step of all rows."""
        weights = [line.weights for line in self._lines]
        if len(set(weights)) == 1:
            return self._layers_of(weights[0])
        if self._mixed is None or self._mixed[0] != weights:
            rows = [self._layers_of(each) for each in weights]
            with torch.inference_mode():
                self._mixed = weights, [mixed(list(layers)) for layers in zip(*rows, strict=True)]
        return self._mixed[1]


def mixed(layers: Sequence[Layer]) -> Layer:
    """One layer for as many rows, each with its own adapter."""
    one = layers[0]
    qkv, out, gate_up, down = (side_by_side(each) for each in zip(*(layer.linears() for layer in layers), strict=True))
    return Layer(one.before_attention, qkv, one.qk_norm, out, one.before_mlp, gate_up, down)


@dataclass(eq=False)
class GeneralLine(Line):
    cache: DynamicCache = field(default_factory=DynamicCache)


class GeneralLines(Lines):
    """Through transformers' own forward, for any causal model: lines take turns within a step."""

    WARM = 4
    """So many lines that have ended are kept as they are."""

    def __init__(self, slots: Slots, model: Any, find: Find) -> None:
        self._slots, self._model, self._find = slots, model, find
        self._warm: list[GeneralLine] = []

    def begin(self, weights: str, tokens: Sequence[int]) -> Line:
        forward = self._forward(weights)
        best, known = None, 0
        for each in self._warm:
            if each.weights == weights and (alike := min(shared(each.tokens, tokens), len(tokens) - 1)) > known:
                best, known = each, alike
        if best is None or not (len(best.tokens) == known or _can_be_cut(best.cache)):
            return GeneralLine(weights, cache=forward.cache())
        self._warm.remove(best)
        if len(best.tokens) > known:
            best.cache.crop(known - len(best.tokens))
            best.tokens = best.tokens[:known]
        return best

    def read(self, line: Line, tokens: Sequence[int]) -> Tensor:
        assert isinstance(line, GeneralLine)
        forward = self._forward(line.weights)
        ids = torch.tensor([list(tokens)], device=forward.device)
        logits = forward.run(ids, line.cache, not line.weights, last=True)[0, -1]
        line.tokens += tokens
        return logits

    def grow(self, lines: Sequence[Line], ids: Sequence[int]) -> Tensor:
        return torch.stack([self.read(line, [token]) for line, token in zip(lines, ids, strict=True)])

    def end(self, line: Line) -> None:
        assert isinstance(line, GeneralLine)
        if line.tokens:
            self._warm = [*self._warm[1 - self.WARM :], line]

    def bytes_for(self, tokens: int) -> int:
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * size * tokens * next(self._model.parameters()).element_size())

    def _forward(self, weights: str) -> GeneralForward:
        if weights:
            slot, found = self._find(weights)
            return GeneralForward(slot, found.flat)
        slot = self._slots.get(Adapter())
        return GeneralForward(slot, slot.still)


def _can_be_cut(cache: DynamicCache) -> bool:
    """Whether a cache still holds all that was read, place by place: others slide, or hold a sum of it."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)
