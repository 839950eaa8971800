"""Training on a whole log of choices: several passes in shuffled batches, with the losses that single clicks have.

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
from ...params import Learning
from ..text.adapters import Slot, not_finite
from ..text.sampling import overflowed
from .log_probs import Group, Part, reading_of, rounds
from .losses import METHODS, Method, rewards_of
from .step import Point, adamw_step, fading
from .targets import agrees

BATCH = 4
"""Choices that share an optimiser step."""

WARMING = 0.1
"""The part of all steps over which the rate rises; after it, it falls along a cosine to the floor."""

FLOOR = 0.1
JUDGED = 200
"""So many choices at most are looked at to say what a fit did."""


@dataclass(frozen=True)
class FitOutcome:
    """What a fit came to. Shares and agreement are over `judged` choices of the log."""

    point: Point
    loss: float
    kl: float
    share_before: float
    share_after: float
    agreed: int
    judged: int
    steps: int


@dataclass(frozen=True)
class Sight:
    """What weights make of some choices: mean share of what was chosen, mean k3 to the base, how many agree."""

    share: float
    kl: float
    agreed: int


def steps_of(count: int, epochs: int) -> int:
    return epochs * math.ceil(count / BATCH)


def rate_at(step: int, total: int) -> float:
    """The part of the rate that a step has, counted from 0: up in a line, then down along a cosine."""
    warm = max(1, round(WARMING * total))
    if step < warm:
        return (step + 1) / warm
    along = (step - warm + 1) / max(1, total - warm)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * along))


def fit_steps(
    slot: Slot,
    start: Point,
    groups: Sequence[Group],
    reference: Callable[[Group], Tensor],
    options: Learning,
    epochs: int,
    seed: int,
    name: str = "",
) -> Generator[tuple[int, int, float], None, FitOutcome]:
    """Train on all groups `epochs` times. Yields (steps done, of how many, loss of the last one) between passes through
    the model; nothing in the slot outlives a yield. `reference` gives a group's base log-probabilities (G, T).
    """
    method = METHODS[options.learning_method]
    rate = options.learning_rate
    if rate is None:
        raise ValueError("a learning rate must have been chosen before a log reaches the engine")
    total = steps_of(len(groups), epochs)
    faded = [fading(options, group) for group in groups]
    looked_at = groups[:: max(1, math.ceil(len(groups) / JUDGED))]
    point = Point(start.flat, torch.zeros_like(start.first), torch.zeros_like(start.second), 0)
    before = yield from sight(slot, point.flat, looked_at, reference, options, total)
    dice = random.Random(derived_seed("fit", seed))
    reading = reading_of(slot, groups)
    done, losses = 0, []
    for _ in range(epochs):
        order = dice.sample(range(len(groups)), len(groups))
        for begin in range(0, len(order), BATCH):
            chosen = order[begin : begin + BATCH]
            batch = [groups[number] for number in chosen]
            gradient, loss = torch.zeros_like(point.flat), 0.0
            for numbers in rounds(batch, slot.parameters):
                parts: list[Part] = []
                for each in numbers:
                    told = [(batch[number], reference(batch[number]), faded[chosen[number]]) for number in each]
                    share = partial(_share_of_loss, method, told, len(batch))
                    parts.append(([group for group, _, _ in told], (name, done, each.start), share))
                for made, part in reading.gradients(parts, point.flat):
                    gradient += made
                    loss += part
                yield done, total, loss
            if not bool(torch.isfinite(gradient).all()):
                raise not_finite()
            point = adamw_step(point, gradient, rate * rate_at(done, total), method.betas, method.clip)
            done += 1
            losses.append(loss)
    after = yield from sight(slot, point.flat, looked_at, reference, options, total, done)
    last = losses[-math.ceil(len(groups) / BATCH) :]
    point = continued(point, start.steps + done, method.betas)
    loss = sum(last) / len(last)
    if not all(map(math.isfinite, (loss, after.kl, before.share, after.share))):
        raise not_finite()
    return FitOutcome(point, loss, after.kl, before.share, after.share, after.agreed, len(looked_at), done)


def _share_of_loss(
    method: Method, told: Sequence[tuple[Group, Tensor, Learning]], size: int, found: Sequence[Tensor]
) -> Tensor:
    """What some groups of a batch of so many add to its mean loss: each with its base log-probabilities (G, T) and
    the options that it has, and their log-probabilities as found."""
    verdicts = [
        method.judge(logprobs, known, group.mask(known.device), group.choice, options)
        for logprobs, (group, known, options) in zip(found, told, strict=True)
    ]
    return torch.stack([verdict.loss for verdict in verdicts]).sum() / size


def continued(point: Point, steps: int, betas: tuple[float, float]) -> Point:
    """The same optimiser after so many steps in all: clicks that follow settle by these. The moments are scaled so that
    their correction for a young average comes out the same."""
    first, second = ((1 - beta**steps) / (1 - beta**point.steps) for beta in betas)
    return Point(point.flat, point.first * first, point.second * second, steps)


def sight(
    slot: Slot,
    flat: Tensor,
    groups: Sequence[Group],
    reference: Callable[[Group], Tensor],
    options: Learning,
    total: int = 0,
    done: int = 0,
) -> Generator[tuple[int, int, float], None, Sight]:
    """What weights make of some choices, without learning from them. Yields as `fit_steps` does."""
    # The share is told the same for every method: that of the choice model.
    plain = METHODS["choice"]
    shares, distances, agreed = 0.0, 0.0, 0
    for group in groups:
        known = reference(group)
        (logprobs,) = reading_of(slot, [group]).logprobs([group], flat)
        if not bool(torch.isfinite(logprobs).all()):
            raise overflowed()
        verdict = plain.judge(logprobs, known, group.mask(known.device), group.choice, options)
        shares += verdict.share
        distances += verdict.kl
        rewards = rewards_of(logprobs, known, group.mask(known.device), options)
        agreed += agrees(rewards.tolist(), group.choice, group.answers)
        yield done, total, float("nan")
    return Sight(shares / len(groups), distances / len(groups), agreed)
