"""Losses of a choice over a group of answers: all learning methods behind one signature.

Each takes log-probabilities of the answers' tokens, the base model's, a mask, and the choice. It does not know models,
weights or optimizers. docs/learning.md has the formulas and their sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...messages import Choice, Ranking, Written
from ...options import Learning
from .targets import choice_advantages, choice_scores, chosen_indices, preference_pairs

BETAS = (0.9, 0.99)
CLIP: float | None = 1.0
DPO_BETA = KTO_BETA = APO_BETA = IPO_TAU = 0.1
SIMPO_BETA, SIMPO_GAMMA = 2.0, 1.0
CLASSIC_DRIFT_WEIGHT = 0.03
OPENING_DECAY = 0.7
"""Factor by which the weight of an opening token falls from one to the next: most of it lies on the first five."""


@dataclass(frozen=True)
class ChoiceLoss:
    """The loss of one group, with its graph, and two measurements."""

    loss: Tensor
    share: float
    kl: float


def choice_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> ChoiceLoss:
    """The default loss: a multinomial logit with an outside option, a k3 penalty, and a likelihood term for the winner.

    logprobs, reference: (G, T) fp32, zero off the mask (G, T). `share` is the probability of the choice under the
    choice model. Rewards are means over tokens with more weight on the opening (docs/learning.md). Sources: Luce 1959,
    Plackett 1975; k3: Schulman 2020; the likelihood term: arXiv 2402.13228, 2404.19733.
    """
    lengths = mask.sum(dim=-1)
    rewards = answer_rewards(logprobs, reference, mask, options)
    utilities = torch.cat([rewards, rewards.new_zeros(1)])  # the outside option is last, with utility 0
    outside = len(rewards)
    chosen = chosen_indices(choice, outside)
    winners = chosen[:1] if isinstance(choice, Ranking) else chosen
    log_share = utilities[winners or [outside]].logsumexp(0) - utilities.logsumexp(0)
    likelihood = log_share
    remaining = list(range(outside + 1))
    for index in chosen if isinstance(choice, Ranking) else ():
        if index != chosen[0]:
            likelihood = likelihood + utilities[index] - utilities[remaining].logsumexp(0)
        remaining.remove(index)
    kl = k3(logprobs, reference, mask)
    loss = -likelihood + options.kl_beta * kl_penalty(kl)
    if winners:
        weight = max(1.0, options.nll_weight) if isinstance(choice, Written) else options.nll_weight
        loss = loss - weight * (logprobs[winners].sum(dim=-1) / lengths[winners]).mean()
    return ChoiceLoss(loss, float(log_share.detach().exp()), float(kl.detach()))


def answer_rewards(logprobs: Tensor, reference: Tensor, mask: Tensor, options: Learning) -> Tensor:
    """Return rewards (G,): β times the weighted mean of each answer's token log-ratios to the base model."""
    return options.choice_beta * ((logprobs - reference) * token_weights(mask, options.opening_weight)).sum(dim=-1)


def token_weights(mask: Tensor, opening_weight: float) -> Tensor:
    """Return token weights (G, T) that sum to 1 per answer: `opening_weight` of it decays from the first token on, the
    rest is uniform."""
    uniform = mask / mask.sum(dim=-1, keepdim=True)
    if not opening_weight:
        return uniform
    decaying = OPENING_DECAY ** torch.arange(mask.shape[-1], device=mask.device) * mask
    return (1.0 - opening_weight) * uniform + opening_weight * decaying / decaying.sum(dim=-1, keepdim=True)


def kl_penalty(kl: Tensor) -> Tensor:
    """The KL penalty of a choice. It grows quadratically, so that a new voice is cheap and gibberish is not."""
    return kl + kl.square()


