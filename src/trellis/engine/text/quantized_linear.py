"""4-bit linear layers on a CPU: the same forward pass for decoding, learning and merging on every processor.

In evaluation mode, bitsandbytes repacks its weights for an AVX512-BF16 kernel that has no gradient, rejects small
layers and rounds activations to bfloat16. Its other CPU kernel uses wrong scales for rows whose length is not a
multiple of the block size. This module uses neither; it needs bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from bitsandbytes.nn import modules
from torch import Tensor, nn
from torch.nn import functional


class Linear4bit(modules.Linear4bit):
    """A linear layer with a 4-bit weight. PEFT recognizes it by the name and base class of bitsandbytes' layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), computed in the layer's compute dtype, returned in that of `x`."""
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        made: Tensor = _Linear4bitFunction.apply(x.to(dtype), self.weight, bias)
        return made.to(x.dtype)

    def dequantized(self) -> Tensor:
        """Return the weight (out, in) in the precision it was quantized from."""
        weight: Any = self.weight
        return dequantize_weight(weight, weight.quant_state.dtype)


class _Linear4bitFunction(torch.autograd.Function):
    """x Wᵀ + b. The backward pass dequantizes the weight again, so that no full copy is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, dequantize_weight(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (gradient,) = gradients
        by_x = gradient @ dequantize_weight(ctx.weight, gradient.dtype) if ctx.needs_input_grad[0] else None
        by_bias = gradient.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[2] else None
        return by_x, None, by_bias


def dequantize_weight(weight: Any, dtype: torch.dtype) -> Tensor:
    """Return the values (out, in) of a 4-bit parameter of bitsandbytes.

    Blocks span rows, so the weight is read as one row per block, and a shorter last one.
    """
    state: QuantState = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = weight.data.reshape(-1).view(torch.uint8)
    whole, rest = divmod(state.shape.numel(), state.blocksize)
    made = [_dequantize_blocks(packed, scales, state, (whole, state.blocksize), dtype)] if whole else []
    if rest:
        last, even = packed[whole * state.blocksize // 2 :], rest + rest % 2  # a byte holds two values
        made.append(_dequantize_blocks(last, scales[whole:], state, (1, even), dtype)[:, :rest])
    flat = made[0].reshape(-1) if len(made) == 1 else torch.cat([each.reshape(-1) for each in made])
    return flat.view(state.shape)


def _dequantize_blocks(
    packed: Tensor, scales: Tensor, state: QuantState, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Dequantize blocks of a weight, one per row."""
    values = packed[: shape[0] * shape[1] // 2]
    found: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        values, scales[: shape[0]].float().contiguous(), state.blocksize, state.quant_type, shape, dtype
    )
    return found


def replace_4bit_layers(model: nn.Module) -> None:
    """Give every 4-bit layer on the CPU the forward pass of this module."""
    for module in model.modules():
        if type(module) is modules.Linear4bit and module.weight.device.type == "cpu":
            module.__class__ = Linear4bit
