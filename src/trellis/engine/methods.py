"""What a choice says of a group of answers, as a loss: the methods of learning behind one interface.

Each takes log-probabilities of the answers' tokens, the base model's, a mask, and what was said. It does not know
models, weights or optimisers. The formulas and their sources stand in docs/learning.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..messages import Choice, Ranking, Written
from ..params import Learning

BETAS = (0.9, 0.99)
CLIP: float | None = 1.0
DPO_BETA = 0.1
CLASSIC_DRIFT = 0.03


@dataclass(frozen=True)
class Verdict:
    """The loss of one group and what it says: all scalars, `loss` with its graph."""

    loss: Tensor
    share: float
    kl: float


def judge_choice(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """The loss of a choice: a multinomial logit with an outside option, a k3 leash, a pull on the winner.

    logprobs, reference: (G, T) fp32, zero off the mask (G, T). `share` is the probability that the choice
    model gives to what was chosen. Sources: Luce 1959, Plackett 1975; k3: Schulman 2020; the pull on the
    winner: arXiv 2402.13228, 2404.19733.
    """
    lengths = mask.sum(dim=-1)
    rewards = options.choice_beta * (logprobs - reference).sum(dim=-1) / lengths
    utilities = torch.cat([rewards, rewards.new_zeros(1)])  # the outside option last, at zero
    outside = len(rewards)
    good = chosen_indexes(choice, outside)
    winners = good[:1] if isinstance(choice, Ranking) else good
    chosen = utilities[winners or [outside]].logsumexp(0) - utilities.logsumexp(0)
    likelihood = chosen
    remaining = list(range(outside + 1))
    for index in good if isinstance(choice, Ranking) else ():
        if index != good[0]:
            likelihood = likelihood + utilities[index] - utilities[remaining].logsumexp(0)
        remaining.remove(index)
    distance = k3(logprobs, reference, mask)
    loss = -likelihood + options.kl_beta * distance
    if winners:
        weight = 1.0 if isinstance(choice, Written) else options.nll_weight
        loss = loss - weight * (logprobs[winners].sum(dim=-1) / lengths[winners]).mean()
    return Verdict(loss, float(chosen.detach().exp()), float(distance.detach()))


def chosen_indexes(choice: Choice, outside: int) -> list[int]:
    """The options that a choice calls good, best first; empty for none of these."""
    match choice:
        case int():
            return [choice]
        case Ranking():
            return list(choice.ranking)
        case Written():
            return [outside - 1]
        case tuple():
            return list(choice)
        case _:
            return []


def k3(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Mean over answer tokens of e^(ref−l) − (ref−l) − 1: an estimate of KL that is never negative.

    The difference is held at 20 nats, where the exponential alone would drown everything else.
    """
    gap = (reference - logprobs).clamp(max=20.0)
    return ((gap.exp() - gap - 1.0) * mask).sum() / mask.sum()


def share_of(rewards: Tensor, choice: Choice) -> float:
    """The probability that the choice model gives to what was chosen, from rewards (G,)."""
    utilities = torch.cat([rewards.detach(), rewards.new_zeros(1)])
    good = chosen_indexes(choice, len(rewards))
    winners = good[:1] if isinstance(choice, Ranking) else good
    return float((utilities[winners or [len(rewards)]].logsumexp(0) - utilities.logsumexp(0)).exp())


def pairs_of(choice: Choice, size: int) -> list[tuple[int, int]]:
    """(better, worse) options that a choice implies; none of these implies none."""
    good = chosen_indexes(choice, size)
    if isinstance(choice, Ranking):
        rest = [index for index in range(size) if index not in good]
        return [(better, worse) for place, better in enumerate(good) for worse in [*good[place + 1 :], *rest]]
    return [(better, worse) for better in good for worse in range(size) if worse not in good]


