"""Decoder layers in which linear layers with the same input are fused into one, with or without an adapter.

They know only tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .packed_weights import MAX_PACKED_ROWS, packed_linear


class RowAdapters:
    """Which adapter each row of a batch uses. Rows with the same adapter are multiplied together."""

    def __init__(self, adapters: Sequence[int | None], count: int, device: torch.device) -> None:
        """`adapters` has the index of each row's adapter, below `count`; None for a row without."""
        members: list[list[int]] = [[] for _ in range(count)]
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                members[adapter].append(row)
        self._count, self._width = count, max(map(len, members))
        rows = [row for each in members for row in each]
        slots = [number * self._width + place for number, each in enumerate(members) for place in range(len(each))]
        self._rows = torch.tensor(rows, device=device, dtype=torch.long)
        self._slots = torch.tensor(slots, device=device, dtype=torch.long)

    def add_to(self, output: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """Add what each row's adapter, of lora_a (K, in, r) and lora_b (K, r, out), makes of x (N, in) to output (N,
        out)."""
        grouped = x.new_zeros(self._count * self._width, x.shape[1])
        grouped[self._slots] = x[self._rows]
        added = torch.bmm(torch.bmm(grouped.view(self._count, self._width, -1), lora_a), lora_b)
        return output.index_add(0, self._rows, added.view(len(grouped), -1)[self._slots])


@dataclass
class FusedLinear:
    """Linear layers with the same input as one: x Wᵀ + b, plus x Aᵀ Bᵀ with an adapter."""

    weight: Tensor
    bias: Tensor | None
    parts: tuple[tuple[str, slice], ...]
    """Name suffix and output rows of each fused layer."""
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    packed: Tensor | None = None
    row_adapters: RowAdapters | None = None
    """Which adapter each row uses; `lora_a` is then (K, in, r) and `lora_b` (K, r, out)."""

    @classmethod
    def fuse(cls, layers: dict[str, nn.Linear]) -> FusedLinear:
        """Fuse layers. Their weights become views into the fused one, so that nothing is stored twice."""
        parts, start = [], 0
        for name, layer in layers.items():
            parts.append((name, slice(start, start + layer.out_features)))
            start += layer.out_features
        if len(layers) == 1:
            (layer,) = layers.values()
            return cls(layer.weight.data, layer.bias, tuple(parts))
        weight = torch.cat([layer.weight.data for layer in layers.values()])
        for (_, where), layer in zip(parts, layers.values(), strict=True):
            layer.weight.data = weight[where]
        biases = [
            torch.zeros(layer.out_features).to(weight) if layer.bias is None else layer.bias.data
            for layer in layers.values()
        ]
        has_bias = any(layer.bias is not None for layer in layers.values())
        return cls(weight, torch.cat(biases) if has_bias else None, tuple(parts))

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        if self.packed is not None and len(x) <= MAX_PACKED_ROWS:
            output = packed_linear(x, self.packed, self.bias)
        else:
            output = functional.linear(x, self.weight, self.bias)
        if self.lora_a is None or self.lora_b is None:
            return output
        if self.row_adapters is not None:
            return self.row_adapters.add_to(output, x, self.lora_a, self.lora_b)
        return output.addmm_(functional.linear(x, self.lora_a), self.lora_b)

    def add_to(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Return x (N, out) plus this layer's output for `inputs` (N, in)."""
        if self.packed is None and self.bias is None and self.lora_a is None:
            return torch.addmm(x, inputs, self.weight.T)
        return x + self(inputs)


@dataclass
class FusedLayer:
    input_norm: Tensor
    qkv: FusedLinear
    qk_norm: Tensor | None
    attention_out: FusedLinear
    mlp_norm: Tensor
    gate_up: FusedLinear
    down: FusedLinear

    def linears(self) -> tuple[FusedLinear, ...]:
        return self.qkv, self.attention_out, self.gate_up, self.down
