"""The loss against values worked out by hand, the optimiser against torch's own, the step's guards."""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trellis.engine.learning.log_probs import Group, answer_logprobs, batch_answer_logprobs, split_into_passes
from trellis.engine.learning.losses import choice_loss as judge
from trellis.engine.learning.losses import k3
from trellis.engine.learning.step import TrainingState, adamw_step, learn_choice, scale_imitation, settling_factor
from trellis.errors import TrellisError
from trellis.messages import Ranking, Written
from trellis.options import Learning

pytestmark = pytest.mark.engine

PLAIN = Learning(learning_rate=0.1, kl_beta=0.0, nll_weight=0.0, choice_beta=2.0, opening_weight=0.0)
MASK = torch.tensor([[True, True], [True, False], [True, True]])
LOGPROBS = torch.tensor([[-1.0, -2.0], [-0.5, 0.0], [-3.0, -1.0]])
REFERENCE = torch.tensor([[-1.5, -2.0], [-0.25, 0.0], [-3.0, -2.0]])
# r = 2 · (sum of differences) / length: (0.5 / 2, -0.25 / 1, 1.0 / 2) · 2
REWARDS = [0.5, -0.5, 1.0]
Z = 1 + sum(math.exp(reward) for reward in REWARDS)


def loss_of(choice: Any, options: Learning = PLAIN) -> float:
    return float(judge(LOGPROBS, REFERENCE, MASK, choice, options).loss)


def test_a_chosen_option_is_a_logit_with_an_outside_option() -> None:
    assert loss_of(0) == pytest.approx(-(REWARDS[0] - math.log(Z)))


def test_none_of_these_is_the_outside_option() -> None:
    assert loss_of("none") == pytest.approx(math.log(Z))


def test_several_good_ones_share_their_probability() -> None:
    assert loss_of((0, 2)) == pytest.approx(-math.log((math.exp(0.5) + math.exp(1.0)) / Z))


def test_a_ranking_is_a_chain_of_choices_with_the_outside_option_last() -> None:
    first = math.exp(1.0) / Z
    second = math.exp(0.5) / (Z - math.exp(1.0))
    third = math.exp(-0.5) / (Z - math.exp(1.0) - math.exp(0.5))
    assert loss_of(Ranking(ranking=(2, 0, 1))) == pytest.approx(-math.log(first * second * third))


def test_a_written_answer_is_chosen_and_imitated() -> None:
    imitation = -(LOGPROBS[2].sum() / 2).item()
    assert loss_of(Written(written="x")) == pytest.approx(-math.log(math.exp(1.0) / Z) + imitation)


def test_the_pull_on_the_winner_is_its_mean_negative_log_likelihood() -> None:
    pulled = PLAIN.model_copy(update={"nll_weight": 0.5})
    assert loss_of(0, pulled) - loss_of(0) == pytest.approx(0.5 * 1.5)


def test_k3_is_the_mean_over_answer_tokens_alone() -> None:
    gaps = [-0.5, 0.0, 0.25, 0.0, -1.0]
    expected = sum(math.exp(gap) - gap - 1 for gap in gaps) / 5
    assert float(k3(LOGPROBS, REFERENCE, MASK)) == pytest.approx(expected)


def test_at_the_start_the_winner_is_pushed_by_four_fifths_and_each_other_by_a_fifth() -> None:
    rewards = torch.zeros(4, 1, requires_grad=True)
    mask = torch.ones(4, 1, dtype=torch.bool)
    options = PLAIN.model_copy(update={"choice_beta": 1.0})
    judge(rewards, torch.zeros(4, 1), mask, 1, options).loss.backward()  # type: ignore[no-untyped-call]
    assert rewards.grad is not None
    assert rewards.grad[:, 0].tolist() == pytest.approx([0.2, -0.8, 0.2, 0.2])


