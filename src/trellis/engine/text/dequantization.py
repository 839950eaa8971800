"""Dequantize weights on reading, so that everything else sees an ordinary model.

It knows the formats that model_checks accepts: FP8 with scales (DeepSeek, Qwen, Mistral) and bitsandbytes in 4 and 8
bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...model_checks import BITSANDBYTES, BLOCK_FP8, scale_block_shape

INT8_RANGE = 127.0
"""An 8-bit weight of bitsandbytes is its integer times its row's largest value over this."""


def dequantize(
    stored: dict[str, Tensor], method: str, quantization: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors of a quantized folder as floating point numbers, with their names in the unquantized model.

    `stored` is emptied meanwhile, so that no weight is held twice for long.
    """
    unpack = {BLOCK_FP8: _dequantize_fp8, BITSANDBYTES: _dequantize_bitsandbytes}[method]
    unpacked: dict[str, Tensor] = {}
    for name in [name for name in stored if name.endswith("weight") or f"{name}_scale_inv" in stored]:
        if (weight := unpack(name, stored, quantization)) is not None:
            unpacked[name] = weight.to(dtype)
    for name in list(stored):
        tensor = stored.pop(name)
        unpacked[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return unpacked


def _dequantize_fp8(name: str, stored: dict[str, Tensor], quantization: Mapping[str, Any]) -> Tensor | None:
    """Multiply a weight (…, N, K) by its scales, one per block of rows and columns (DeepSeek-V3, arXiv 2412.19437)."""
    scale = stored.pop(f"{name}_scale_inv", None)
    if scale is None:
        return None
    for activations in ("activation_scale", "input_scale"):
        stored.pop(name.removesuffix("weight") + activations, None)
    weight, scale = stored.pop(name).float(), scale.float()
    block = scale_block_shape(quantization)
    if scale.numel() == 1 or block is None:
        return weight * scale.reshape(())
    rows, columns = weight.shape[-2:]
    scale = scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return weight.mul_(scale)


def _dequantize_bitsandbytes(name: str, stored: dict[str, Tensor], quantization: Mapping[str, Any]) -> Tensor | None:
    """Dequantize NF4 or FP4 with its quantization state (QLoRA, arXiv 2305.14314), or 8 bits with a scale per row
    (LLM.int8(), arXiv 2208.07339)."""
    scales = name.removesuffix("weight") + "SCB"
    if scales in stored:
        stored.pop(f"{name}_format", None)
        return stored.pop(name).float() * (stored.pop(scales).float() / INT8_RANGE).unsqueeze(1)
    state = {part: stored.pop(part) for part in list(stored) if part.startswith(f"{name}.")}
    if not state:
        return None
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed = stored.pop(name).contiguous().view(torch.uint8).reshape(-1, 1)  # some files store it as a float dtype
    return dequantize_4bit(packed, QuantState.from_dict(state, device=torch.device("cpu")))
