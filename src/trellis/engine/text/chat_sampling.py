"""Sample the next token of every slot of a chat batch, each with the options of its own request."""

from __future__ import annotations

import torch
from torch import Tensor

from .chat_slots import ChatSlot
from .sampling import is_greedy, sample_scaled


def sample_each(logits: Tensor, slots: list[ChatSlot], end_tokens: frozenset[int] = frozenset()) -> list[int | None]:
    """Sample a token for each row of logits (R, V) with its slot's options; None where a row is not finite."""
    device = logits.device
    samplings = [slot.request.sampling for slot in slots]
    if any(slot.request.repetition_penalty != 1 or slot.answer_tokens < slot.request.min_tokens for slot in slots):
        logits = torch.stack([_apply_penalties(row, slot, end_tokens) for row, slot in zip(logits, slots, strict=True)])

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    scaled = logits.float() / column([1.0 if is_greedy(each) else each.temperature for each in samplings])
    for row, slot in enumerate(slots):
        if 0 < slot.request.top_k < scaled.shape[-1]:
            threshold = scaled[row].topk(slot.request.top_k).values[-1]
            scaled[row] = scaled[row].masked_fill(scaled[row] < threshold, float("-inf"))
    uniforms = torch.tensor([slot.rng.random() * (1 - 2**-20) for slot in slots], device=device)
    top_p: float | Tensor = (
        column([each.top_p for each in samplings]) if any(each.top_p < 1 for each in samplings) else 1.0
    )
    sampled, logprobs = sample_scaled(scaled, column([each.min_p for each in samplings]), top_p, uniforms)
    if any(map(is_greedy, samplings)):
        greedy = torch.tensor(list(map(is_greedy, samplings)), device=device)
        sampled = torch.where(greedy, scaled.argmax(dim=-1), sampled)
    tokens: list[int] = sampled.masked_fill(logprobs.isnan(), -1).tolist()
    return [None if token < 0 else token for token in tokens]


def _apply_penalties(logits: Tensor, slot: ChatSlot, end_tokens: frozenset[int]) -> Tensor:
    """Return logits (V,) with the repetition penalty (CTRL, arXiv 1909.05858) for tokens read or sampled before, and
    without end tokens until `min_tokens`."""
    logits = logits.float()
    if (penalty := slot.request.repetition_penalty) != 1:
        if slot.seen_tokens is None:
            slot.seen_tokens = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
            slot.seen_tokens[slot.prepared.tokens] = True
        if slot.next_token is not None:
            slot.seen_tokens[slot.next_token] = True
        changed = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(slot.seen_tokens, changed, logits)
    if slot.answer_tokens < slot.request.min_tokens and end_tokens:
        known = [token for token in end_tokens if token < len(logits)]
        logits = logits.index_fill(0, torch.tensor(known, device=logits.device, dtype=torch.long), float("-inf"))
    return logits