@given(st.lists(st.floats(-30, 0), min_size=3, max_size=3), st.lists(st.floats(-30, 0), min_size=3, max_size=3))
def test_shares_of_all_answers_and_none_sum_to_one(policy: list[float], base: list[float]) -> None:
    logprobs, reference = torch.tensor(policy)[:, None], torch.tensor(base)[:, None]
    mask = torch.ones(3, 1, dtype=torch.bool)
    choices: list[Any] = [0, 1, 2, "none"]
    shares = [judge(logprobs, reference, mask, choice, PLAIN).share for choice in choices]
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)
    assert float(k3(logprobs, reference, mask)) >= -1e-6


def test_the_optimiser_is_torchs_adamw_with_clipping() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=generator)
    ours = TrainingState(start, torch.zeros(50), torch.zeros(50), 0)
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(10):
        gradient = torch.randn(50, generator=generator)
        ours = adamw_step(ours, gradient, 1e-2)
        theirs.grad = gradient.clone()
        nn.utils.clip_grad_norm_([theirs], 1.0)
        optimizer.step()
    assert torch.allclose(ours.flat, theirs.detach(), atol=1e-6)
    assert torch.equal(start, ours.flat) is False


class Table(nn.Module):
    """A language model that is a table: logits of the next token by the last one."""

    device = torch.device("cpu")

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        class Output:
            logits = self.table[input_ids][:, -logits_to_keep:]

        return Output


class TableSlot:
    """A slot whose adapter is the whole table."""

    adapted_layers = None

    def __init__(self, size: int) -> None:
        self.lock = nullcontext()
        self.flat = torch.zeros(size * size)
        self.model = Table(self.flat.view(size, size))
        self.parameters = size * size
        self.installs = 0

    def dropout(self, *seed: Any) -> Any:
        return nullcontext()

    def install(self, flat: Tensor) -> None:
        self.installs += 1
        self.flat = flat.clone().requires_grad_()
        size = int(len(flat) ** 0.5)
        self.model.table = self.flat.view(size, size)

    def gradient(self, loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, self.flat)
        return gradient


def test_log_probabilities_are_of_each_answers_own_tokens() -> None:
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
    group = Group(prompt=[1, 2], answers=[[3, 4, 0], [4]], choice=0, temperature=2.0)
    logprobs = answer_logprobs(Table(table), group)
    expected = torch.log_softmax(table / 2.0, dim=-1)
    assert torch.allclose(logprobs[0], torch.stack([expected[2, 3], expected[3, 4], expected[4, 0]]))
    assert logprobs[1].tolist() == pytest.approx([expected[2, 4].item(), 0.0, 0.0])


def test_groups_that_share_a_pass_come_out_as_if_each_were_alone() -> None:
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
    dice = random.Random(3)
    groups = [
        Group(
            prompt=[dice.randrange(5) for _ in range(dice.randint(1, 40))],
            answers=[[dice.randrange(5) for _ in range(dice.randint(1, 90))] for _ in range(4)],
            choice=0,
            temperature=dice.choice([0.5, 1.0]),
        )
        for _ in range(5)
    ]
    together = batch_answer_logprobs(Table(table), groups)
    for group, logprobs in zip(groups, together, strict=True):
        assert torch.allclose(logprobs, answer_logprobs(Table(table), group))
        assert logprobs.shape == group.mask(logprobs.device).shape


def test_only_small_models_and_short_prompts_share_a_pass() -> None:
    each = [range(number, number + 1) for number in range(5)]
    groups = [Group(prompt=[1] * 10, answers=[[2] * 40] * 4, choice=0, temperature=1.0)] * 5
    assert split_into_passes(groups, 2_500_000) == [range(5)]
    assert split_into_passes(groups, 25_000_000) == [range(2), range(2, 4), range(4, 5)]
    assert split_into_passes(groups, 1_000_000_000) == each
    long = [Group(prompt=[1] * 8000, answers=[[2] * 40] * 4, choice=0, temperature=1.0)] * 5
    assert split_into_passes(long, 2_500_000) == each


