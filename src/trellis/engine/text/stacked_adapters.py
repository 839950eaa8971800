"""The adapters of a batch stacked in one tensor per linear layer, so that every row can use its own.

It does not know conversations or caches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from .adapters import AdapterSlot
from .fast_forward import FastForward
from .fused_layers import FusedLayer, FusedLinear, RowAdapters
from .weights_store import Weights

MAX_IDLE_ADAPTERS = 8
"""How many adapters stay when nobody uses them, for a next message."""


FindWeights = Callable[[str], tuple[AdapterSlot, Weights]]
"""Return weights by id and the slot they belong to. Raises WeightsMissing."""


class StackedAdapters:
    """The adapters of a batch, each at its own index; only new ones are written."""

    def __init__(self, fast_forward: FastForward, find_weights: FindWeights) -> None:
        self._fast_forward, self._find_weights = fast_forward, find_weights
        self._indices: dict[str, int] = {}
        self._lora_a: list[list[Tensor]] = []
        self._lora_b: list[list[Tensor]] = []
        """By layer and linear layer: A is (K, in, r), B is (K, r, out)."""

    @property
    def bytes_per_adapter(self) -> int:
        """Memory for one more adapter; 0 if none is known yet."""
        return sum(each[0].nbytes for both in (self._lora_a, self._lora_b) for layer in both for each in layer)

    def add(self, weights: str, used: Collection[str]) -> int:
        """Return the index of an adapter, adding it if necessary; those in `used` stay. Raises WeightsMissing."""
        if weights in self._indices:  # weights with the same id never change
            return self._indices[weights]
        slot, found = self._find_weights(weights)
        with torch.inference_mode():
            adapted = slot.unmerged_layers(self._fast_forward)
            adapted.install(found.flat)
            return self._write(weights, adapted.layers, used)

    def layers(self, weights: Sequence[str]) -> list[FusedLayer]:
        """Return the layers for rows with these weights, which must all have been added."""
        indices = [self._indices[each] if each else None for each in weights]
        if all(place is None for place in indices):
            return self._fast_forward.layers
        with torch.inference_mode():
            row_adapters = (
                RowAdapters(indices, len(self._lora_a[0][0]), self._fast_forward.device)
                if len(set(indices)) > 1
                else None
            )
        single = next(place for place in indices if place is not None)
        return [
            self._fused_layer(base, downs, ups, row_adapters, single)
            for base, downs, ups in zip(self._fast_forward.layers, self._lora_a, self._lora_b, strict=True)
        ]

    def release_unused(self) -> None:
        """Free the memory if no adapter is used and there are many."""
        if self._lora_a and len(self._lora_a[0][0]) > MAX_IDLE_ADAPTERS:
            self.clear()

    def clear(self) -> None:
        self._indices, self._lora_a, self._lora_b = {}, [], []

    def _fused_layer(
        self,
        base: FusedLayer,
        lora_as: list[Tensor],
        lora_bs: list[Tensor],
        row_adapters: RowAdapters | None,
        index: int,
    ) -> FusedLayer:
        linears = []
        for each, down, up in zip(base.linears(), lora_as, lora_bs, strict=True):
            lora = (down, up) if row_adapters else (down[index].T, up[index])
            linears.append(FusedLinear(each.weight, each.bias, each.parts, *lora, each.packed, row_adapters))
        qkv, out, gate_up, last = linears
        return FusedLayer(base.input_norm, qkv, base.qk_norm, out, base.mlp_norm, gate_up, last)

    def _write(self, weights: str, layers: Sequence[FusedLayer], used: Collection[str]) -> int:
        unused = [index for each, index in self._indices.items() if each not in used]
        capacity, rank = (len(self._lora_a[0][0]), self._lora_a[0][0].shape[2]) if self._lora_a else (0, 0)
        ranks = max(
            (len(each.lora_a) for one in layers for each in one.linears() if each.lora_a is not None), default=1
        )
        is_full = len(self._indices) == capacity and not (unused and capacity > MAX_IDLE_ADAPTERS)
        if is_full or ranks > rank:
            self._reserve(layers, capacity + (max(1, capacity // 4) if is_full else 0), max(ranks, rank))
            capacity = len(self._lora_a[0][0])
        place = next((each for each in range(capacity) if each not in self._indices.values()), None)
        if place is None:
            place = unused[0]
            self._indices = {each: at for each, at in self._indices.items() if at != place}
        for layer, downs, ups in zip(layers, self._lora_a, self._lora_b, strict=True):
            for each, down, up in zip(layer.linears(), downs, ups, strict=True):
                down[place].zero_()
                up[place].zero_()
                if each.lora_a is not None and each.lora_b is not None:
                    down[place, :, : len(each.lora_a)] = each.lora_a.T
                    up[place, : len(each.lora_b)] = each.lora_b
        self._indices[weights] = place
        return place

    def _reserve(self, layers: Sequence[FusedLayer], count: int, ranks: int) -> None:
        """Ensure capacity for so many adapters of this rank; existing ones stay."""
        old_lora_a, old_lora_b = self._lora_a, self._lora_b
        weights = [[each.weight for each in one.linears()] for one in layers]
        self._lora_a = [[each.new_zeros(count, each.shape[1], ranks) for each in one] for one in weights]
        self._lora_b = [[each.new_zeros(count, ranks, each.shape[0]) for each in one] for one in weights]
        for mine, theirs in zip(self._lora_a, old_lora_a, strict=False):
            for here, there in zip(mine, theirs, strict=True):
                here[: len(there), :, : there.shape[2]] = there
        for mine, theirs in zip(self._lora_b, old_lora_b, strict=False):
            for here, there in zip(mine, theirs, strict=True):
                here[: len(there), : there.shape[1]] = there
