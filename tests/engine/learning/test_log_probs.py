"""Log-probabilities and gradients through the lean pass against transformers' own with PEFT's layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.text.test_fast_forward import make, values
from trellis.engine.learning import log_probs as way
from trellis.engine.learning.log_probs import (
    FastScorer,
    GenericScorer,
    Group,
    PackedGroups,
    Scorer,
    schedule_passes,
    scorer_for,
)
from trellis.engine.parallel import CorePool
from trellis.engine.text.adapters import AdapterSlot, AdapterSlots
from trellis.engine.text.fast_forward import SUPPORTED_FAMILIES, FastForward
from trellis.options import Adapter

pytestmark = pytest.mark.engine

GROUPS = [
    Group([5, 17, 33, 8], [[60, 41, 7], [9], [12, 13, 14, 15, 16, 1]], 0, 0.7),
    Group([50], [[3, 1], [4, 1]], 1, 1.0),
    Group([7, 7, 8, 9, 20, 21, 22, 23, 24], [[60] * 11, [61, 1], [62, 63, 64, 1]], "none", 1.3),
]


def slot_of(folder: Path, kind: str, **adapter: object) -> AdapterSlot:
    model = make(folder, kind)
    if kind == "mistral":
        model.config.sliding_window = None
    return AdapterSlots(model, FastForward.from_model(model)).get(Adapter(**({"lora_rank": 4} | adapter)))


def gradient(reading: Scorer, flat: Tensor) -> tuple[list[Tensor], Tensor]:
    seen: list[torch.Tensor] = []

    def loss(found: list[torch.Tensor]) -> torch.Tensor:
        seen.extend(each.detach() for each in found)
        weights = [torch.linspace(-1, 2, each.numel()).view(each.shape) for each in found]
        return torch.stack([(each * weight).sum() for each, weight in zip(found, weights, strict=True)]).sum()

    made, value = reading.gradient(GROUPS, flat, (), loss)
    assert value == float(loss(reading.logprobs(GROUPS, flat)))
    return seen[: len(GROUPS)], made


@pytest.mark.parametrize("kind", sorted(SUPPORTED_FAMILIES))
@pytest.mark.parametrize("modules", ["all-linear", "q_proj, v_proj, down_proj"])
def test_the_same_numbers_and_the_same_gradient(tmp_path: Path, kind: str, modules: str) -> None:
    slot = slot_of(tmp_path, kind, target_modules=modules)
    for seed in (1, 2):
        flat = values(slot, seed)
        theirs, their_gradient = gradient(GenericScorer(slot), flat)
        mine, my_gradient = gradient(FastScorer(slot), flat)
        for one, other in zip(mine, theirs, strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, atol=1e-4)
        assert float((my_gradient - their_gradient).norm() / their_gradient.norm()) < 1e-4
    assert not flat.requires_grad


def test_the_base_model_is_the_one_without_the_adapter(tmp_path: Path) -> None:
    slot = slot_of(tmp_path, "llama")
    both = (reading(slot).logprobs(GROUPS, None) for reading in (FastScorer, GenericScorer))
    for mine, theirs in zip(*both, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_a_prompt_is_read_once_and_each_answer_sees_it_and_itself() -> None:
    line = PackedGroups(GROUPS[:1], torch.device("cpu"))
    assert line.ids.tolist() == [5, 17, 33, 8, 60, 41, 12, 13, 14, 15, 16]
    assert line.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert line.predicting.tolist() == [3, 4, 5, 3, 3, 6, 7, 8, 9, 10]
    assert line.targets.tolist() == [60, 41, 7, 9, 12, 13, 14, 15, 16, 1]
    ((_, mask),) = line.spans
    assert mask[5].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert mask[7].nonzero().flatten().tolist() == [0, 1, 2, 3, 6, 7]
    assert mask[2].nonzero().flatten().tolist() == [0, 1, 2]


def test_what_the_pass_does_not_know_goes_through_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(scorer_for(slot_of(tmp_path / "a", "llama"), GROUPS), FastScorer)
    assert isinstance(scorer_for(slot_of(tmp_path / "b", "gpt2"), GROUPS), GenericScorer)
    assert isinstance(scorer_for(slot_of(tmp_path / "c", "llama", lora_dropout=0.1), GROUPS), GenericScorer)
    model = make(tmp_path / "d", "mistral")  # with a window of 16
    slot = AdapterSlots(model, FastForward.from_model(model)).get(Adapter(lora_rank=4))
    assert isinstance(scorer_for(slot, GROUPS[:2]), FastScorer)
    assert isinstance(scorer_for(slot, GROUPS), GenericScorer)
    monkeypatch.setattr(way, "MAX_PACKED_TOKENS", 20)
    assert isinstance(scorer_for(slot, GROUPS), GenericScorer)


def groups_of(*lengths: int) -> list[Group]:
    return [Group(prompt=[1] * 4, answers=[[2] * length], choice=0, temperature=1.0) for length in lengths]


def test_a_small_model_makes_two_passes_of_like_length_at_once_and_a_large_one_none() -> None:
    assert schedule_passes(groups_of(10, 10, 10, 10), 2_000_000) == [[range(2), range(2, 4)]]
    assert schedule_passes(groups_of(90, 10, 10, 10), 2_000_000) == [[range(1), range(1, 4)]]
    assert schedule_passes(groups_of(10), 2_000_000) == [[range(1)]]
    assert schedule_passes(groups_of(10, 10), 50_000_000) == [[range(2)]]
    assert schedule_passes(groups_of(10, 10), 2_000_000_000) == [[range(1)], [range(1, 2)]]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in an engine of a small model: each of its threads multiplies alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("reading", [GenericScorer, FastScorer])
@pytest.mark.parametrize("hands", [1, 2])
def test_parts_made_at_once_have_the_gradients_that_they_have_alone(
    tmp_path: Path, reading: type[Scorer], hands: int
) -> None:
    model = make(tmp_path, "llama")
    slot = AdapterSlots(model, FastForward.from_model(model), CorePool(hands)).get(Adapter(lora_rank=4))
    flat, way = values(slot, 1), reading(slot)  # type: ignore[call-arg]

    def loss(found: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([each.sum() for each in found]).sum()

    parts = [(GROUPS[:1], (), loss), (GROUPS[1:], (), loss)]
    for _ in range(5):
        for (made, value), (groups, seed, _) in zip(way.gradients(parts, flat), parts, strict=True):
            alone, alone_value = way.gradient(groups, flat, seed, loss)
            assert torch.equal(made, alone)
            assert value == alone_value
