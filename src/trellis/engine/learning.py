"""The learning step: from one choice to new weights. The formulas stand in docs/learning.md.

It knows log-probabilities and flat vectors; not files, sessions or how answers were drawn.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TrellisError
from ..messages import Choice
from ..params import Learning
from .adapters import Slot
from .methods import BETAS, CLIP, METHODS, Verdict, chosen_indexes, k3

EPSILON = 1e-8


@dataclass(frozen=True)
class Group:
    """A lesson as numbers: one prompt, its answers as tokens (each with its end token if it ended), the choice.

    A written answer stands last among the answers.
    """

    prompt: list[int]
    answers: list[list[int]]
    choice: Choice
    temperature: float

    def mask(self, device: torch.device) -> Tensor:
        """(G, T) true where an answer has a token. From lengths, never from token ids."""
        lengths = torch.tensor([len(answer) for answer in self.answers], device=device)
        return torch.arange(int(lengths.max()), device=device)[None, :] < lengths[:, None]


def answer_logprobs(model: Any, group: Group) -> Tensor:
    """Log-probabilities (G, T) of each answer's tokens given the prompt, fp32, zero where there is none.

    Rows are padded on the right, which a causal model never looks at, so no attention mask is needed;
    logits are only made for the positions that predict an answer.
    """
    longest = max(len(answer) for answer in group.answers)
    rows = [group.prompt + answer + [0] * (longest - len(answer)) for answer in group.answers]
    ids = torch.tensor(rows, device=model.device)
    logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=longest).logits
    logprobs = torch.log_softmax(logits.float() / group.temperature, dim=-1)
    picked = logprobs.gather(-1, ids[:, -longest:, None])[..., 0]
    return picked.masked_fill(~group.mask(picked.device), 0.0)


@dataclass(frozen=True)
class Point:
    """Where the optimiser stands: flat fp32 vectors (P,) and the count of steps so far."""

    flat: Tensor
    first: Tensor
    second: Tensor
    steps: int


def adamw_step(
    point: Point, gradient: Tensor, rate: float, betas: tuple[float, float] = BETAS, clip: float | None = CLIP
) -> Point:
    """One step of Adam with clipping by norm and without decay (arXiv 1412.6980, 1711.05101), as new tensors."""
    if clip is not None:
        gradient = gradient * (clip / (gradient.norm() + 1e-6)).clamp(max=1.0)
    steps = point.steps + 1
    first = betas[0] * point.first + (1 - betas[0]) * gradient
    second = betas[1] * point.second + (1 - betas[1]) * gradient.square()
    scale = (second / (1 - betas[1] ** steps)).sqrt() + EPSILON
    flat = point.flat - rate * (first / (1 - betas[0] ** steps)) / scale
    return Point(flat, first, second, steps)


@dataclass(frozen=True)
class Outcome:
    point: Point
    loss: float
    kl: float
    share_before: float
    share_after: float
    inner_steps: int


def learn_steps(
    slot: Slot,
    start: Point,
    group: Group,
    replay: Sequence[Group],
    references: Sequence[Tensor],
    options: Learning,
    name: str = "",
) -> Generator[None, None, Outcome]:
    """Up to `inner_steps` optimiser steps on one choice, with some earlier ones beside it.

    Stops when the chosen answer's share reaches the target (none of these: half of it); a step that moves the
    answers further than `step_limit` from where the click began is halved, and is the last. Yields between
    steps: whoever runs it may meanwhile put other weights into the slot, so nothing in it outlives a yield.
    `references` are the base model's log-probabilities for the group and then for each replayed one. `name` is
    where dropout's random numbers start from.
    """
    method = METHODS[options.learning_method]
    most = 1 if method.single else options.inner_steps
    replay = () if method.single else replay
    rate = options.learning_rate
    if rate is None:
        raise ValueError("a learning rate must have been chosen before a lesson reaches the engine")
    reference, mask = references[0], group.mask(references[0].device)
    shared = options.replay_weight / len(replay) if replay else 0.0
    # "None of these" says what is wrong and not what is right: pushed as far, it would tear down more than it teaches.
    target = options.target_share * (1.0 if chosen_indexes(group.choice, len(group.answers)) else 0.5)

    def look(flat: Tensor) -> tuple[Tensor, Verdict]:
        slot.install(flat)
        with slot.dropping(name, steps):
            logprobs = answer_logprobs(slot.model, group)
        return logprobs, method.judge(logprobs, reference, mask, group.choice, options)

    steps = 0
    logprobs, verdict = look(start.flat)
    point, before, begun = start, verdict, logprobs.detach()
    while steps < most:
        steps += 1
        gradient = slot.gradient(verdict.loss)
        for number, (earlier, earlier_reference) in enumerate(zip(replay, references[1:], strict=False)):
            yield None
            slot.install(point.flat)
            earlier_mask = earlier.mask(earlier_reference.device)
            with slot.dropping(name, steps, number):
                earlier_logprobs = answer_logprobs(slot.model, earlier)
            again = method.judge(earlier_logprobs, earlier_reference, earlier_mask, earlier.choice, options)
            gradient += slot.gradient(shared * again.loss)
        if not bool(torch.isfinite(gradient).all()):
            raise TrellisError(
                "The model's numbers overflowed while it learned from this choice.",
                code="not_finite",
                next_step="Undo a few steps, or use a lower learning rate.",
            )
        moved = adamw_step(point, gradient, rate, method.betas, method.clip)
        yield None
        logprobs, verdict = look(moved.flat)
        far = float(k3(logprobs.detach(), begun, mask))
        if not method.single and not far <= options.step_limit:
            half = point.flat + (moved.flat - point.flat) / 2
            point = Point(half, moved.first, moved.second, moved.steps)
            yield None
            _, verdict = look(point.flat)
            break
        point = moved
        if verdict.share >= target:
            break
    return Outcome(point, float(before.loss.detach()), verdict.kl, before.share, verdict.share, steps)
