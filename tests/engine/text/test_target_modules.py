"""Which layers get an adapter: by the model's own names, all or nothing, and whatever PEFT thinks of them is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraModel
from torch import nn
from transformers import AutoModelForCausalLM

from tests.tiny import make_model
from trellis.engine.text import adapters
from trellis.engine.text.adapters import AdapterSlots
from trellis.engine.text.target_modules import find_adaptable_layers, restored_on_error
from trellis.errors import Invalid
from trellis.options import Adapter

pytestmark = pytest.mark.engine


def loaded(folder: Path, kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_model(folder, kind)).eval().requires_grad_(False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(6, 16)[None]).logits
    return found


def state_of(model: nn.Module) -> dict[str, Any]:
    """Every module by name with its class, and every parameter with its identity."""
    modules = {name: (id(module), type(module), sorted(vars(module))) for name, module in model.named_modules()}
    return modules | {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("after", [0, 3, 7])
def test_an_injection_that_fails_leaves_the_model_as_it_was(
    kind: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loaded(tmp_path, kind)
    plain, before = logits(base), state_of(base)
    slots = AdapterSlots(base)
    with monkeypatch.context() as patched:
        _stumble(patched, after)
        with pytest.raises(RuntimeError, match="stumbled"):
            slots.get(Adapter(lora_rank=4))
    assert state_of(base) == before
    slot = slots.get(Adapter(lora_rank=4))
    slot.install(slot.zero_moments)
    assert torch.allclose(logits(slot.model), plain, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_an_injection_that_fails_leaves_earlier_adapters_as_they_were(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = AdapterSlots(loaded(tmp_path, kind))
    good = slots.get(Adapter(lora_rank=4))
    flat = torch.randn(good.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.2
    good.install(flat)
    spoken, before, drift = logits(good.model), state_of(good.model), good.drift(flat)
    with monkeypatch.context() as patched:
        _stumble(patched, 3)
        with pytest.raises(RuntimeError, match="stumbled"):
            slots.get(Adapter(lora_rank=8))
    assert state_of(good.model) == before
    assert torch.equal(logits(good.model), spoken)
    other = slots.get(Adapter(lora_rank=8))
    other.install(torch.randn(other.flat.shape) * 0.2)
    assert not torch.allclose(logits(other.model), spoken)
    good.install(flat)
    assert torch.equal(logits(good.model), spoken)
    assert good.drift(flat) == drift
    assert float(good.gradient(good.model(torch.arange(6, 12)[None]).logits.square().mean()).abs().sum()) > 0


def _stumble(patched: pytest.MonkeyPatch, after: int) -> None:
    really, left = LoraModel._create_and_replace, [after]

    def inject(self: LoraModel, *args: Any, **options: Any) -> None:
        if not left[0]:
            raise RuntimeError("stumbled")
        left[0] -= 1
        really(self, *args, **options)

    patched.setattr(LoraModel, "_create_and_replace", inject)


def test_what_fails_after_the_injection_is_undone_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = loaded(tmp_path, "llama")
    before = state_of(base)
    with monkeypatch.context() as patched:
        patched.setattr(adapters, "dequantize_module_weight", lambda module: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            AdapterSlots(base).get(Adapter())
    assert state_of(base) == before


def test_modules_are_put_back_with_their_hooks_and_children() -> None:
    root = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first = root[0]

    @restored_on_error(root)
    def change() -> None:
        root[0] = nn.Identity()
        root.register_forward_hook(lambda *_: None)
        first.weight.requires_grad_(False)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        change()
    assert root[0] is first
    assert not root._forward_hooks
    assert first.weight.requires_grad


@pytest.mark.parametrize("name", ["base_layer", "lora_A", "default"])
def test_names_of_pefts_own_are_no_layers(name: str, tmp_path: Path) -> None:
    slots = AdapterSlots(loaded(tmp_path, "llama"))
    slots.get(Adapter(lora_rank=4))
    wanted = (
        f"no linear layer “{name}”. It has: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj."
    )
    with pytest.raises(Invalid, match=wanted.replace(".", r"\.")):
        slots.get(Adapter(target_modules=name))


def test_a_layer_that_cannot_get_an_adapter_is_refused_with_the_reason(tmp_path: Path) -> None:
    slots = AdapterSlots(loaded(tmp_path, "mamba"))
    with pytest.raises(
        Invalid, match=r"“out_proj” cannot get an adapter \(PEFT does not adapt it in models with Mamba"
    ):
        slots.get(Adapter(target_modules="in_proj, out_proj"))
    named = slots.get(Adapter(target_modules="in_proj"))
    assert {name.split(".")[-3] for name, _, _ in named.slices} == {"in_proj"}
    assert named.left_out == ()


def test_layers_that_are_shared_by_two_sessions_count_for_each_alone(tmp_path: Path) -> None:
    alone = AdapterSlots(loaded(tmp_path / "one", "llama")).get(Adapter(target_modules="q_proj"))
    slots = AdapterSlots(loaded(tmp_path / "two", "llama"))
    slots.get(Adapter(target_modules="down_proj, o_proj"))
    together = slots.get(Adapter(target_modules="q_proj"))
    flat = torch.randn(alone.flat.shape, generator=torch.Generator().manual_seed(1))
    assert together.drift(flat) == pytest.approx(alone.drift(flat))


def test_the_layers_of_a_lean_model_are_known_without_a_trial(tmp_path: Path) -> None:
    base = loaded(tmp_path, "qwen3")
    assert find_adaptable_layers(base, probe=False) == find_adaptable_layers(base)
    assert not any(module._forward_hooks for module in base.modules())


def test_adapters_name_their_layers_as_other_programs_do_where_the_names_are_clear(tmp_path: Path) -> None:
    usual = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    slots = AdapterSlots(loaded(tmp_path / "one", "llama"))
    assert slots.get(Adapter(lora_rank=2)).config.target_modules == usual
    assert slots.get(Adapter(lora_rank=3)).config.target_modules == usual, "also beside another adapter"
    base = loaded(tmp_path / "two", "llama")
    base.model.layers[0].extra = nn.ModuleDict({"q_proj": nn.Identity()})
    named = AdapterSlots(base).get(Adapter(lora_rank=2)).config.target_modules
    assert {name for name in named if name.endswith("q_proj")} == {
        f"model.layers.{number}.self_attn.q_proj" for number in range(2)
    }


def test_what_several_modules_share_is_still_shared_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = AdapterSlots(loaded(tmp_path, "llama"))
    model = slots.get(Adapter(lora_rank=4)).model
    with monkeypatch.context() as patched:
        _stumble(patched, 3)
        with pytest.raises(RuntimeError, match="stumbled"):
            slots.get(Adapter(lora_rank=8))
    slots.get(Adapter(lora_rank=2))
    assert model.get_base_model().peft_config is model.base_model.peft_config
    assert len(model.peft_config) == 2


def test_settings_that_cannot_be_are_refused_before_the_model_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = AdapterSlots(loaded(tmp_path, "llama"))
    monkeypatch.setattr(adapters, "restored_on_error", lambda root: pytest.fail("the model was touched"))
    with pytest.raises(Invalid, match="no linear layer"):
        slots.get(Adapter(target_modules="no_such_proj"))


def test_rows_without_a_token_are_known_to_adapters_from_before(tmp_path: Path) -> None:
    slots = AdapterSlots(loaded(tmp_path, "llama"))
    slot = slots.get(Adapter())
    slots.unused_rows = torch.tensor([7])
    assert slot.unused_rows is slots.unused_rows
