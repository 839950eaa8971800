"""Forward passes for a group of answers to one prompt, one row each: through transformers, or the fast forward pass.

It knows models and the weights in them; not text, sampling filters or learning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from ...options import Sampling
from .adapters import AdapterSlot
from .cache_support import ModelCache
from .cuda_graphs import SampledSteps, StepGraphs
from .fast_forward import KVCache
from .fused_layers import FusedLayer
from .sampling import sample


class AnswerRows(ABC):
    """Answers to one prompt, decoded together. `logits` (R, V) are those of the next tokens."""

    logits: Tensor

    @abstractmethod
    def feed(self, tokens: Tensor) -> Tensor:
        """Read tokens (R, T), the same number in each row. Returns logits (R, T, V)."""

    @abstractmethod
    def restart(self, count: int) -> AnswerRows:
        """Return `count` new rows at the prompt's end, without reading it again."""

    def sample_steps(self, sampling: Sampling, uniforms: Tensor, pending: Tensor | None) -> Iterator[SampledSteps]:
        """Sample a token per row for each row of `uniforms` (S, R); `pending` (R,) are not read yet."""
        for line in uniforms:
            if pending is not None:
                self.feed(pending[:, None])
            with torch.inference_mode():
                pending, logprobs = sample(self.logits, sampling, line)
            yield [(pending.tolist(), logprobs.tolist())]


class GroupForward(ABC):
    """A model with certain weights. Other work may install others in between, so each step installs its own."""

    device: torch.device

    @abstractmethod
    def rows(self, prompt: list[int], count: int, capacity: int, base: bool = False) -> AnswerRows:
        """Return rows at the end of a prompt, with a capacity in positions; of the base model with `base`."""


def group_forward_for(slot: AdapterSlot, flat: Tensor, length: int) -> GroupForward:
    """Return the fastest forward pass for these values (P,) in the adapter and texts up to this length."""
    if slot.adapted_layers is not None and slot.adapted_layers.fast_forward.has_full_attention(length):
        return FastGroupForward(slot, flat, slot.graphs)
    return GenericGroupForward(slot, flat)


class GenericGroupForward(GroupForward):
    """Through transformers' forward pass: any causal model."""

    def __init__(self, slot: AdapterSlot, flat: Tensor) -> None:
        self._slot, self._flat = slot, flat
        self.device = slot.flat.device

    def rows(self, prompt: list[int], count: int, capacity: int, base: bool = False) -> AnswerRows:
        return GenericRows(self, prompt, count, base)

    def run(self, ids: Tensor, cache: ModelCache, base: bool, last: bool) -> Tensor:
        """Read tokens (R, T). Returns logits; vocabulary rows without a token get −inf."""
        slot = self._slot
        with slot.lock, torch.inference_mode():
            slot.install(self._flat)
            with slot.without_adapter() if base else nullcontext():
                logits = cache.read(slot.model.get_base_model(), ids, last)
            if slot.unused_rows is not None:
                logits = logits.index_fill(-1, slot.unused_rows, float("-inf"))
        return logits

    def new_cache(self) -> ModelCache:
        return ModelCache(self._slot.cache_support)


class GenericRows(AnswerRows):
    def __init__(self, forward: GenericGroupForward, prompt: list[int], count: int, base: bool) -> None:
        self._forward, self._prompt, self._base = forward, prompt, base
        self._cache = forward.new_cache()
        ids = torch.tensor([prompt], device=forward.device)
        first = forward.run(ids, self._cache, base, last=True)
        with torch.inference_mode():
            is_repeated = self._cache.repeat(count)
        if not is_repeated:  # read the prompt in each row instead
            self._cache = forward.new_cache()
            first = forward.run(ids.expand(count, -1), self._cache, base, last=True)
        self.logits = first[:, -1].expand(count, -1)

    def feed(self, tokens: Tensor) -> Tensor:
        logits = self._forward.run(tokens, self._cache, self._base, last=False)
        self.logits = logits[:, -1]
        return logits

    def restart(self, count: int) -> AnswerRows:
        return GenericRows(self._forward, self._prompt, count, self._base)


class FastGroupForward(GroupForward):
    """Through the fast forward pass. Each step may run in another thread, on that thread's layers."""

    def __init__(self, slot: AdapterSlot, flat: Tensor, graphs: StepGraphs | None = None) -> None:
        assert slot.adapted_layers is not None
        self._slot, self._flat, self.graphs = slot, flat, graphs
        self.fast_forward = slot.adapted_layers.fast_forward
        self.device = self.fast_forward.device

    def rows(self, prompt: list[int], count: int, capacity: int, base: bool = False) -> AnswerRows:
        return FastRows(self, prompt, count, capacity, base)

    def layers(self, base: bool) -> list[FusedLayer]:
        """Return the layers with the right values installed."""
        if base:
            return self.fast_forward.layers
        adapted = self._slot.adapted_layers
        assert adapted is not None
        adapted.install(self._flat)
        return adapted.layers


class FastRows(AnswerRows):
    def __init__(
        self,
        forward: FastGroupForward,
        prompt: list[int],
        count: int,
        capacity: int,
        base: bool,
        template: FastRows | None = None,
    ) -> None:
        self._forward, self._prompt, self._capacity, self._base = forward, prompt, capacity, base
        fast_forward = forward.fast_forward
        with torch.inference_mode():
            self.cache = KVCache.empty(fast_forward, count, capacity)
            if template is None:
                prompt_cache = KVCache.empty(fast_forward, 1, len(prompt))
                ids = torch.tensor([prompt], device=fast_forward.device)
                self._prompt_logits = fast_forward.logits(
                    fast_forward.forward(forward.layers(base), ids, prompt_cache)[:, -1]
                )
                self.cache.copy_prefix(prompt_cache, len(prompt))
            else:
                self._prompt_logits = template._prompt_logits
                self.cache.copy_prefix(template.cache, len(prompt))
            self.logits = self._prompt_logits.expand(count, -1)

    def feed(self, tokens: Tensor) -> Tensor:
        fast_forward = self._forward.fast_forward
        with torch.inference_mode():
            logits = fast_forward.logits(fast_forward.forward(self._forward.layers(self._base), tokens, self.cache))
        self.logits = logits[:, -1]
        return logits

    def restart(self, count: int) -> AnswerRows:
        return FastRows(self._forward, self._prompt, count, self._capacity, self._base, self)

    def sample_steps(self, sampling: Sampling, uniforms: Tensor, pending: Tensor | None) -> Iterator[SampledSteps]:
        graphs = self._forward.graphs
        if graphs is None or self._base:
            yield from super().sample_steps(sampling, uniforms, pending)
            return
        if pending is None:  # sampled before anything is captured
            with torch.inference_mode():
                pending, logprobs = sample(self.logits, sampling, uniforms[0])
            yield [(pending.tolist(), logprobs.tolist())]
            uniforms = uniforms[1:]
        yield from graphs.sample_steps(lambda: self._forward.layers(False), self.cache, sampling, uniforms, pending)
