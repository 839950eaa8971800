"""The other methods of learning, against values worked out by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trellis.engine.learning.losses import METHODS, OPENING_DECAY, answer_rewards, token_weights
from trellis.engine.learning.targets import choice_advantages, choice_scores, preference_pairs
from trellis.messages import Choice, Ranking
from trellis.options import Learning, MethodName

pytestmark = pytest.mark.engine

MASK = torch.tensor([[True, True], [True, False], [True, True]])
LOGPROBS = torch.tensor([[-1.0, -2.0], [-0.5, 0.0], [-3.0, -1.0]])
REFERENCE = torch.tensor([[-1.5, -2.0], [-0.25, 0.0], [-3.0, -2.0]])
# sums of differences: 0.5, -0.25, 1.0; of log-probabilities: -3, -0.5, -4
FREE = Learning(learning_rate=0.1, kl_beta=0.0, choice_beta=2.0, opening_weight=0.0)


def loss_of(method: str, choice: Choice) -> float:
    return float(METHODS[method].loss(LOGPROBS, REFERENCE, MASK, choice, FREE).loss)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_dpo_sets_the_chosen_answer_against_each_other_one() -> None:
    expected = (softplus(-0.1 * (0.5 + 0.25)) + softplus(-0.1 * (0.5 - 1.0))) / 2
    assert loss_of("dpo", 0) == pytest.approx(expected)


def test_dpo_takes_none_of_these_as_three_losers() -> None:
    expected = (softplus(0.05) + softplus(-0.025) + softplus(0.1)) / 3
    assert loss_of("dpo", "none") == pytest.approx(expected)


def test_half_of_what_counts_lies_on_the_opening() -> None:
    weights = token_weights(MASK, 0.5)
    first, second = 1 / (1 + OPENING_DECAY), OPENING_DECAY / (1 + OPENING_DECAY)
    assert weights[0].tolist() == pytest.approx([(0.5 + first) / 2, (0.5 + second) / 2])
    assert weights[1].tolist() == [1.0, 0.0]
    assert torch.allclose(token_weights(MASK, 0.0), MASK / MASK.sum(-1, keepdim=True))
    half = Learning(learning_rate=0.1, choice_beta=2.0, opening_weight=0.5)
    expected = [2 * 0.5 * weights[0, 0].item(), 2 * -0.25, 2 * weights[2, 1].item()]
    assert answer_rewards(LOGPROBS, REFERENCE, MASK, half).tolist() == pytest.approx(expected)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0, 1))
def test_what_counts_is_one_in_all_and_never_rises(lengths: list[int], opening: float) -> None:
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    weights = token_weights(mask, opening)
    assert torch.allclose(weights.sum(-1), torch.ones(len(lengths)), atol=1e-5)
    assert not weights[~mask].any()
    assert bool((weights[:, 1:] <= weights[:, :-1] + 1e-6).all())


def test_the_leash_tightens_with_the_distance() -> None:
    leashed = Learning(learning_rate=0.1, choice_beta=2.0, kl_beta=0.5, nll_weight=0.0, opening_weight=0.0)
    free = leashed.model_copy(update={"kl_beta": 0.0})
    judge = METHODS["choice"].loss
    distance = judge(LOGPROBS, REFERENCE, MASK, 0, leashed).kl
    loss, without = (float(judge(LOGPROBS, REFERENCE, MASK, 0, each).loss) for each in (leashed, free))
    assert loss - without == pytest.approx(0.5 * (distance + distance**2), rel=1e-5)


def test_one_of_four_has_the_advantages_of_the_paper() -> None:
    assert choice_advantages(2, 4) == pytest.approx([-0.577, -0.577, 1.732, -0.577], abs=1e-3)
    assert choice_advantages("none", 4) == [-1.0] * 4
    assert choice_advantages((0, 1), 2) == [0.0, 0.0]


def test_a_ranking_falls_evenly() -> None:
    assert choice_scores(Ranking(ranking=(2, 0)), 3) == [0.5, 0.0, 1.0]
    assert preference_pairs(Ranking(ranking=(2, 0)), 3) == [(2, 0), (2, 1), (0, 1)]


def test_grpo_weights_each_answer_by_its_advantage() -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    METHODS["grpo"].loss(logprobs, REFERENCE, MASK, 0, FREE).loss.backward()
    assert logprobs.grad is not None
    high, low = math.sqrt(2), -1 / math.sqrt(2)
    expected = [[-high / 6, -high / 6], [-low / 3, 0.0], [-low / 6, -low / 6]]
    assert torch.allclose(logprobs.grad, torch.tensor(expected), atol=1e-6)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# means of differences over tokens: 0.25, -0.25, 0.5; of log-probabilities: -1.5, -0.5, -2


def test_dpo_over_means_does_not_weigh_long_answers_more() -> None:
    expected = (softplus(-2 * (0.25 + 0.25)) + softplus(-2 * (0.25 - 0.5))) / 2
    assert loss_of("dpo-norm", 0) == pytest.approx(expected)


def test_ipo_pulls_each_margin_to_half_of_one_over_tau() -> None:
    assert loss_of("ipo", 0) == pytest.approx(((0.5 - 5) ** 2 + (-0.25 - 5) ** 2) / 2)
    assert loss_of("ipo", "none") == pytest.approx(((-0.25 - 5) ** 2 + (0.25 - 5) ** 2 + (-0.5 - 5) ** 2) / 3)


def test_simpo_needs_no_reference_but_for_none_of_these() -> None:
    expected = (softplus(-(2 * (-1.5 + 0.5) - 1)) + softplus(-(2 * (-1.5 + 2) - 1))) / 2
    assert loss_of("simpo", 0) == pytest.approx(expected)
    assert loss_of("simpo", "none") == pytest.approx((softplus(0.5) + softplus(-0.5) + softplus(1.0)) / 3)


def test_kto_calls_each_answer_good_or_bad_by_itself() -> None:
    expected = ((1 - sigmoid(0.05)) + (1 - sigmoid(0.025)) + (1 - sigmoid(-0.1))) / 3
    assert loss_of("kto", 0) == pytest.approx(expected)


def test_apo_zero_weighs_both_sides_the_same() -> None:
    expected = (1 - sigmoid(0.05)) + ((1 - sigmoid(0.025)) + (1 - sigmoid(-0.1))) / 2
    assert loss_of("apo-zero", 0) == pytest.approx(expected)
    assert loss_of("apo-zero", "none") == pytest.approx((sigmoid(0.05) + sigmoid(-0.025) + sigmoid(0.1)) / 3)


def test_sft_imitates_what_was_chosen_and_nothing_else() -> None:
    assert loss_of("sft", (0, 1)) == pytest.approx((1.5 + 0.5) / 2)
    assert loss_of("sft", "none") == 0.0


def test_dr_grpo_divides_by_neither_spread_nor_length() -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    METHODS["dr-grpo"].loss(logprobs, REFERENCE, MASK, 0, FREE).loss.backward()
    assert logprobs.grad is not None
    high, low = (1 - 1 / 3) / 6, (0 - 1 / 3) / 6
    assert torch.allclose(logprobs.grad, torch.tensor([[-high, -high], [-low, 0.0], [-low, -low]]), atol=1e-6)


def test_rloo_sets_each_answer_against_the_mean_of_the_others() -> None:
    expected = -(1.0 * -3 + (0 - 0.5) * -0.5 + (0 - 0.5) * -4) / 3
    assert loss_of("rloo", 0) == pytest.approx(expected)
    leashed = Learning(learning_rate=0.1, kl_beta=0.1)
    rewards = [1 - 0.05, 0.025, -0.1]
    advantages = [reward - (sum(rewards) - reward) / 2 for reward in rewards]
    expected = -sum(a * total for a, total in zip(advantages, (-3, -0.5, -4), strict=True)) / 3
    assert float(METHODS["rloo"].loss(LOGPROBS, REFERENCE, MASK, 0, leashed).loss) == pytest.approx(expected)


def test_every_method_that_can_be_asked_for_is_there() -> None:
    assert list(get_args(MethodName)) == list(METHODS)


def test_the_classic_rule_is_a_plain_sum_with_a_drift_term() -> None:
    high, low = math.sqrt(2), -1 / math.sqrt(2)
    drift = (0.5 - 0.25 + 1.0) / 5
    expected = -(high * -3 + low * -0.5 + low * -4) / 3 + 0.03 * drift**2
    assert loss_of("trellis-classic", 0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_tells_the_same_share_of_the_same_answers(method: str) -> None:
    choices: list[Choice] = [0, (0, 2), Ranking(ranking=(1, 0, 2)), "none"]
    for choice in choices:
        share = METHODS[method].loss(LOGPROBS, REFERENCE, MASK, choice, FREE).share
        assert share == pytest.approx(METHODS["choice"].loss(LOGPROBS, REFERENCE, MASK, choice, FREE).share)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_pushes_the_chosen_answer_up(method: str) -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    METHODS[method].loss(logprobs, REFERENCE, MASK, 2, FREE).loss.backward()
    assert logprobs.grad is not None
    assert float(logprobs.grad[2].sum()) < 0


SAME = torch.tensor([[-1.0, -2.0], [-0.5, 0.0], [-1.0, -2.0]])
SAME_REFERENCE = torch.tensor([[-1.5, -2.0], [-0.25, 0.0], [-1.5, -2.0]])


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("choice", [(0, 2), Ranking(ranking=(0, 2)), Ranking(ranking=(0, 2, 1))])
def test_no_method_avoids_an_answer_that_is_equal_to_the_chosen_one(method: str, choice: Choice) -> None:
    logprobs = SAME.clone().requires_grad_()
    METHODS[method].loss(logprobs, SAME_REFERENCE, MASK, choice, FREE).loss.backward()
    assert logprobs.grad is not None
    assert float(logprobs.grad[0].sum() + logprobs.grad[2].sum()) < 0  # they are one text: it becomes likelier


@pytest.mark.parametrize("method", ["dpo", "dpo-norm", "ipo", "simpo"])
@pytest.mark.parametrize("choice", [(0, 1, 2), (0, 2, 1)])
def test_where_all_are_good_no_method_of_pairs_makes_them_less_likely(method: str, choice: Choice) -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    METHODS[method].loss(logprobs, REFERENCE, MASK, choice, FREE).loss.backward()
    assert logprobs.grad is not None
    assert bool((logprobs.grad.sum(dim=-1) < 0).all())
