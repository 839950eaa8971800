"""The other methods of learning, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trellis.engine.methods import METHODS, advantages_of, pairs_of, scores_of
from trellis.messages import Choice, Ranking
from trellis.params import Learning

pytestmark = pytest.mark.engine

MASK = torch.tensor([[True, True], [True, False], [True, True]])
LOGPROBS = torch.tensor([[-1.0, -2.0], [-0.5, 0.0], [-3.0, -1.0]])
REFERENCE = torch.tensor([[-1.5, -2.0], [-0.25, 0.0], [-3.0, -2.0]])
# sums of differences: 0.5, -0.25, 1.0; of log-probabilities: -3, -0.5, -4
FREE = Learning(learning_rate=0.1, kl_beta=0.0)


def loss_of(method: str, choice: Choice) -> float:
    return float(METHODS[method].judge(LOGPROBS, REFERENCE, MASK, choice, FREE).loss)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_dpo_sets_the_chosen_answer_against_each_other_one() -> None:
    expected = (softplus(-0.1 * (0.5 + 0.25)) + softplus(-0.1 * (0.5 - 1.0))) / 2
    assert loss_of("dpo", 0) == pytest.approx(expected)


def test_dpo_takes_none_of_these_as_three_losers() -> None:
    expected = (softplus(0.05) + softplus(-0.025) + softplus(0.1)) / 3
    assert loss_of("dpo", "none") == pytest.approx(expected)


def test_one_of_four_has_the_advantages_of_the_paper() -> None:
    assert advantages_of(2, 4) == pytest.approx([-0.577, -0.577, 1.732, -0.577], abs=1e-3)
    assert advantages_of("none", 4) == [-1.0] * 4
    assert advantages_of((0, 1), 2) == [0.0, 0.0]


def test_a_ranking_falls_evenly() -> None:
    assert scores_of(Ranking(ranking=(2, 0)), 3) == [0.5, 0.0, 1.0]
    assert pairs_of(Ranking(ranking=(2, 0)), 3) == [(2, 0), (2, 1), (0, 1)]


def test_grpo_weights_each_answer_by_its_advantage() -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    METHODS["grpo"].judge(logprobs, REFERENCE, MASK, 0, FREE).loss.backward()
    assert logprobs.grad is not None
    high, low = math.sqrt(2), -1 / math.sqrt(2)
    expected = [[-high / 6, -high / 6], [-low / 3, 0.0], [-low / 6, -low / 6]]
    assert torch.allclose(logprobs.grad, torch.tensor(expected), atol=1e-6)


def test_the_classic_rule_is_a_plain_sum_with_a_drift_term() -> None:
    high, low = math.sqrt(2), -1 / math.sqrt(2)
    drift = (0.5 - 0.25 + 1.0) / 5
    expected = -(high * -3 + low * -0.5 + low * -4) / 3 + 0.03 * drift**2
    assert loss_of("trellis-classic", 0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_tells_the_same_share_of_the_same_answers(method: str) -> None:
    choices: list[Choice] = [0, (0, 2), Ranking(ranking=(1, 0, 2)), "none"]
    for choice in choices:
        share = METHODS[method].judge(LOGPROBS, REFERENCE, MASK, choice, FREE).share
        assert share == pytest.approx(METHODS["choice"].judge(LOGPROBS, REFERENCE, MASK, choice, FREE).share)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_pushes_the_chosen_answer_up(method: str) -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    METHODS[method].judge(logprobs, REFERENCE, MASK, 2, FREE).loss.backward()
    assert logprobs.grad is not None
    assert float(logprobs.grad[2].sum()) < 0
