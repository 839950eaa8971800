"""The learning step: from one choice to new weights. docs/learning.md has the formulas.

It knows log-probabilities and flat vectors; not files, sessions or how answers were sampled.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...messages import Written
from ...options import Learning
from ..text.adapters import AdapterSlot
from ..text.quality_metrics import variety_of
from ..text.weights_store import not_finite_error
from .log_probs import GradientPart, Group, schedule_passes, scorer_for
from .losses import BETAS, CLIP, METHODS, ChoiceLoss, k3
from .targets import chosen_indices

EPSILON = 1e-8


@dataclass(frozen=True)
class TrainingState:
    """Adapter values and optimizer moments as flat fp32 vectors (P,), and the number of steps so far."""

    flat: Tensor
    first: Tensor
    second: Tensor
    steps: int


def adamw_step(
    state: TrainingState, gradient: Tensor, rate: float, betas: tuple[float, float] = BETAS, clip: float | None = CLIP
) -> TrainingState:
    """Take one Adam step with norm clipping and without weight decay (arXiv 1412.6980, 1711.05101); returns new
    tensors."""
    if clip is not None:
        gradient = gradient * (clip / (gradient.norm() + 1e-6)).clamp(max=1.0)
    steps = state.steps + 1
    first = betas[0] * state.first + (1 - betas[0]) * gradient
    second = betas[1] * state.second + (1 - betas[1]) * gradient.square()
    scale = (second / (1 - betas[1] ** steps)).sqrt() + EPSILON
    flat = state.flat - rate * (first / (1 - betas[0] ** steps)) / scale
    return TrainingState(flat, first, second, steps)


@dataclass(frozen=True)
class StepOutcome:
    state: TrainingState
    loss: float
    kl: float
    share_before: float
    share_after: float
    inner_steps: int


def scale_imitation(options: Learning, group: Group) -> Learning:
    """Scale the weight of the likelihood term by how much the answers differ. If all are alike, the choice says little,
    and imitating it would only make the next ones more alike. A written answer is never scaled down."""
    if isinstance(group.choice, Written):
        return options
    return options.model_copy(update={"nll_weight": options.nll_weight * variety_of(group.answers)})


MIN_RATE_FACTOR = 0.1


def settling_factor(steps: int, options: Learning) -> float:
    """Return the factor of the learning rate after this many optimizer steps: 1, ½ after `settling` choices, ⅓ after
    twice as many, and never less than a tenth, so that a change of mind still gets through."""
    if not options.settling:
        return 1.0
    return max(MIN_RATE_FACTOR, 1.0 / (1.0 + steps / (options.settling * options.inner_steps)))


def learn_choice(
    slot: AdapterSlot,
    start: TrainingState,
    group: Group,
    replay: Sequence[Group],
    references: Sequence[Tensor],
    options: Learning,
    name: str = "",
) -> Generator[None, None, StepOutcome]:
    """Take up to `inner_steps` optimizer steps on one choice, replaying some earlier ones.

    Stops when the share of the chosen answer reaches the target; for “none of these”, half of it in at most
    `refusal_steps`. A step that moves the answers further than `step_limit` from the start is halved, and is the last.
    Yields between steps: other weights may be put into the slot meanwhile, so nothing in it outlives a yield.
    `references` are the base model's log-probabilities of the group and of each replayed one. `name` seeds dropout.
    """
    method = METHODS[options.learning_method]
    is_refusal = not chosen_indices(group.choice, len(group.answers))
    max_steps = 1 if method.is_single_step else options.inner_steps
    if is_refusal:
        max_steps = min(max_steps, options.refusal_steps)
    groups = [group] if method.is_single_step else [group, *replay]
    rate = options.learning_rate
    if rate is None:
        raise ValueError("a learning rate must have been chosen before a lesson reaches the engine")
    if not method.is_single_step:
        rate *= settling_factor(start.steps, options)
    masks = [each.mask(reference.device) for each, reference in zip(groups, references, strict=False)]
    replay_share = options.replay_weight / (len(groups) - 1) if len(groups) > 1 else 0.0
    passes = schedule_passes(groups, slot.parameters)
    scorer = scorer_for(slot, groups)
    options_by_group = [scale_imitation(options, each) for each in groups]
    # “None of these” says what is wrong, not what is right: pushed as far as a choice, it would destroy more than it
    # teaches.
    target = options.target_share * (0.5 if is_refusal else 1.0)

    def loss_of(number: int, logprobs: Tensor) -> ChoiceLoss:
        return method.loss(logprobs, references[number], masks[number], groups[number].choice, options_by_group[number])

    def evaluate_with_gradient(flat: Tensor) -> Generator[None, None, tuple[Tensor, ChoiceLoss, Tensor]]:
        """Return the new group's log-probabilities and loss, and the gradient over all groups."""
        gradient = torch.zeros_like(flat)
        first_results: dict[int, tuple[Tensor, ChoiceLoss]] = {}

        def pass_loss(numbers: range, logprobs_by_group: list[Tensor]) -> Tensor:
            losses = [loss_of(number, logprobs) for number, logprobs in zip(numbers, logprobs_by_group, strict=True)]
            first_results[numbers.start] = logprobs_by_group[0].detach(), losses[0]
            weights = [replay_share if number else 1.0 for number in numbers]
            return torch.stack([v.loss * weight for v, weight in zip(losses, weights, strict=True)]).sum()

        for numbers in passes:
            parts: list[GradientPart] = [
                ([groups[number] for number in each], (name, steps, each.start), partial(pass_loss, each))
                for each in numbers
            ]
            for made, _ in scorer.gradients(parts, flat):
                gradient += made
            yield None
        return *first_results[0], gradient

    def evaluate(flat: Tensor) -> tuple[Tensor, ChoiceLoss]:
        """Return the new group's log-probabilities and loss, without a gradient."""
        (logprobs,) = scorer.logprobs(groups[:1], flat, (name, steps, 0))
        return logprobs, loss_of(0, logprobs)

    steps = 0
    state = start
    start_logprobs, result, gradient = yield from evaluate_with_gradient(start.flat)
    before = result
    while steps < max_steps:
        steps += 1
        if not bool(torch.isfinite(gradient).all()):
            raise not_finite_error()
        moved = adamw_step(state, gradient, rate, method.betas, method.clip)
        if steps < max_steps:
            logprobs, result, gradient = yield from evaluate_with_gradient(moved.flat)
        else:
            logprobs, result = evaluate(moved.flat)
        distance = float(k3(logprobs, start_logprobs, masks[0]))
        if not method.is_single_step and not distance <= options.step_limit:
            half = state.flat + (moved.flat - state.flat) / 2
            state = TrainingState(half, moved.first, moved.second, moved.steps)
            yield None
            _, result = evaluate(state.flat)
            break
        state = moved
        if result.share >= target:
            break
    outcome = StepOutcome(state, float(before.loss.detach()), result.kl, before.share, result.share, steps)
    if not all(map(math.isfinite, (outcome.loss, outcome.kl, outcome.share_before, outcome.share_after))):
        raise not_finite_error()
    return outcome
