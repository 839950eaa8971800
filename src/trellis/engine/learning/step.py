"""The learning step: from one choice to new weights. The formulas stand in docs/learning.md.

It knows log-probabilities and flat vectors; not files, sessions or how answers were drawn.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...messages import Written
from ...params import Learning
from ..text.adapters import Slot, not_finite
from ..text.quality_metrics import variety_of
from .log_probs import Group, Part, reading_of, rounds
from .losses import BETAS, CLIP, METHODS, Verdict, k3
from .targets import chosen_indexes

EPSILON = 1e-8


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


def fading(options: Learning, group: Group) -> Learning:
    """The options with as much pull on the winner as the answers differ. Where all say much the same, whoever is
    chosen says little, and to imitate it would only make the next ones more alike. What a person wrote never fades."""
    if isinstance(group.choice, Written):
        return options
    return options.model_copy(update={"nll_weight": options.nll_weight * variety_of(group.answers)})


FLOOR = 0.1


def settled(steps: int, options: Learning) -> float:
    """What part of the rate a click has after so many optimiser steps: 1, ½ after `settling` choices, ⅓ after twice
    as many, and never less than a tenth, so that a change of mind still gets through."""
    if not options.settling:
        return 1.0
    return max(FLOOR, 1.0 / (1.0 + steps / (options.settling * options.inner_steps)))


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

    Stops when the chosen answer's share reaches the target; none of these reaches half of it in at most
    `refusal_steps`. A step that moves the answers further than `step_limit` from where the click began is halved,
    and is the last. Yields between steps: whoever runs it may meanwhile put other weights into the slot, so nothing
    in it outlives a yield.
    `references` are the base model's log-probabilities for the group and then for each replayed one. `name` is
    where dropout's random numbers start from.
    """
    method = METHODS[options.learning_method]
    refused = not chosen_indexes(group.choice, len(group.answers))
    most = 1 if method.single else options.inner_steps
    if refused:
        most = min(most, options.refusal_steps)
    groups = [group] if method.single else [group, *replay]
    rate = options.learning_rate
    if rate is None:
        raise ValueError("a learning rate must have been chosen before a lesson reaches the engine")
    if not method.single:
        rate *= settled(start.steps, options)
    masks = [each.mask(reference.device) for each, reference in zip(groups, references, strict=False)]
    shared = options.replay_weight / (len(groups) - 1) if len(groups) > 1 else 0.0
    together = rounds(groups, slot.parameters)
    reading = reading_of(slot, groups)
    faded = [fading(options, each) for each in groups]
    # "None of these" says what is wrong and not what is right: pushed as far, it would tear down more than it teaches.
    target = options.target_share * (0.5 if refused else 1.0)

    def judged(number: int, logprobs: Tensor) -> Verdict:
        return method.judge(logprobs, references[number], masks[number], groups[number].choice, faded[number])

    def look(flat: Tensor) -> Generator[None, None, tuple[Tensor, Verdict, Tensor]]:
        """The new group's log-probabilities and verdict, and the gradient of everything."""
        gradient = torch.zeros_like(flat)
        seen: dict[int, tuple[Tensor, Verdict]] = {}

        def loss(numbers: range, found: list[Tensor]) -> Tensor:
            verdicts = [judged(number, logprobs) for number, logprobs in zip(numbers, found, strict=True)]
            seen[numbers.start] = found[0].detach(), verdicts[0]
            weights = [shared if number else 1.0 for number in numbers]
            return torch.stack([v.loss * weight for v, weight in zip(verdicts, weights, strict=True)]).sum()

        for numbers in together:
            parts: list[Part] = [
                ([groups[number] for number in each], (name, steps, each.start), partial(loss, each))
                for each in numbers
            ]
            for made, _ in reading.gradients(parts, flat):
                gradient += made
            yield None
        return *seen[0], gradient

    def glance(flat: Tensor) -> tuple[Tensor, Verdict]:
        """The new group's alone, without a gradient."""
        (logprobs,) = reading.logprobs(groups[:1], flat, (name, steps, 0))
        return logprobs, judged(0, logprobs)

    steps = 0
    point = start
    begun, verdict, gradient = yield from look(start.flat)
    before = verdict
    while steps < most:
        steps += 1
        if not bool(torch.isfinite(gradient).all()):
            raise not_finite()
        moved = adamw_step(point, gradient, rate, method.betas, method.clip)
        if steps < most:
            logprobs, verdict, gradient = yield from look(moved.flat)
        else:
            logprobs, verdict = glance(moved.flat)
        far = float(k3(logprobs, begun, masks[0]))
        if not method.single and not far <= options.step_limit:
            half = point.flat + (moved.flat - point.flat) / 2
            point = Point(half, moved.first, moved.second, moved.steps)
            yield None
            _, verdict = glance(point.flat)
            break
        point = moved
        if verdict.share >= target:
            break
    outcome = Outcome(point, float(before.loss.detach()), verdict.kl, before.share, verdict.share, steps)
    if not all(map(math.isfinite, (outcome.loss, outcome.kl, outcome.share_before, outcome.share_after))):
        raise not_finite()
    return outcome
