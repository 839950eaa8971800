"""What a choice says of a group of answers, as a loss: the methods of learning behind one interface.

Each takes log-probabilities of the answers' tokens, the base model's, a mask, and what was said. It does not know
models, weights or optimisers. The formulas and their sources stand in docs/learning.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...messages import Choice, Ranking, Written
from ...params import Learning
from .targets import advantages_of, chosen_indexes, pairs_of, scores_of

BETAS = (0.9, 0.99)
CLIP: float | None = 1.0
DPO_BETA = KTO_BETA = APO_BETA = IPO_TAU = 0.1
SIMPO_BETA, SIMPO_GAMMA = 2.0, 1.0
CLASSIC_DRIFT = 0.03
OPENING = 0.7
"""By this factor a token of an answer's opening counts less than the one before it: most lies on the first five."""


@dataclass(frozen=True)
class Verdict:
    """The loss of one group and what it says: all scalars, `loss` with its graph."""

    loss: Tensor
    share: float
    kl: float


def judge_choice(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """The loss of a choice: a multinomial logit with an outside option, a k3 leash, a pull on the winner.

    logprobs, reference: (G, T) fp32, zero off the mask (G, T). `share` is the probability that the choice
    model gives to what was chosen. Rewards are means over tokens with more weight on the opening (docs/learning.md).
    Sources: Luce 1959, Plackett 1975; k3: Schulman 2020; the pull on the
    winner: arXiv 2402.13228, 2404.19733.
    """
    lengths = mask.sum(dim=-1)
    rewards = rewards_of(logprobs, reference, mask, options)
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
    loss = -likelihood + options.kl_beta * tightening(distance)
    if winners:
        weight = max(1.0, options.nll_weight) if isinstance(choice, Written) else options.nll_weight
        loss = loss - weight * (logprobs[winners].sum(dim=-1) / lengths[winners]).mean()
    return Verdict(loss, float(chosen.detach().exp()), float(distance.detach()))


def rewards_of(logprobs: Tensor, reference: Tensor, mask: Tensor, options: Learning) -> Tensor:
    """How much likelier than to the base each answer has become (G,): β times a mean of its tokens' log-ratios."""
    return options.choice_beta * ((logprobs - reference) * weights_of(mask, options.opening_weight)).sum(dim=-1)


def weights_of(mask: Tensor, opening: float) -> Tensor:
    """How much each token of an answer counts (G, T), 1 in all: `opening` of it falling from the first token on by a
    constant factor, the rest spread evenly."""
    evenly = mask / mask.sum(dim=-1, keepdim=True)
    if not opening:
        return evenly
    falling = OPENING ** torch.arange(mask.shape[-1], device=mask.device) * mask
    return (1.0 - opening) * evenly + opening * falling / falling.sum(dim=-1, keepdim=True)


def tightening(distance: Tensor) -> Tensor:
    """The leash of a choice: its pull grows with the distance, so that a voice is free and gibberish is not."""
    return distance + distance.square()


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


def judge_dpo(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """The chosen answer against each other one (DPO, arXiv 2305.18290, β = 0.1), and the leash.

    None of these has no pairs: every answer is then the worse one of a pair whose better one stays as it is.
    """
    margins = _margins(DPO_BETA * (logprobs - reference).sum(dim=-1), choice)
    return _verdict(-logsigmoid(margins).mean(), logprobs, reference, mask, choice, options)


def judge_dpo_norm(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """DPO on means over tokens instead of sums, so that long answers do not weigh more (arXiv 2411.15124, section 5);
    β is the choice sharpness."""
    means = (logprobs - reference).sum(dim=-1) / mask.sum(dim=-1)
    margins = _margins(options.choice_beta * means, choice)
    return _verdict(-logsigmoid(margins).mean(), logprobs, reference, mask, choice, options)


def judge_ipo(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """Identity preference optimisation (arXiv 2310.12036): the margin of each pair is pulled to 1/2τ, τ = 0.1, and no
    further. On means over tokens, as its authors run it."""
    margins = _margins((logprobs - reference).sum(dim=-1) / mask.sum(dim=-1), choice)
    return _verdict((margins - 1 / (2 * IPO_TAU)).square().mean(), logprobs, reference, mask, choice, options)


def judge_simpo(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """SimPO (arXiv 2405.14734): mean log-probabilities without a reference, β = 2, with a margin γ = 1 to win by.

    None of these has no pairs; each answer then has to become less likely than it was at the base.
    """
    lengths = mask.sum(dim=-1)
    if pairs_of(choice, len(lengths)):
        margins = _margins(SIMPO_BETA * logprobs.sum(dim=-1) / lengths, choice) - SIMPO_GAMMA
    else:
        margins = _margins(SIMPO_BETA * (logprobs - reference).sum(dim=-1) / lengths, choice)
    return _verdict(-logsigmoid(margins).mean(), logprobs, reference, mask, choice, options)


def judge_kto(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """Kahneman-Tversky optimisation (arXiv 2402.01306, β = 0.1): each answer by itself is good or bad, against a point
    of reference z that is 0, since one click has no batch to estimate it from. Mean over all answers."""
    gain = KTO_BETA * (logprobs - reference).sum(dim=-1)
    signs = _signs(choice, gain)
    return _verdict((1 - torch.sigmoid(signs * gain)).mean(), logprobs, reference, mask, choice, options)


def judge_apo_zero(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """Anchored preference optimisation, the “zero” form (arXiv 2408.06266, β = 0.1): chosen answers up and others down,
    each side weighing the same."""
    gain = APO_BETA * (logprobs - reference).sum(dim=-1)
    signs = _signs(choice, gain)
    parts = [(1 - torch.sigmoid(signs * gain))[signs == sign].mean() for sign in (1, -1) if bool((signs == sign).any())]
    return _verdict(torch.stack(parts).sum(), logprobs, reference, mask, choice, options)


def judge_sft(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """What was chosen becomes likelier, nothing else: supervised fine-tuning on the choice. None of these teaches
    nothing."""
    means = logprobs.sum(dim=-1) / mask.sum(dim=-1)
    good = chosen_indexes(choice, len(means))
    loss = -means[good].mean() if good else 0.0 * means.sum()
    return _verdict(loss, logprobs, reference, mask, choice, options)


def judge_grpo(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """Group-relative policy optimisation (arXiv 2402.03300): each token weighted by its answer's advantage, mean over
    the answer's tokens, k3 as the leash. Every inner step is on-policy, so the ratio is 1 and is never clipped."""
    gain = _policy_gain(logprobs, advantages_of(choice, len(logprobs)))
    loss = -((gain * mask).sum(dim=-1) / mask.sum(dim=-1)).mean()
    return _verdict(loss, logprobs, reference, mask, choice, options)


def judge_dr_grpo(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """GRPO done right (arXiv 2503.20783): advantages are not divided by their spread, and sums not by an answer's own
    length but by one length for all, here the longest answer's."""
    gain = _policy_gain(logprobs, advantages_of(choice, len(logprobs), scaled=False))
    loss = -((gain * mask).sum(dim=-1) / mask.shape[1]).mean()
    return _verdict(loss, logprobs, reference, mask, choice, options)


def judge_rloo(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740): whole answers, each against the mean reward of the
    others; the reward of an answer falls with its distance from the base, by the KL strength."""
    size = len(logprobs)
    scores = torch.tensor(scores_of(choice, size), device=logprobs.device)
    rewards = scores - options.kl_beta * (logprobs - reference).sum(dim=-1).detach()
    advantages = rewards - (rewards.sum() - rewards) / max(size - 1, 1)
    if not bool(scores.any()):
        advantages = advantages - 1.0
    loss = -(advantages * logprobs.sum(dim=-1)).mean()
    return _verdict(loss, logprobs, reference, mask, choice, options, leash=False)


def judge_classic(logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning) -> Verdict:
    """The rule of the first Trellis: −mean of A·l over the group, l a plain sum over tokens, plus 0.03 times the
    square of the mean signed log-ratio to the base. Log-probabilities are not divided by the temperature."""
    advantages = torch.tensor(advantages_of(choice, len(logprobs)), device=logprobs.device)
    drift = ((logprobs - reference) * mask).sum() / mask.sum()
    loss = -(advantages * logprobs.sum(dim=-1)).mean() + CLASSIC_DRIFT * drift.square()
    return _verdict(loss, logprobs, reference, mask, choice, options, leash=False)


def _margins(gains: Tensor, choice: Choice) -> Tensor:
    """How far the better answer of each pair is ahead (P,). Where there are no pairs, each answer is compared with its
    own past (G,): how far it has fallen on none of these, how far it has risen where all were called good."""
    pairs = pairs_of(choice, len(gains))
    if pairs:
        return torch.stack([gains[better] - gains[worse] for better, worse in pairs])
    return gains if chosen_indexes(choice, len(gains)) else -gains


def _signs(choice: Choice, gains: Tensor) -> Tensor:
    """1 for what was called good, −1 for the rest (G,)."""
    signs = torch.full_like(gains, -1.0)
    signs[chosen_indexes(choice, len(gains))] = 1.0
    return signs


def _policy_gain(logprobs: Tensor, advantages: list[float]) -> Tensor:
    """The ratio to the policy that drew, which is this one, times the advantage of the answer (G, T)."""
    return (logprobs - logprobs.detach()).exp() * torch.tensor(advantages, device=logprobs.device)[:, None]


def _verdict(
    loss: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, choice: Choice, options: Learning,
    leash: bool = True,
) -> Verdict:  # fmt: skip
    """A loss with its leash, and the share of the choice model, which is told the same for every method."""
    distance = k3(logprobs, reference, mask)
    rewards = rewards_of(logprobs, reference, mask, options)
    whole = loss + options.kl_beta * distance if leash else loss
    return Verdict(whole, share_of(rewards, choice), float(distance.detach()))


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
    "dpo-norm": Method(judge_dpo_norm),
    "ipo": Method(judge_ipo),
    "simpo": Method(judge_simpo),
    "kto": Method(judge_kto),
    "apo-zero": Method(judge_apo_zero),
    "sft": Method(judge_sft),
    "grpo": Method(judge_grpo),
    "dr-grpo": Method(judge_dr_grpo),
    "rloo": Method(judge_rloo),
    "trellis-classic": Method(judge_classic, betas=(0.9, 0.999), clip=None, single=True, tempered=False),
}
