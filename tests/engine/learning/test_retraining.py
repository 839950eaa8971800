"""Training on a whole log, on a model that is a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.learning.test_step import TableSlot
from trellis.engine.learning.log_probs import Group, answer_logprobs
from trellis.engine.learning.retraining import (
    MIN_RATE_FACTOR,
    RetrainOutcome,
    count_steps,
    rate_factor,
    rescale_moments,
    retrain,
)
from trellis.engine.learning.step import TrainingState
from trellis.engine.learning.targets import agrees_with_choice
from trellis.errors import TrellisError
from trellis.messages import Choice, Ranking, Written
from trellis.options import Learning

pytestmark = pytest.mark.engine


def fit(groups: list[Group], epochs: int = 6, rate: float = 0.1, **options: Any) -> tuple[RetrainOutcome, list[int]]:
    slot: Any = TableSlot(5)
    known = {id(group): answer_logprobs(slot.model, group) for group in groups}

    def reference(group: Group) -> Tensor:
        return known[id(group)]

    start = TrainingState(torch.zeros(25), torch.ones(25), torch.ones(25), 9)
    steps = retrain(slot, start, groups, reference, Learning(learning_rate=rate, **options), epochs, 1)
    told = []
    while True:
        try:
            told.append(next(steps)[0])
        except StopIteration as end:
            return end.value, told


def group(choice: Choice, *answers: list[int]) -> Group:
    return Group(prompt=[1], answers=[list(answer) for answer in answers], choice=choice, temperature=1.0)


LOG = [group(0, [2, 0], [3, 0]), group(1, [4, 0], [2, 0]), group("none", [3, 3], [4, 3]), group(0, [2, 2], [4, 4])] * 3


def test_a_log_that_does_not_contradict_itself_is_agreed_with_in_the_end() -> None:
    outcome, told = fit(LOG)
    assert outcome.agreed == outcome.evaluated == len(LOG)
    assert outcome.share_after > 0.5 > outcome.share_before
    assert outcome.steps == count_steps(len(LOG), 6) == 18
    assert outcome.state.steps == 9 + 18
    assert told == sorted(told)


def test_clicks_after_a_fit_go_on_as_its_optimiser_would_have() -> None:
    young = TrainingState(torch.zeros(3), torch.ones(3), torch.ones(3), 4)
    old = rescale_moments(young, 100, (0.9, 0.99))
    assert old.steps == 100
    corrected = [point.first / (1 - 0.9**point.steps) for point in (young, old)]
    assert torch.allclose(*corrected)
    assert torch.equal(rescale_moments(young, 4, (0.9, 0.99)).first, young.first)


def test_the_same_log_and_seed_make_the_same_weights() -> None:
    assert torch.equal(fit(LOG)[0].state.flat, fit(LOG)[0].state.flat)


@pytest.mark.parametrize("method", ["dpo", "kto", "sft", "trellis-classic"])
def test_every_method_can_be_fitted(method: str) -> None:
    outcome, _ = fit(LOG, learning_method=method)
    assert outcome.share_after > outcome.share_before


def test_numbers_that_overflow_are_told_of() -> None:
    slot: Any = TableSlot(5)
    bad = torch.full((2, 2), float("nan"))
    start = TrainingState(torch.zeros(25), torch.zeros(25), torch.zeros(25), 0)
    groups = [group(0, [2, 0], [3, 0])]
    with pytest.raises(TrellisError, match="overflowed"):
        list(retrain(slot, start, groups, lambda each: bad, Learning(learning_rate=0.1), 1, 1))


@given(st.integers(1, 400))
def test_the_rate_rises_in_a_line_and_falls_to_its_floor(total: int) -> None:
    rates = [rate_factor(step, total) for step in range(total)]
    top = rates.index(max(rates))
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert total < 3 or rates[-1] == pytest.approx(MIN_RATE_FACTOR)


def test_an_answer_that_says_the_same_as_the_chosen_one_is_not_held_against_it() -> None:
    answers = [[1, 2], [1, 2], [3]]
    assert agrees_with_choice([0.5, 0.5, 0.1], 0, answers)
    assert not agrees_with_choice([0.5, 0.5, 0.1], 0)
    assert not agrees_with_choice([0.5, 0.5, 0.6], 0, answers)


@pytest.mark.parametrize(
    ("rewards", "choice", "agreed"),
    [
        ([0.2, 0.1, -1.0], 0, True),
        ([0.2, 0.3, -1.0], 0, False),
        ([0.2, 0.2, 0.2], 1, False),
        ([0.2, 0.3, -1.0], (0, 1), True),
        ([0.2, 0.3, 0.4], (0, 1), False),
        ([-0.2, -0.1], "none", True),
        ([-0.2, 0.0], "none", False),
        ([0.1, 0.5, 0.3], Ranking(ranking=(1, 0)), True),
        ([0.1, 0.5, 0.3], Ranking(ranking=(0, 1)), False),
        ([0.1, 0.5, 0.6], Written(written="Mine."), True),
    ],
)
def test_agreement_is_choosing_the_same(rewards: list[float], choice: Choice, agreed: bool) -> None:
    assert agrees_with_choice(rewards, choice) is agreed
