"""How answers to one prompt grow together, a row each: through transformers' own forward, or through the lean one.

It knows models and the weights that are to be in them; not text, sampling's filters or learning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from ...params import Sampling
from .adapters import Slot
from .cache_support import Past
from .cuda_graphs import Drawn, Graphs
from .fast_forward import Cache, Layer
from .sampling import draw


class Rows(ABC):
    """Answers to one prompt that grow together. `logits` (R, V) are of each one's next token."""

    logits: Tensor

    @abstractmethod
    def feed(self, tokens: Tensor) -> Tensor:
        """Go on with tokens (R, T), the same count in each row. Returns logits (R, T, V), after each of them."""

    @abstractmethod
    def again(self, count: int) -> Rows:
        """So many rows at the prompt's end, which is not read again."""

    def draws(self, sampling: Sampling, uniforms: Tensor, drawn: Tensor | None) -> Iterator[Drawn]:
        """Draw token after token, one for each row of `uniforms` (S, R); `drawn` (R,) are not fed yet."""
        for line in uniforms:
            if drawn is not None:
                self.feed(drawn[:, None])
            with torch.inference_mode():
                drawn, logprobs = draw(self.logits, sampling, line)
            yield [(drawn.tolist(), logprobs.tolist())]


class Forward(ABC):
    """A model with some weights in it. Other work may put others there in between: each step has its own put back."""

    device: torch.device

    @abstractmethod
    def rows(self, prompt: list[int], count: int, room: int, base: bool = False) -> Rows:
        """Rows at the end of a prompt, with room for so many positions in all; of the base model, where that is
        wanted."""


def forward_of(slot: Slot, flat: Tensor, length: int) -> Forward:
    """The quickest way through a model with these values (P,) in its adapter, for texts of up to so many tokens."""
    if slot.adapted is not None and slot.adapted.lean.reaches(length):
        return LeanForward(slot, flat, slot.graphs)
    return GeneralForward(slot, flat)


class GeneralForward(Forward):
    """Through transformers' own forward: any causal model."""

    def __init__(self, slot: Slot, flat: Tensor) -> None:
        self._slot, self._flat = slot, flat
        self.device = slot.flat.device

    def rows(self, prompt: list[int], count: int, room: int, base: bool = False) -> Rows:
        return GeneralRows(self, prompt, count, base)

    def run(self, ids: Tensor, past: Past, base: bool, last: bool) -> Tensor:
        """Read tokens (R, T). Returns logits to draw from: rows that no token belongs to are impossible."""
        slot = self._slot
        with slot.turn, torch.inference_mode():
            slot.install(self._flat)
            with slot.reference() if base else nullcontext():
                found = past.read(slot.model.get_base_model(), ids, last)
            if slot.missing is not None:
                found = found.index_fill(-1, slot.missing, float("-inf"))
        return found

    def past(self) -> Past:
        return Past(self._slot.caching)


class GeneralRows(Rows):
    def __init__(self, forward: GeneralForward, prompt: list[int], count: int, base: bool) -> None:
        self._forward, self._prompt, self._base = forward, prompt, base
        self._past = forward.past()
        ids = torch.tensor([prompt], device=forward.device)
        first = forward.run(ids, self._past, base, last=True)
        with torch.inference_mode():
            copied = self._past.spread(count)
        if not copied:  # then the prompt is read in each row
            self._past = forward.past()
            first = forward.run(ids.expand(count, -1), self._past, base, last=True)
        self.logits = first[:, -1].expand(count, -1)

    def feed(self, tokens: Tensor) -> Tensor:
        found = self._forward.run(tokens, self._past, self._base, last=False)
        self.logits = found[:, -1]
        return found

    def again(self, count: int) -> Rows:
        return GeneralRows(self._forward, self._prompt, count, self._base)


class LeanForward(Forward):
    """Through the lean pass. Each step may be done by another thread, on layers of its own."""

    def __init__(self, slot: Slot, flat: Tensor, graphs: Graphs | None = None) -> None:
        assert slot.adapted is not None
        self._slot, self._flat, self.graphs = slot, flat, graphs
        self.lean = slot.adapted.lean
        self.device = self.lean.device

    def rows(self, prompt: list[int], count: int, room: int, base: bool = False) -> Rows:
        return LeanRows(self, prompt, count, room, base)

    def layers(self, base: bool) -> list[Layer]:
        """The layers with the right values in them, as of now."""
        if base:
            return self.lean.layers
        adapted = self._slot.adapted
        assert adapted is not None
        adapted.install(self._flat)
        return adapted.layers


class LeanRows(Rows):
    def __init__(
        self, forward: LeanForward, prompt: list[int], count: int, room: int, base: bool, known: LeanRows | None = None
    ) -> None:
        self._forward, self._prompt, self._room, self._base = forward, prompt, room, base
        lean = forward.lean
        with torch.inference_mode():
            self.cache = Cache.empty(lean, count, room)
            if known is None:
                read = Cache.empty(lean, 1, len(prompt))
                ids = torch.tensor([prompt], device=lean.device)
                self._first = lean.logits(lean.forward(forward.layers(base), ids, read)[:, -1])
                self.cache.begin_with(read, len(prompt))
            else:
                self._first = known._first
                self.cache.begin_with(known.cache, len(prompt))
            self.logits = self._first.expand(count, -1)

    def feed(self, tokens: Tensor) -> Tensor:
        lean = self._forward.lean
        with torch.inference_mode():
            found = lean.logits(lean.forward(self._forward.layers(self._base), tokens, self.cache))
        self.logits = found[:, -1]
        return found

    def again(self, count: int) -> Rows:
        return LeanRows(self._forward, self._prompt, count, self._room, self._base, self)

    def draws(self, sampling: Sampling, uniforms: Tensor, drawn: Tensor | None) -> Iterator[Drawn]:
        graphs = self._forward.graphs
        if graphs is None or self._base:
            yield from super().draws(sampling, uniforms, drawn)
            return
        if drawn is None:  # the first token is there before anything is captured
            with torch.inference_mode():
                drawn, logprobs = draw(self.logits, sampling, uniforms[0])
            yield [(drawn.tolist(), logprobs.tolist())]
            uniforms = uniforms[1:]
        yield from graphs.draws(lambda: self._forward.layers(False), self.cache, sampling, uniforms, drawn)
