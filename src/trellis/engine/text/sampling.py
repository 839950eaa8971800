"""Sample one token per row of logits from given uniform numbers. It knows no model."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import EngineError
from ...options import Sampling

MIN_TEMPERATURE = 1e-4
"""Below this temperature sampling is greedy: dividing by less would overflow."""


def overflow_error() -> EngineError:
    """Return the error for logits that are NaN or infinite."""
    return EngineError(
        "The model gave no number here: its scores for the next token are NaN or infinite.",
        code="not_finite",
        next_step="Go back to an earlier step or another prompt. If it happens everywhere, load the model in 32-bit; "
        "if it still happens, its files are damaged: copy or download them again.",
    )


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < MIN_TEMPERATURE


def draw_uniforms(steps: int, rows: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw numbers (S, R) in [0, 1), the same on every device; scaled so that rounding never gives 1."""
    return (torch.rand(steps, rows, generator=generator) * (1 - 2**-20)).to(device)


def sample(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one token per row of logits (R, V). Returns tokens (R,) and their log-probabilities (R,) in fp32, over the
    temperature, before any filter.

    By inversion: the first token at which the cumulative probability exceeds the row's number in `uniforms` (R,).
    Filters: min-p (arXiv 2407.01082), then top-p (nucleus, arXiv 1904.09751), after the temperature.

    A row with NaN or infinity, or with impossible tokens only, gets a log-probability of NaN and an undefined token;
    other rows are not affected.
    """
    scaled = logits.float()
    if is_greedy(sampling):
        tokens = scaled.argmax(dim=-1)
        return tokens, torch.log_softmax(scaled, dim=-1).gather(-1, tokens[:, None])[:, 0]
    return sample_scaled(scaled / sampling.temperature, sampling.min_p, sampling.top_p, uniforms)


def sample_scaled(
    scaled: Tensor, min_p: float | Tensor, top_p: float | Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """`sample` from logits (R, V) already divided by the temperature. Filters given as tensors on the device can change
    their value within a captured graph."""
    top = scaled.amax(dim=-1, keepdim=True)
    scaled = scaled - top
    probabilities = scaled.exp()  # relative to the likeliest token
    total = probabilities.sum(dim=-1)
    if isinstance(min_p, Tensor) or min_p > 0:
        probabilities = probabilities.where(probabilities >= min_p, 0.0)
    if isinstance(top_p, Tensor) or top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.where(before < top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    cumulative = probabilities.cumsum(dim=-1)
    tokens = torch.searchsorted(cumulative, cumulative[:, -1:] * uniforms[:, None], right=True)
    tokens = tokens.clamp(max=scaled.shape[-1] - 1)  # if nothing is finite, the search ends past the last token
    return tokens[:, 0], scaled.gather(-1, tokens)[:, 0] - total.log()
