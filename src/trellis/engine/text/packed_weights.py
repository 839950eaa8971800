"""Weights in the order in which a CPU reads them fastest for a few rows: oneDNN's, through the operations that torch's
own compiler uses. It knows matrices alone."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import psutil
import torch
from torch import Tensor

MAX_PACKED_ROWS = 64
"""Up to so many rows the packed order is quicker."""

MAX_PACKED_BYTES = 2_000_000_000
"""A packed copy is kept of models up to this size, where there is room for four."""


def has_memory_for_copy(size: int) -> bool:
    """Whether there is room for a copy of so many bytes and still as much again for work, three times."""
    free = psutil.virtual_memory().available
    with suppress(ImportError):  # Windows has no such limits
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_DATA)
        if most != resource.RLIM_INFINITY:
            free = min(free, most - psutil.Process().memory_info().rss)
    return bool(free >= 4 * size)


def pack_weight(weight: Tensor) -> Tensor | None:
    """A packed copy of a matrix (out, in); None where this machine or this torch cannot pack it."""
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
    """Whether the operations are there and give the right numbers: torch does not promise them."""
    try:
        weight, x = torch.linspace(-1, 1, 40 * 24).view(40, 24), torch.linspace(0, 1, 3 * 24).view(3, 24)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 4)
        return torch.allclose(packed_linear(x, packed, None), x @ weight.T, atol=1e-4)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
