"""Train on a whole choice log: several epochs in shuffled batches, with the losses of single clicks.

It knows groups, log-probabilities and flat vectors; not files or sessions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...messages import derived_seed
from ...options import Learning
from ..text.adapters import AdapterSlot
from ..text.sampling import overflow_error
from ..text.weights_store import not_finite_error
from .log_probs import GradientPart, Group, schedule_passes, scorer_for
from .losses import METHODS, Method, answer_rewards
from .step import TrainingState, adamw_step, scale_imitation
from .targets import agrees_with_choice

BATCH_SIZE = 4
"""Choices per optimizer step."""

WARMUP_FRACTION = 0.1
"""Fraction of the steps over which the learning rate rises; then it falls along a cosine."""

MIN_RATE_FACTOR = 0.1
MAX_EVALUATED = 200
"""At most this many choices are evaluated before and after."""


@dataclass(frozen=True)
class RetrainOutcome:
    """The result of retraining. Shares and agreement are over `evaluated` choices of the log."""

    state: TrainingState
    loss: float
    kl: float
    share_before: float
    share_after: float
    agreed: int
    evaluated: int
    steps: int


@dataclass(frozen=True)
class Evaluation:
    """How weights rate some choices: mean share of the choice, mean k3 to the base model, number of agreements."""

    share: float
    kl: float
    agreed: int


def count_steps(count: int, epochs: int) -> int:
    return epochs * math.ceil(count / BATCH_SIZE)


def rate_factor(step: int, total: int) -> float:
    """Return the factor of the learning rate at a step, from 0: linear warmup, then cosine decay."""
    warmup = max(1, round(WARMUP_FRACTION * total))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, total - warmup)
    return MIN_RATE_FACTOR + (1 - MIN_RATE_FACTOR) * 0.5 * (1 + math.cos(math.pi * progress))


def retrain(
    slot: AdapterSlot,
    start: TrainingState,
    groups: Sequence[Group],
    reference: Callable[[Group], Tensor],
    options: Learning,
    epochs: int,
    seed: int,
    name: str = "",
) -> Generator[tuple[int, int, float], None, RetrainOutcome]:
    """Train on all groups for `epochs`. Yields (steps done, total steps, last loss) between forward passes; nothing in
    the slot outlives a yield. `reference` returns a group's base log-probabilities (G, T)."""
    method = METHODS[options.learning_method]
    rate = options.learning_rate
    if rate is None:
        raise ValueError("a learning rate must have been chosen before a log reaches the engine")
    total = count_steps(len(groups), epochs)
    options_by_group = [scale_imitation(options, group) for group in groups]
    evaluated = groups[:: max(1, math.ceil(len(groups) / MAX_EVALUATED))]
    state = TrainingState(start.flat, torch.zeros_like(start.first), torch.zeros_like(start.second), 0)
    before = yield from evaluate_choices(slot, state.flat, evaluated, reference, options, total)
    rng = random.Random(derived_seed("fit", seed))
    scorer = scorer_for(slot, groups)
    done, losses = 0, []
    for _ in range(epochs):
        order = rng.sample(range(len(groups)), len(groups))
        for begin in range(0, len(order), BATCH_SIZE):
            batch_indexes = order[begin : begin + BATCH_SIZE]
            batch = [groups[number] for number in batch_indexes]
            gradient, loss = torch.zeros_like(state.flat), 0.0
            for numbers in schedule_passes(batch, slot.parameters):
                parts: list[GradientPart] = []
                for each in numbers:
                    examples = [
                        (batch[number], reference(batch[number]), options_by_group[batch_indexes[number]])
                        for number in each
                    ]
                    loss_part = partial(_partial_loss, method, examples, len(batch))
                    parts.append(([group for group, _, _ in examples], (name, done, each.start), loss_part))
                for made, part in scorer.gradients(parts, state.flat):
                    gradient += made
                    loss += part
                yield done, total, loss
            if not bool(torch.isfinite(gradient).all()):
                raise not_finite_error()
            state = adamw_step(state, gradient, rate * rate_factor(done, total), method.betas, method.clip)
            done += 1
            losses.append(loss)
    after = yield from evaluate_choices(slot, state.flat, evaluated, reference, options, total, done)
    last = losses[-math.ceil(len(groups) / BATCH_SIZE) :]
    state = rescale_moments(state, start.steps + done, method.betas)
    loss = sum(last) / len(last)
    if not all(map(math.isfinite, (loss, after.kl, before.share, after.share))):
        raise not_finite_error()
    return RetrainOutcome(state, loss, after.kl, before.share, after.share, after.agreed, len(evaluated), done)


def _partial_loss(
    method: Method,
    examples: Sequence[tuple[Group, Tensor, Learning]],
    batch_size: int,
    logprobs_by_group: Sequence[Tensor],
) -> Tensor:
    """Return what some groups contribute to the mean loss of their batch. An example is a group, its base
    log-probabilities (G, T) and its options."""
    losses = [
        method.loss(logprobs, known, group.mask(known.device), group.choice, options)
        for logprobs, (group, known, options) in zip(logprobs_by_group, examples, strict=True)
    ]
    return torch.stack([verdict.loss for verdict in losses]).sum() / batch_size


def rescale_moments(state: TrainingState, steps: int, betas: tuple[float, float]) -> TrainingState:
    """Return the state as if it had taken this many steps, which sets how fast later clicks settle. The moments are
    scaled so that their bias correction gives the same result."""
    first, second = ((1 - beta**steps) / (1 - beta**state.steps) for beta in betas)
    return TrainingState(state.flat, state.first * first, state.second * second, steps)


def evaluate_choices(
    slot: AdapterSlot,
    flat: Tensor,
    groups: Sequence[Group],
    reference: Callable[[Group], Tensor],
    options: Learning,
    total: int = 0,
    done: int = 0,
) -> Generator[tuple[int, int, float], None, Evaluation]:
    """Evaluate weights on some choices without training. Yields like `retrain`."""
    # The share of the choice model is reported for every method.
    method = METHODS["choice"]
    shares, kls, agreed = 0.0, 0.0, 0
    for group in groups:
        base_logprobs = reference(group)
        (logprobs,) = scorer_for(slot, [group]).logprobs([group], flat)
        if not bool(torch.isfinite(logprobs).all()):
            raise overflow_error()
        result = method.loss(logprobs, base_logprobs, group.mask(base_logprobs.device), group.choice, options)
        shares += result.share
        kls += result.kl
        rewards = answer_rewards(logprobs, base_logprobs, group.mask(base_logprobs.device), options)
        agreed += agrees_with_choice(rewards.tolist(), group.choice, group.answers)
        yield done, total, float("nan")
    return Evaluation(shares / len(groups), kls / len(groups), agreed)
