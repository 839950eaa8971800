"""Weights as values: PEFT reads our folders, PEFT's forward is ours, drift is the norm it claims to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from trellis.blobs import Blobs
from trellis.engine.adapters import Shelf, Slot, Slots, Weights
from trellis.params import Adapter

pytestmark = pytest.mark.engine
SETTINGS = Adapter(lora_rank=4, lora_alpha=8)


@pytest.fixture
def base(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(Blobs(tmp_path / "weights"), keep_bytes=1)


def random_weights(slot: Slot, name: str) -> Weights:
    flat = torch.randn(slot.flat.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    return Weights(name, slot.settings, flat, flat * 2, flat.square(), 3)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(10)[None]).logits
    return result


def test_planted_weights_change_nothing(base: Any, shelf: Shelf) -> None:
    before = logits(base).clone()
    slot = Slots(base).get(SETTINGS)
    slot.install(shelf.plant(slot, "w1", seed=3).flat)
    assert torch.equal(logits(slot.model), before)
    assert slot.drift(slot.flat) == 0.0


def test_peft_loads_our_folder_and_computes_the_same(base: Any, shelf: Shelf, tiny_llama: Path) -> None:
    slot = Slots(base).get(SETTINGS)
    weights = random_weights(slot, "w1")
    shelf.add(slot, weights, None, keep=True)
    slot.install(weights.flat)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama)
    theirs = PeftModel.from_pretrained(fresh, shelf.blobs.path("w1")).eval()
    assert torch.allclose(logits(theirs), logits(slot.model), atol=1e-6)
    assert set(slot.split(weights.flat)) == set(get_peft_model_state_dict(theirs))


def test_weights_come_back_from_disk_bit_for_bit(base: Any, shelf: Shelf) -> None:
    slot = Slots(base).get(SETTINGS)
    saved = random_weights(slot, "w1")
    shelf.add(slot, saved, None, keep=True)
    read = Shelf(shelf.blobs).get(slot, "w1")
    for name in ("flat", "first", "second"):
        assert torch.equal(getattr(read, name), getattr(saved, name))
    assert (read.steps, read.adapter) == (3, SETTINGS)


def test_what_the_cache_lets_go_is_read_again(base: Any, shelf: Shelf) -> None:
    slot = Slots(base).get(SETTINGS)
    names = ("w1", "w22", "w333")
    for name in names:
        shelf.add(slot, random_weights(slot, name), None, keep=True)
    for name in names:
        assert torch.equal(shelf.get(slot, name).flat, random_weights(slot, name).flat)


def test_drift_is_the_relative_norm_of_the_full_change(base: Any) -> None:
    slot = Slots(base).get(SETTINGS)
    flat = random_weights(slot, "w1").flat
    named = slot.split(flat)
    change, whole = 0.0, 0.0
    for name, down in named.items():
        if "lora_A" in name:
            up = named[name.replace("lora_A", "lora_B")]
            change += float((2.0 * up @ down).square().sum())
    for module in slot.model.modules():
        if hasattr(module, "base_layer"):
            whole += float(module.base_layer.weight.square().sum())
    assert slot.drift(flat) == pytest.approx((change / whole) ** 0.5, rel=1e-4)


def test_sessions_with_other_settings_share_one_base_model(base: Any) -> None:
    slots = Slots(base)
    small, large = slots.get(SETTINGS), slots.get(Adapter(lora_rank=8, lora_alpha=8))
    plain = logits(base)
    small.install(random_weights(small, "w1").flat)
    with_small = logits(small.model).clone()
    large.install(random_weights(large, "w22").flat)
    with_large = logits(large.model).clone()
    small.install(random_weights(small, "w1").flat)
    assert torch.equal(logits(small.model), with_small)
    assert not torch.allclose(with_small, with_large)
    with small.reference():
        assert torch.allclose(logits(small.model), plain, atol=1e-6)
    assert slots.get(SETTINGS) is small


def test_a_gradient_is_a_vector_of_its_own(base: Any) -> None:
    slot = Slots(base).get(SETTINGS)
    slot.install(random_weights(slot, "w1").flat)
    first = slot.gradient(slot.model(torch.arange(5)[None]).logits.square().mean())
    kept = first.clone()
    second = slot.gradient(slot.model(torch.arange(7)[None]).logits.square().mean())
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert float(first.abs().sum()) > 0