def judge_dpo(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """The chosen answer against each other one (DPO, arXiv 2305.18290, β = 0.1), and the leash.

    None of these has no pairs: every answer is then the worse one of a pair whose better one stays as it is.
    """
    gain = DPO_BETA * (logprobs - reference).sum(dim=-1)
    pairs = pairs_of(choice, len(gain))
    margins = torch.stack([gain[better] - gain[worse] for better, worse in pairs]) if pairs else -gain
    distance = k3(logprobs, reference, mask)
    loss = -torch.nn.functional.logsigmoid(margins).mean() + options.kl_beta * distance
    rewards = options.choice_beta * (logprobs - reference).sum(dim=-1) / mask.sum(dim=-1)
    return Verdict(loss, share_of(rewards, choice), float(distance.detach()))


def scores_of(choice: Choice, size: int) -> list[float]:
    """A reward for each option: 1 for what was called good, 0 for the rest; a ranking falls evenly from 1 to 0."""
    good = chosen_indexes(choice, size)
    if isinstance(choice, Ranking):
        return [1.0 - good.index(index) / len(good) if index in good else 0.0 for index in range(size)]
    return [1.0 if index in good else 0.0 for index in range(size)]


def advantages_of(choice: Choice, size: int) -> list[float]:
    """(R − mean) / std over the group (population std); −1 for all on none of these.

    One of four chosen: +1.732 for it, −0.577 for each other.
    """
    scores = scores_of(choice, size)
    mean = sum(scores) / size
    spread = (sum((score - mean) ** 2 for score in scores) / size) ** 0.5
    if not any(scores):
        return [-1.0] * size
    return [(score - mean) / spread if spread else 0.0 for score in scores]


def judge_grpo(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """Group-relative policy optimisation (arXiv 2402.03300): each token weighted by its answer's advantage, mean over
    the answer's tokens, k3 as the leash. Every inner step is on-policy, so the ratio is 1 and is never clipped."""
    advantages = torch.tensor(advantages_of(choice, len(logprobs)), device=logprobs.device)[:, None]
    gain = (logprobs - logprobs.detach()).exp() * advantages
    lengths = mask.sum(dim=-1)
    distance = k3(logprobs, reference, mask)
    loss = -((gain * mask).sum(dim=-1) / lengths).mean() + options.kl_beta * distance
    rewards = options.choice_beta * (logprobs - reference).sum(dim=-1) / lengths
    return Verdict(loss, share_of(rewards, choice), float(distance.detach()))


def judge_classic(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """The rule of the first Trellis: −mean of A·l over the group, l a plain sum over tokens, plus 0.03 times the
    square of the mean signed log-ratio to the base. Log-probabilities are not divided by the temperature."""
    advantages = torch.tensor(advantages_of(choice, len(logprobs)), device=logprobs.device)
    sums = logprobs.sum(dim=-1)
    drift = ((logprobs - reference) * mask).sum() / mask.sum()
    loss = -(advantages * sums).mean() + CLASSIC_DRIFT * drift.square()
    rewards = options.choice_beta * (logprobs - reference).sum(dim=-1) / mask.sum(dim=-1)
    return Verdict(loss, share_of(rewards, choice), float(k3(logprobs.detach(), reference, mask)))


Judge = Callable[[Tensor, Tensor, Tensor, Choice, Learning], Verdict]


@dataclass(frozen=True)
class Method:
    """A loss and how its optimiser is driven. `single`: one step a click, without replay or step limit;
    `tempered`: log-probabilities are of logits over the sampling temperature."""

    judge: Judge
    betas: tuple[float, float] = BETAS
    clip: float | None = CLIP
    single: bool = False
    tempered: bool = True


METHODS: Mapping[str, Method] = {
    "choice": Method(judge_choice),
    "dpo": Method(judge_dpo),
    "grpo": Method(judge_grpo),
    "trellis-classic": Method(judge_classic, betas=(0.9, 0.999), clip=None, single=True, tempered=False),
}