def k3(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Mean over answer tokens of e^(ref−l) − (ref−l) − 1: a KL estimate that is never negative.

    The difference is clamped at 20 nats, where the exponential alone would dominate everything else.
    """
    gap = (reference - logprobs).clamp(max=20.0)
    return ((gap.exp() - gap - 1.0) * mask).sum() / mask.sum()


def choice_share(rewards: Tensor, choice: Choice) -> float:
    """Return the probability of the choice under the choice model, from rewards (G,)."""
    utilities = torch.cat([rewards.detach(), rewards.new_zeros(1)])
    chosen = chosen_indices(choice, len(rewards))
    winners = chosen[:1] if isinstance(choice, Ranking) else chosen
    return float((utilities[winners or [len(rewards)]].logsumexp(0) - utilities.logsumexp(0)).exp())


def dpo_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> ChoiceLoss:
    """DPO (arXiv 2305.18290, β = 0.1): the chosen answer against each other one, with the KL penalty.

    “None of these” has no pairs: every answer is then the rejected one of a pair whose chosen one does not change.
    """
    margins = _pair_margins(DPO_BETA * (logprobs - reference).sum(dim=-1), choice)
    return _with_kl_penalty(-logsigmoid(margins).mean(), logprobs, reference, mask, choice, options)


def dpo_norm_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> ChoiceLoss:
    """DPO on token means instead of sums, so that long answers do not weigh more (arXiv 2411.15124, section 5); β is
    the choice sharpness."""
    means = (logprobs - reference).sum(dim=-1) / mask.sum(dim=-1)
    margins = _pair_margins(options.choice_beta * means, choice)
    return _with_kl_penalty(-logsigmoid(margins).mean(), logprobs, reference, mask, choice, options)


def ipo_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> ChoiceLoss:
    """Identity preference optimization (arXiv 2310.12036): the margin of each pair is pulled to 1/2τ, τ = 0.1, and no
    further. On token means, as its authors run it."""
    margins = _pair_margins((logprobs - reference).sum(dim=-1) / mask.sum(dim=-1), choice)
    return _with_kl_penalty((margins - 1 / (2 * IPO_TAU)).square().mean(), logprobs, reference, mask, choice, options)


def simpo_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> ChoiceLoss:
    """SimPO (arXiv 2405.14734): mean log-probabilities without a reference, β = 2, margin γ = 1.

    “None of these” has no pairs: each answer has to become less likely than under the base model.
    """
    lengths = mask.sum(dim=-1)
    if preference_pairs(choice, len(lengths)):
        margins = _pair_margins(SIMPO_BETA * logprobs.sum(dim=-1) / lengths, choice) - SIMPO_GAMMA
    else:
        margins = _pair_margins(SIMPO_BETA * (logprobs - reference).sum(dim=-1) / lengths, choice)
    return _with_kl_penalty(-logsigmoid(margins).mean(), logprobs, reference, mask, choice, options)


def kto_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> ChoiceLoss:
    """Kahneman-Tversky optimization (arXiv 2402.01306, β = 0.1): each answer by itself is good or bad. The reference
    point z is 0, since one click has no batch to estimate it from. Mean over all answers."""
    log_ratio_reward = KTO_BETA * (logprobs - reference).sum(dim=-1)
    signs = _choice_signs(choice, log_ratio_reward)
    return _with_kl_penalty(
        (1 - torch.sigmoid(signs * log_ratio_reward)).mean(), logprobs, reference, mask, choice, options
    )


def apo_zero_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> ChoiceLoss:
    """Anchored preference optimization, the “zero” variant (arXiv 2408.06266, β = 0.1): chosen answers up and others
    down, each side with the same weight."""
    log_ratio_reward = APO_BETA * (logprobs - reference).sum(dim=-1)
    signs = _choice_signs(choice, log_ratio_reward)
    parts = [
        (1 - torch.sigmoid(signs * log_ratio_reward))[signs == sign].mean()
        for sign in (1, -1)
        if bool((signs == sign).any())
    ]
    return _with_kl_penalty(torch.stack(parts).sum(), logprobs, reference, mask, choice, options)


def sft_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> ChoiceLoss:
    """Supervised fine-tuning on the chosen answers. “None of these” teaches nothing."""
    means = logprobs.sum(dim=-1) / mask.sum(dim=-1)
    chosen = chosen_indices(choice, len(means))
    loss = -means[chosen].mean() if chosen else 0.0 * means.sum()
    return _with_kl_penalty(loss, logprobs, reference, mask, choice, options)


def grpo_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> ChoiceLoss:
    """Group-relative policy optimization (arXiv 2402.03300): each token weighted by its answer's advantage, mean over
    the answer's tokens, with the k3 penalty. Every inner step is on-policy, so the ratio is 1 and never clipped."""
    gain = _policy_gain(logprobs, choice_advantages(choice, len(logprobs)))
    loss = -((gain * mask).sum(dim=-1) / mask.sum(dim=-1)).mean()
    return _with_kl_penalty(loss, logprobs, reference, mask, choice, options)


def dr_grpo_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> ChoiceLoss:
    """GRPO done right (arXiv 2503.20783): advantages are not divided by their standard deviation, and sums are divided
    by one length for all answers, here the longest."""
    gain = _policy_gain(logprobs, choice_advantages(choice, len(logprobs), scaled=False))
    loss = -((gain * mask).sum(dim=-1) / mask.shape[1]).mean()
    return _with_kl_penalty(loss, logprobs, reference, mask, choice, options)


def rloo_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> ChoiceLoss:
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740): whole answers, each against the mean reward of the
    others. The KL strength times the log-ratio to the base model is subtracted from the reward."""
    size = len(logprobs)
    scores = torch.tensor(choice_scores(choice, size), device=logprobs.device)
    rewards = scores - options.kl_beta * (logprobs - reference).sum(dim=-1).detach()
    advantages = rewards - (rewards.sum() - rewards) / max(size - 1, 1)
    if not bool(scores.any()):
        advantages = advantages - 1.0
    loss = -(advantages * logprobs.sum(dim=-1)).mean()
    return _with_kl_penalty(loss, logprobs, reference, mask, choice, options, penalize=False)


def classic_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> ChoiceLoss:
    """The rule of the first Trellis: −mean of A·l over the group, with l summed over tokens, plus 0.03 times the square
    of the mean signed log-ratio to the base model. Log-probabilities are not divided by the temperature."""
    advantages = torch.tensor(choice_advantages(choice, len(logprobs)), device=logprobs.device)
    drift = ((logprobs - reference) * mask).sum() / mask.sum()
    loss = -(advantages * logprobs.sum(dim=-1)).mean() + CLASSIC_DRIFT_WEIGHT * drift.square()
    return _with_kl_penalty(loss, logprobs, reference, mask, choice, options, penalize=False)


def _pair_margins(gains: Tensor, choice: Choice) -> Tensor:
    """Return by how much the better answer of each pair is ahead (P,). Without pairs, compare each answer with its own
    past (G,): how far it fell for “none of these”, how far it rose if all were chosen."""
    pairs = preference_pairs(choice, len(gains))
    if pairs:
        return torch.stack([gains[better] - gains[worse] for better, worse in pairs])
    return gains if chosen_indices(choice, len(gains)) else -gains


def _choice_signs(choice: Choice, gains: Tensor) -> Tensor:
    """Return 1 for chosen answers, −1 for the rest (G,)."""
    signs = torch.full_like(gains, -1.0)
    signs[chosen_indices(choice, len(gains))] = 1.0
    return signs


def _policy_gain(logprobs: Tensor, advantages: list[float]) -> Tensor:
    """Return the ratio to the sampling policy, which is this one, times the answer's advantage (G, T)."""
    return (logprobs - logprobs.detach()).exp() * torch.tensor(advantages, device=logprobs.device)[:, None]


