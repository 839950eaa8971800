"""How answers to one prompt grow together, a row each: through transformers' own forward, or through the lean one.

It knows models and the weights that are to be in them; not text, sampling's filters or learning.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache

from ..params import Sampling
from .adapters import Slot
from .graphs import Drawn, Graphs
from .lean import Cache, Layer
from .reading import keeping
from .sampling import draw

log = logging.getLogger(__name__)


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


FORGOTTEN = 0.1
"""A model whose logits change by more than this part of their spread, in every row, does not go on from its cache."""

_REMEMBERING: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Of each model with adapters, whether it goes on from a cache."""


class Reread:
    """In the place of a cache, for a model without one that can be used: all tokens so far (R, T), which are read again
    with each step."""

    layers: tuple[()] = ()
    """No layer of it slides or holds sums, as those of a cache may."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None

    def add(self, ids: Tensor) -> Tensor:
        """Tokens (R, T) that are read next. Returns all of them."""
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], dim=1)
        return self._ids

    def batch_repeat_interleave(self, repeats: int) -> None:
        assert self._ids is not None
        self._ids = self._ids.repeat_interleave(repeats, dim=0)

    def crop(self, length: int) -> None:
        """Keep so many tokens; a negative number is how many go."""
        assert self._ids is not None
        self._ids = self._ids[:, :length]


class GeneralForward(Forward):
    """Through transformers' own forward: any causal model."""

    def __init__(self, slot: Slot, flat: Tensor) -> None:
        self._slot, self._flat = slot, flat
        self.device = slot.flat.device

    def rows(self, prompt: list[int], count: int, room: int, base: bool = False) -> Rows:
        return GeneralRows(self, prompt, count, base)

    def run(self, ids: Tensor, cache: DynamicCache | Reread, base: bool, last: bool) -> Tensor:
        """Read tokens (R, T) after what is in the cache. Returns logits (R, T, V), or of the last token alone."""
        slot = self._slot
        count = 1 if last else ids.shape[1]
        keep = keeping(slot.model, count)
        with slot.turn, torch.inference_mode():
            slot.install(self._flat)
            with slot.reference() if base else nullcontext():
                if isinstance(cache, Reread):
                    found = slot.model(input_ids=cache.add(ids), use_cache=False, **keep).logits
                else:
                    found = slot.model(input_ids=ids, past_key_values=cache, use_cache=True, **keep).logits
        last_ones: Tensor = found[:, -count:]
        return last_ones

    def cache(self) -> DynamicCache | Reread:
        model = self._slot.model
        with self._slot.turn:
            if model not in _REMEMBERING:
                _REMEMBERING[model] = self._remembers()
        return DynamicCache(config=model.config) if _REMEMBERING[model] else Reread()

    def _remembers(self) -> bool:
        """Whether the model goes on from what a cache holds. Some ignore the cache that they are given, and would see
        the last token alone; some have kinds of layers whose caches cannot be spread over the rows of a group."""
        config = self._slot.model.config.get_text_config()
        ids = (torch.arange(18, device=self.device).view(3, 6) * 7 + 5) % config.vocab_size
        whole = self.run(ids, Reread(), base=True, last=True)[:, -1].float()
        cache = DynamicCache(config=self._slot.model.config)
        try:
            self.run(ids[:, :4], cache, base=True, last=True)
            with torch.inference_mode():
                cache.batch_repeat_interleave(2)
            found = self.run(ids[:, 4:].repeat_interleave(2, 0), cache, base=True, last=True)[::2, -1].float()
        except (ValueError, AttributeError, TypeError, IndexError, NotImplementedError, RuntimeError) as error:
            if "memory" in str(error).lower():
                raise
            log.info("%s has no cache that rows can go on from: %s", type(self._slot.model).__name__, error)
            return False
        spread = (whole - whole.mean(dim=-1, keepdim=True)).norm(dim=-1)
        # Rounding in 8 or 16 bits changes one row by some hundredths; who forgets is wrong in all of them.
        return bool(((found - whole).norm(dim=-1) <= FORGOTTEN * spread).any())


class GeneralRows(Rows):
    def __init__(self, forward: GeneralForward, prompt: list[int], count: int, base: bool) -> None:
        self._forward, self._prompt, self._base = forward, prompt, base
        self._cache = forward.cache()
        ids = torch.tensor([prompt], device=forward.device)
        first = forward.run(ids, self._cache, base, last=True)[:, -1]
        with torch.inference_mode():
            self._cache.batch_repeat_interleave(count)
        self.logits = first.expand(count, -1)

    def feed(self, tokens: Tensor) -> Tensor:
        found = self._forward.run(tokens, self._cache, self._base, last=False)
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
