"""Weights as values: PEFT reads our folders, PEFT's forward is ours, drift is the norm it claims to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trellis.blobs import Blobs
from trellis.engine.text.adapters import AdapterSlot, AdapterSlots
from trellis.engine.text.weights_store import Weights, WeightsStore
from trellis.errors import TrellisError, WeightsMissing
from trellis.options import Adapter

pytestmark = pytest.mark.engine
SETTINGS = Adapter(lora_rank=4, lora_alpha=8)


@pytest.fixture
def base(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)


@pytest.fixture
def shelf(tmp_path: Path) -> WeightsStore:
    return WeightsStore(Blobs(tmp_path / "weights"), cache_bytes=1)


def random_weights(slot: AdapterSlot, name: str) -> Weights:
    flat = torch.randn(slot.flat.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    return Weights(name, slot.settings, flat, flat * 2, flat.square(), 3)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(10)[None]).logits
    return result


def test_planted_weights_change_nothing(base: Any, shelf: WeightsStore) -> None:
    before = logits(base).clone()
    slot = AdapterSlots(base).get(SETTINGS)
    slot.install(shelf.create_initial(slot, "w1", seed=3).flat)
    assert torch.equal(logits(slot.model), before)
    assert slot.drift(slot.flat) == 0.0


def test_peft_loads_our_folder_and_computes_the_same(base: Any, shelf: WeightsStore, tiny_llama: Path) -> None:
    slot = AdapterSlots(base).get(SETTINGS)
    weights = random_weights(slot, "w1")
    shelf.add(slot, weights, None, save=True)
    slot.install(weights.flat)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama)
    theirs = PeftModel.from_pretrained(fresh, shelf.blobs.path("w1")).eval()
    assert torch.allclose(logits(theirs), logits(slot.model), atol=1e-6)
    assert set(slot.split(weights.flat)) == set(get_peft_model_state_dict(theirs))


def test_weights_come_back_from_disk_bit_for_bit(base: Any, shelf: WeightsStore) -> None:
    slot = AdapterSlots(base).get(SETTINGS)
    saved = random_weights(slot, "w1")
    shelf.add(slot, saved, None, save=True)
    read = WeightsStore(shelf.blobs).get(slot, "w1")
    for name in ("flat", "first", "second"):
        assert torch.equal(getattr(read, name), getattr(saved, name))
    assert (read.steps, read.adapter) == (3, SETTINGS)


def rot(folder: Path, file: str, name: str, value: float) -> None:
    tensors = load_file(folder / file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / file)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "NaN in the adapter": lambda folder: rot(folder, "adapter_model.safetensors", FIRST, float("nan")),
    "infinity in the adapter": lambda folder: rot(folder, "adapter_model.safetensors", FIRST, float("-inf")),
    "NaN in the first moment": lambda folder: rot(folder, "optimizer.safetensors", "first", float("nan")),
    "infinity in the second moment": lambda folder: rot(folder, "optimizer.safetensors", "second", float("inf")),
    "a negative second moment": lambda folder: rot(folder, "optimizer.safetensors", "second", -1.0),
    "moments of another length": lambda folder: save_file(
        {"first": torch.zeros(3), "second": torch.zeros(3)}, folder / "optimizer.safetensors"
    ),
    "a tensor of another shape": lambda folder: save_file(
        {name: each.T.contiguous() for name, each in load_file(folder / "adapter_model.safetensors").items()},
        folder / "adapter_model.safetensors",
    ),
    "no optimiser": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "a list for an object": lambda folder: (folder / "weights.json").write_text("[]"),
    "no count of steps": lambda folder: (folder / "weights.json").write_text(
        json.dumps({"adapter": SETTINGS.model_dump(mode="json")})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_missing_and_put_out_of_sight(base: Any, shelf: WeightsStore, damage: str) -> None:
    slot = AdapterSlots(base).get(SETTINGS)
    shelf.add(slot, random_weights(slot, "w1"), None, save=True)
    assert WeightsStore(shelf.blobs).is_available(slot, "w1")
    DAMAGE[damage](shelf.blobs.path("w1"))
    with pytest.raises(WeightsMissing):
        WeightsStore(shelf.blobs).get(slot, "w1")
    assert "w1" not in shelf.blobs
    shelf.save(slot, "w1")  # what is still in memory is written again
    assert torch.equal(WeightsStore(shelf.blobs).get(slot, "w1").flat, random_weights(slot, "w1").flat)


@pytest.mark.parametrize("text", ["[]", "{}", '{"adapter": {"lora_rank": "many"}}'])
def test_settings_that_are_none_are_as_damaged(base: Any, shelf: WeightsStore, text: str) -> None:
    slot = AdapterSlots(base).get(SETTINGS)
    shelf.add(slot, random_weights(slot, "w1"), None, save=True)
    (shelf.blobs.path("w1") / "weights.json").write_text(text)
    assert WeightsStore(shelf.blobs).metrics("w1") is None
    with pytest.raises(WeightsMissing):
        WeightsStore(shelf.blobs).settings("w1")
    assert "w1" not in shelf.blobs


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("which", ["flat", "first", "second"])
def test_weights_that_are_not_finite_are_neither_kept_nor_written(
    base: Any, shelf: WeightsStore, which: str, keep: bool
) -> None:
    slot = AdapterSlots(base).get(SETTINGS)
    whole = random_weights(slot, "w1")
    rotten = getattr(whole, which).clone()
    rotten[0] = float("inf")
    with pytest.raises(TrellisError) as raised:
        shelf.add(slot, replace(whole, **{which: rotten}), None, save=keep)
    assert raised.value.code == "not_finite"
    assert not shelf.is_available(slot, "w1")


def test_what_the_cache_lets_go_is_read_again(base: Any, shelf: WeightsStore) -> None:
    slot = AdapterSlots(base).get(SETTINGS)
    names = ("w1", "w22", "w333")
    for name in names:
        shelf.add(slot, random_weights(slot, name), None, save=True)
    for name in names:
        assert torch.equal(shelf.get(slot, name).flat, random_weights(slot, name).flat)


def test_drift_is_the_relative_norm_of_the_full_change(base: Any) -> None:
    slot = AdapterSlots(base).get(SETTINGS)
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
    slots = AdapterSlots(base)
    small, large = slots.get(SETTINGS), slots.get(Adapter(lora_rank=8, lora_alpha=8))
    plain = logits(base)
    small.install(random_weights(small, "w1").flat)
    with_small = logits(small.model).clone()
    large.install(random_weights(large, "w22").flat)
    with_large = logits(large.model).clone()
    small.install(random_weights(small, "w1").flat)
    assert torch.equal(logits(small.model), with_small)
    assert not torch.allclose(with_small, with_large)
    with small.without_adapter():
        assert torch.allclose(logits(small.model), plain, atol=1e-6)
    assert slots.get(SETTINGS) is small


def test_a_gradient_is_a_vector_of_its_own(base: Any) -> None:
    slot = AdapterSlots(base).get(SETTINGS)
    slot.install(random_weights(slot, "w1").flat)
    first = slot.gradient(slot.model(torch.arange(5)[None]).logits.square().mean())
    kept = first.clone()
    second = slot.gradient(slot.model(torch.arange(7)[None]).logits.square().mean())
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert float(first.abs().sum()) > 0