def learn(options: Learning, group: Group, replay: tuple[Group, ...] = (), steps_before: int = 0) -> Any:
    slot: Any = TableSlot(5)
    references = [answer_logprobs(slot.model, each) for each in (group, *replay)]
    steps = learn_choice(
        slot,
        TrainingState(torch.zeros(25), torch.zeros(25), torch.zeros(25), steps_before),
        group,
        replay,
        references,
        options,
    )
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


GROUP = Group(prompt=[1], answers=[[2, 0], [3, 0], [4, 0]], choice=0, temperature=1.0)


def test_a_click_stops_when_its_share_is_reached() -> None:
    outcome = learn(PLAIN.model_copy(update={"inner_steps": 50, "target_share": 0.4}), GROUP)
    assert outcome.share_before == pytest.approx(0.25)
    assert 0.4 <= outcome.share_after < 0.6
    assert outcome.inner_steps < 50


def test_a_step_that_goes_too_far_is_halved_and_is_the_last() -> None:
    outcome = learn(Learning(learning_rate=0.1, step_limit=1e-6, inner_steps=4), GROUP)
    assert outcome.inner_steps == 1
    assert float(outcome.state.flat.abs().max()) == pytest.approx(0.05, rel=1e-2)


def test_a_refusal_takes_fewer_steps_than_a_choice() -> None:
    options = PLAIN.model_copy(update={"target_share": 0.99, "step_limit": 100.0, "inner_steps": 6, "refusal_steps": 2})
    refused = Group(GROUP.prompt, GROUP.answers, "none", 1.0)
    assert learn(options, GROUP).inner_steps == 6
    assert learn(options, refused).inner_steps == 2
    assert learn(options.model_copy(update={"inner_steps": 1}), refused).inner_steps == 1


def test_clicks_settle_and_still_count() -> None:
    options = PLAIN.model_copy(update={"inner_steps": 4, "settling": 8})
    parts = [settling_factor(steps, options) for steps in (0, 32, 96, 10**6)]
    assert parts == pytest.approx([1.0, 0.5, 0.25, 0.1])
    assert settling_factor(10**6, options.model_copy(update={"settling": 0})) == 1.0
    once = options.model_copy(update={"inner_steps": 1, "step_limit": 100.0})
    fresh, late = learn(once, GROUP).state, learn(once, GROUP, steps_before=10**6).state
    assert 0 < float(late.flat.abs().max()) < float(fresh.flat.abs().max())


def test_replay_moves_the_weights_too() -> None:
    earlier = Group(prompt=[2], answers=[[1, 0], [4, 0]], choice=1, temperature=1.0)
    alone, beside = learn(PLAIN, GROUP), learn(PLAIN, GROUP, (earlier,))
    row = slice(2 * 5, 3 * 5)  # what follows token 2, which only the earlier group asks about (and token 0 after it)
    assert float(beside.state.flat[row][4] - beside.state.flat[row][1]) > float(
        alone.state.flat[row][4] - alone.state.flat[row][1]
    )


def test_numbers_that_overflow_are_an_error_and_not_weights() -> None:
    broken = Group(prompt=[1], answers=[[2, 0], [3, 0]], choice=0, temperature=float("nan"))
    with pytest.raises(TrellisError, match="overflowed"):
        learn(PLAIN, broken)


def test_a_lesson_without_a_learning_rate_is_a_bug() -> None:
    with pytest.raises(ValueError, match="learning rate"):
        learn(Learning(), GROUP)


def test_the_pull_fades_as_options_become_alike_but_never_for_what_a_person_wrote() -> None:
    options = Learning(nll_weight=1.5)
    different = Group(prompt=[1], answers=[[2, 3, 4], [0, 0, 0]], choice=0, temperature=1.0)
    same = replace(different, answers=[[2, 3, 4]] * 2)
    close = replace(different, answers=[[2, 3, 4, 0], [2, 3, 4, 1]])
    assert scale_imitation(options, different) == options
    assert scale_imitation(options, same).nll_weight == 0.0
    assert scale_imitation(options, close).nll_weight == pytest.approx(1.5 * (1 - 3 / 5))
    assert scale_imitation(options, replace(same, choice=Written(written="x"))) == options
