"""The lean pass against transformers' own, layout by layout, and which models have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.tiny import make_model
from trellis.engine.text import fast_forward as lean_pass
from trellis.engine.text.adapters import AdapterSlot, AdapterSlots
from trellis.engine.text.fast_forward import SUPPORTED_FAMILIES, FastForward
from trellis.engine.text.group_forward import FastGroupForward, GenericGroupForward, group_forward_for
from trellis.engine.text.packed_weights import MAX_PACKED_ROWS, has_memory_for_copy, pack_weight, packed_linear
from trellis.options import Adapter

pytestmark = pytest.mark.engine

PROMPT = [5, 17, 33, 8, 60, 41, 7]


def make(folder: Path, kind: str, **changes: Any) -> Any:
    make_model(folder, kind)
    model = AutoModelForCausalLM.from_pretrained(folder, **changes).eval().requires_grad_(False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # random models have ones and zeros there, which would hide a slip
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def values(slot: AdapterSlot, seed: int) -> Tensor:
    return torch.randn(slot.flat.shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def difference(slot: AdapterSlot, flat: Tensor, base: bool = False) -> float:
    """How far the logits are apart: of a prompt, of several tokens after it, and of one more."""
    assert slot.adapted_layers
    one, other = (
        forward.rows(PROMPT, 3, 20, base) for forward in (GenericGroupForward(slot, flat), FastGroupForward(slot, flat))
    )
    apart = [(one.logits - other.logits).abs().max()]
    for width in (4, 1, 1):
        ids = torch.randint(0, 100, (3, width), generator=torch.Generator().manual_seed(width))
        apart.append((one.feed(ids) - other.feed(ids)).abs().max())
    again, first = other.restart(2), group_forward_for(slot, flat, 20).rows(PROMPT, 2, 20, base)
    apart.append((again.feed(ids[:2]) - first.feed(ids[:2])).abs().max())
    return float(max(apart))


@pytest.mark.parametrize("way", ["merged", "packed", "apart"])
@pytest.mark.parametrize("kind", sorted(SUPPORTED_FAMILIES))
def test_the_same_numbers(tmp_path: Path, kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_pass, "MAX_MERGED_BYTES", 10**9 if way == "merged" else 0)
    monkeypatch.setattr(lean_pass, "MAX_PACKED_BYTES", 10**9 if way == "packed" else 0)
    model = make(tmp_path, kind)
    if kind == "mistral":
        model.config.sliding_window = None
    lean = FastForward.from_model(model)
    assert lean
    assert (lean.layers[0].qkv.packed is not None) == (way == "packed" and pack_weight(torch.ones(4, 4)) is not None)
    slots = AdapterSlots(model, lean)
    slot = slots.get(Adapter(lora_rank=4))
    for seed in (1, 2):  # other values in the same place
        assert difference(slot, values(slot, seed)) < 1e-4
    assert difference(slot, values(slot, 1), base=True) < 1e-4
    few = slots.get(Adapter(lora_rank=2, target_modules="q_proj, v_proj, down_proj"))
    assert difference(few, values(few, 3)) < 1e-4
    assert difference(slot, values(slot, 4)) < 1e-4


def test_lower_precision_is_as_near_as_its_digits(tmp_path: Path) -> None:
    model = make(tmp_path, "qwen3", dtype=torch.bfloat16)
    slot = AdapterSlots(model, FastForward.from_model(model)).get(Adapter(lora_rank=4))
    assert slot.adapted_layers
    assert slot.adapted_layers.layers[0].qkv.lora_a is not None  # never merged: small changes would be rounded away
    assert difference(slot, values(slot, 1)) < 0.05


def test_biases_wherever_a_layout_may_have_them(tmp_path: Path) -> None:
    make_model(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attention_bias=True, mlp_bias=True).eval()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    slot = AdapterSlots(model, FastForward.from_model(model)).get(Adapter(lora_rank=4))
    assert difference(slot, values(slot, 1)) < 1e-4


def test_no_weight_is_held_twice_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen2")
    ids = torch.tensor([PROMPT])
    model, untouched = (AutoModelForCausalLM.from_pretrained(tmp_path).eval() for _ in range(2))
    lean = FastForward.from_model(model)
    assert lean
    layer = model.model.layers[1]
    assert layer.mlp.up_proj.weight.data_ptr() > lean.layers[1].gate_up.weight.data_ptr()
    assert layer.mlp.up_proj.weight.untyped_storage().data_ptr() == lean.layers[1].gate_up.weight.data_ptr()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, untouched(ids).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma2"])
def test_another_layout_goes_through_transformers(tmp_path: Path, kind: str) -> None:
    model = make(tmp_path, kind)
    assert FastForward.from_model(model) is None
    slot = AdapterSlots(model).get(Adapter(lora_rank=4))
    assert isinstance(group_forward_for(slot, values(slot, 1), 20), GenericGroupForward)


def test_what_was_asked_to_be_eager_goes_through_transformers(tmp_path: Path) -> None:
    assert FastForward.from_model(make(tmp_path, "llama", attn_implementation="eager")) is None


def test_a_text_longer_than_the_window_goes_through_transformers(tmp_path: Path) -> None:
    model = make(tmp_path, "mistral")
    slot = AdapterSlots(model, FastForward.from_model(model)).get(Adapter(lora_rank=4))
    flat = values(slot, 1)
    assert isinstance(group_forward_for(slot, flat, 16), FastGroupForward)
    assert isinstance(group_forward_for(slot, flat, 17), GenericGroupForward)


def test_angles_that_follow_a_rule_that_the_pass_does_not_know(tmp_path: Path) -> None:
    make_model(tmp_path, "llama")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert FastForward.from_model(AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=rope)) is None
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=rope).eval().requires_grad_(False)
    slot = AdapterSlots(model, FastForward.from_model(model)).get(Adapter(lora_rank=4))
    assert difference(slot, values(slot, 1)) < 1e-4


def test_packed_weights_give_the_same_numbers() -> None:
    torch.manual_seed(1)
    for out, into in ((7, 3), (64, 48), (129, 65)):
        weight, bias = torch.randn(out, into), torch.randn(out)
        packed = pack_weight(weight)
        if packed is None:
            pytest.skip("this torch cannot pack")
        for rows in (1, 4, MAX_PACKED_ROWS):
            x = torch.randn(rows, into)
            assert torch.allclose(packed_linear(x, packed, None), x @ weight.T, atol=1e-4)
            assert torch.allclose(packed_linear(x, packed, bias), x @ weight.T + bias, atol=1e-4)


def test_what_cannot_be_packed_is_left_as_it_is() -> None:
    assert pack_weight(torch.ones(4, 4, dtype=torch.bfloat16)) is None
    assert pack_weight(torch.ones(4, 4, device="meta")) is None


def test_no_copy_is_made_where_there_is_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_pass, "MAX_MERGED_BYTES", 0)
    assert has_memory_for_copy(1000)
    assert not has_memory_for_copy(10**15)
    monkeypatch.setattr(lean_pass, "has_memory_for_copy", lambda size: False)
    lean = FastForward.from_model(make(tmp_path, "llama"))
    assert lean
    assert lean.layers[0].qkv.packed is None


def test_a_limit_of_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (psutil.Process().memory_info().rss + 3_000_000,) * 2)
    assert has_memory_for_copy(500_000)
    assert not has_memory_for_copy(2_000_000)
