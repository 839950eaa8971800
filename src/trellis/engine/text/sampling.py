"""One token for each row of logits, from numbers that were drawn before. It knows no model."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import EngineError
from ...options import Sampling

MIN_TEMPERATURE = 1e-4
"""Below this temperature the likeliest token is drawn: what is divided by less is not a number any more."""


def overflow_error() -> EngineError:
    """The error of a row of logits that holds NaN or infinity."""
    return EngineError(
        "The model gave no number here: its scores for the next token are NaN or infinite.",
        code="not_finite",
        next_step="Go back to an earlier step or another prompt. If it happens everywhere, load the model in 32-bit; "
        "if it still happens, its files are damaged: copy or download them again.",
    )


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < MIN_TEMPERATURE


def draw_uniforms(steps: int, rows: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Numbers (S, R) in [0, 1) for as many draws, the same on every device; rounding never makes one of them 1."""
    return (torch.rand(steps, rows, generator=generator) * (1 - 2**-20)).to(device)


def sample(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row of logits (R, V): tokens (R,) and their log-probabilities (R,) in fp32, over the
    temperature, before any was filtered out.

    By inversion: the first token at which the summed probabilities pass a number (R,) in [0, 1) that was drawn for the
    row. Filters: min-p (arXiv 2407.01082), then top-p (nucleus, arXiv 1904.09751), after the temperature.

    A row that holds NaN or infinity, or only impossible tokens, has a log-probability of NaN, and its token means
    nothing; the other rows are as they would be without it.
    """
    scaled = logits.float()
    if is_greedy(sampling):
        tokens = scaled.argmax(dim=-1)
        return tokens, torch.log_softmax(scaled, dim=-1).gather(-1, tokens[:, None])[:, 0]
    return sample_scaled(scaled / sampling.temperature, sampling.min_p, sampling.top_p, uniforms)


def sample_scaled(
    scaled: Tensor, min_p: float | Tensor, top_p: float | Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """`draw` from logits (R, V) over the temperature. A filter that is a tensor on the device may change its value
    without a change of what is run."""
    top = scaled.amax(dim=-1, keepdim=True)
    scaled = scaled - top
    probabilities = scaled.exp()  # the likeliest is 1
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
    tokens = tokens.clamp(max=scaled.shape[-1] - 1)  # where nothing is a number, nothing is passed
    return tokens[:, 0], scaled.gather(-1, tokens)[:, 0] - total.log()
