"""Weights in the memory layout that a CPU reads fastest for a few rows: oneDNN's, through operations of torch's
compiler. It knows only matrices."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import psutil
import torch
from torch import Tensor

MAX_PACKED_ROWS = 64
"""Up to this many rows the packed layout is faster."""

MAX_PACKED_BYTES = 2_000_000_000
"""Models up to this size get a packed copy, if there is memory for four."""


def has_memory_for_copy(size: int) -> bool:
    """Whether four times this many bytes are free: for a copy, and for work."""
    free = psutil.virtual_memory().available
    with suppress(ImportError):  # not available on Windows
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_DATA)
        if most != resource.RLIM_INFINITY:
            free = min(free, most - psutil.Process().memory_info().rss)
    return bool(free >= 4 * size)


def pack_weight(weight: Tensor) -> Tensor | None:
    """Return a packed copy of a matrix (out, in); None if this machine or torch version cannot pack it."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not _is_supported():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 4)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, in) to x Wᵀ + b (N, out)."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return output


@cache
def _is_supported() -> bool:
    """Whether the operations exist and give correct results: torch does not guarantee them."""
    try:
        weight, x = torch.linspace(-1, 1, 40 * 24).view(40, 24), torch.linspace(0, 1, 3 * 24).view(3, 24)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 4)
        return torch.allclose(packed_linear(x, packed, None), x @ weight.T, atol=1e-4)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