def _with_kl_penalty(
    loss: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning,
    penalize: bool = True,
) -> ChoiceLoss:  # fmt: skip
    """Add the KL penalty, and measure the choice model's share, which is reported for every method."""
    kl = k3(logprobs, reference, mask)
    rewards = answer_rewards(logprobs, reference, mask, options)
    total = loss + options.kl_beta * kl if penalize else loss
    return ChoiceLoss(total, choice_share(rewards, choice), float(kl.detach()))


LossFunction = Callable[[Tensor, Tensor, Tensor, Choice, Learning], ChoiceLoss]


@dataclass(frozen=True)
class Method:
    """A loss and how the optimizer is run with it. `is_single_step`: one step per click, without replay or step limit;
    `uses_temperature`: log-probabilities are of logits over the sampling temperature."""

    loss: LossFunction
    betas: tuple[float, float] = BETAS
    clip: float | None = CLIP
    is_single_step: bool = False
    uses_temperature: bool = True


# A new method also needs its name in `MethodName` and a word in the help of `learning_method` (options/steering.py).
METHODS: Mapping[str, Method] = {
    "choice": Method(choice_loss),
    "dpo": Method(dpo_loss),
    "dpo-norm": Method(dpo_norm_loss),
    "ipo": Method(ipo_loss),
    "simpo": Method(simpo_loss),
    "kto": Method(kto_loss),
    "apo-zero": Method(apo_zero_loss),
    "sft": Method(sft_loss),
    "grpo": Method(grpo_loss),
    "dr-grpo": Method(dr_grpo_loss),
    "rloo": Method(rloo_loss),
    "trellis-classic": Method(classic_loss, betas=(0.9, 0.999), clip=None, is_single_step=True, uses_temperature=False),
}
