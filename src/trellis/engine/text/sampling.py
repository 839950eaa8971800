"""One token for each row of logits, from numbers that were drawn before. It knows no model."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import EngineError
from ...params import Sampling

COLDEST = 1e-4
"""Below this temperature the likeliest token is drawn: what is divided by less is not a number any more."""


def overflowed() -> EngineError:
    """The error of a row of logits that holds NaN or infinity."""
    return EngineError(
        "The model gave no number here: its scores for the next token are NaN or infinite.",
        code="not_finite",
        next_step="Go back to an earlier step or another prompt. If it happens everywhere, load the model in 32-bit; "
        "if it still happens, its files are damaged: copy or download them again.",
    )


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < COLDEST


def uniforms(steps: int, rows: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Numbers (S, R) in [0, 1) for as many draws, the same on every device; rounding never makes one of them 1."""
    return (torch.rand(steps, rows, generator=generator) * (1 - 2**-20)).to(device)


def draw(logits: Tensor, sampling: Sampling, chances: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row of logits (R, V): tokens (R,) and their log-probabilities (R,) in fp32, over the
    temperature, before any was filtered out.

    By inversion: the first token at which the summed probabilities pass a number (R,) in [0, 1) that was drawn for the
    row. Filters: min-p (arXiv 2407.01082), then top-p (nucleus, arXiv 1904.09751), after the temperature.

    A row that holds NaN or infinity, or only impossible tokens, has a log-probability of NaN, and its token means
    nothing; the other rows are as they would be without it.
    """
    scaled = logits.float()
    if is_greedy(sampling):
        drawn = scaled.argmax(dim=-1)
        return drawn, torch.log_softmax(scaled, dim=-1).gather(-1, drawn[:, None])[:, 0]
    return drawn_from(scaled / sampling.temperature, sampling.min_p, sampling.top_p, chances)


def drawn_from(scaled: Tensor, min_p: float | Tensor, top_p: float | Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """`draw` from logits (R, V) over the temperature. A filter that is a tensor on the device may change its value
    without a change of what is run."""
    top = scaled.amax(dim=-1, keepdim=True)
    scaled = scaled - top
    likely = scaled.exp()  # the likeliest is 1
    whole = likely.sum(dim=-1)
    if isinstance(min_p, Tensor) or min_p > 0:
        likely = likely.where(likely >= min_p, 0.0)
    if isinstance(top_p, Tensor) or top_p < 1:
        ordered, places = likely.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.where(before < top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        likely = torch.zeros_like(likely).scatter(-1, places, ordered)
    summed = likely.cumsum(dim=-1)
    drawn = torch.searchsorted(summed, summed[:, -1:] * chances[:, None], right=True)
    drawn = drawn.clamp(max=scaled.shape[-1] - 1)  # where nothing is a number, nothing is passed
    return drawn[:, 0], scaled.gather(-1, drawn)[:, 0] - whole.log()
