"""Fewer bits learn what the same numbers in full precision learn, on any processor."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from bitsandbytes.nn import modules
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.conftest import pytest_report_header
from tests.engine.text.test_loading import load
from tests.processor import describe_processor, listed_features
from tests.tiny import make_llama, make_model
from trellis.engine.learning.log_probs import Group, scorer_for
from trellis.engine.text.adapters import AdapterSlots, dequantized_weight
from trellis.engine.text.loaded_model import LoadedModel
from trellis.engine.text.quantized_linear import dequantize_weight, replace_4bit_layers
from trellis.options import Adapter

pytestmark = pytest.mark.engine
SETTINGS = Adapter(lora_rank=4)
GROUP = Group([5, 6, 7, 8, 9], [[20, 21, 22, 1], [30, 31, 1], [40, 41, 42, 43]], 0, 1.0)


@pytest.fixture(params=["this processor", "AVX512-BF16"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On the second, bitsandbytes finds that it may repack weights for its kernel without a gradient."""
    if request.param == "AVX512-BF16":
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    kind: str = request.param
    return kind


def rounded(weight: Tensor, precision: str, dtype: torch.dtype) -> Tensor:
    """What a weight (out, in) is in a precision, by the definitions of the formats."""
    if precision == "8-bit":
        scale = weight.half().float().abs().amax(dim=1, keepdim=True)
        return (weight.half().float() * 127 / scale).round() * scale / 127
    if precision == "4-bit":
        packed, state = quantize_4bit(weight.to(dtype), quant_type="nf4")
        pairs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()
        values = get_4bit_type("nf4", "cpu")[pairs[: weight.numel()].int()]
        return (values * state.absmax.repeat_interleave(state.blocksize)[: weight.numel()]).view(weight.shape)
    return weight.to(torch.bfloat16).float() if precision == "16-bit" else weight


def twin_of(loaded: LoadedModel, folder: Path, precision: str) -> Any:
    """The same model in 32 bits, with the values that its linear layers were rounded to."""
    config = copy.deepcopy(loaded.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    exact = load(folder, precision="32-bit").model
    twin = type(loaded.model)(config).float().eval().requires_grad_(False)
    twin.load_state_dict(exact.state_dict())
    names = {name for name, module in loaded.model.named_modules() if "bit" in type(module).__name__}
    assert bool(names) == (precision in ("8-bit", "4-bit"))
    for name, module in twin.named_modules():
        if name in names:
            weight = module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T  # GPT-2's Conv1D
            weight.copy_(rounded(weight.contiguous(), precision, torch.float32))
        elif precision == "16-bit":
            for parameter in module.parameters(recurse=False):
                parameter.copy_(parameter.to(torch.bfloat16))
    return twin


def gradient(model: Any) -> tuple[Tensor, float]:
    slot = AdapterSlots(model).get(SETTINGS)
    flat = torch.randn(slot.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.05
    found = scorer_for(slot, [GROUP]).gradient([GROUP], flat, (), lambda each: each[0][0].sum() - each[0][1].sum())
    for name, where, _ in slot.slices:
        assert bool(found[0][where].any()), f"{name} has no gradient"
    return found


@pytest.mark.parametrize("layout", ["llama 64", "llama 32", "llama 48", "gpt2", "qwen2"])
@pytest.mark.parametrize("precision", ["32-bit", "16-bit", "8-bit", "4-bit"])
def test_the_gradient_is_that_of_the_rounded_weights_in_full_precision(
    precision: str, layout: str, machine: str, tmp_path: Path
) -> None:
    kind, _, hidden = layout.partition(" ")
    folder = make_llama(tmp_path / "m", hidden=int(hidden)) if hidden else make_model(tmp_path / "m", kind)
    loaded = load(folder, precision=precision)
    mine, loss = gradient(loaded.model)
    theirs, expected = gradient(twin_of(loaded, folder, precision))
    # 8 bits round the activations as well, 16 bits every result; the others round nothing but the weights.
    exact = precision in ("32-bit", "4-bit")
    assert float(torch.cosine_similarity(mine, theirs, dim=0)) > (1 - 1e-5 if exact else 0.999)
    assert float(mine.norm() / theirs.norm()) == pytest.approx(1, abs=1e-4 if exact else 0.02)
    assert loss == pytest.approx(expected, abs=1e-3 if exact else 0.05)


def test_8_bit_floats_are_read_with_their_scales_and_learn_as_these_values_do(tmp_path: Path) -> None:
    """The layout of DeepSeek and Qwen: E4M3 with one scale for each block of a matrix."""
    folder, exact = (make_llama(tmp_path / name, hidden=128) for name in ("fp8", "exact"))
    size, stored, meant = 64, {}, {}
    for name, each in load_file(folder / "model.safetensors").items():
        stored[name], meant[name] = each, each
        if name.endswith("proj.weight"):
            blocks = each.view(each.shape[0] // size, size, each.shape[1] // size, size)
            scale = blocks.abs().amax(dim=(1, 3)) / 448
            values = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name], stored[f"{name}_scale_inv"] = values.view(each.shape), scale
            meant[name] = (values.float() * scale[:, None, :, None]).view(each.shape)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, exact / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    about = {"quant_method": "fp8", "weight_block_size": [size, size], "activation_scheme": "dynamic", "fmt": "e4m3"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    mine, theirs = load(folder, precision="32-bit").model, load(exact, precision="32-bit").model
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.allclose(mine(ids).logits, theirs(ids).logits, atol=1e-5)
    (found, loss), (expected, same) = gradient(mine), gradient(theirs)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert loss == pytest.approx(same, abs=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (33, 96), (16, 16), (8, 48), (5, 10), (3, 7), (1, 1), (2, 128)])
@pytest.mark.parametrize("nested", [False, True])
def test_a_block_of_4_bits_may_begin_in_the_middle_of_a_row(shape: tuple[int, int], nested: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    made: Any = bitsandbytes.nn.Params4bit(weight, quant_type="nf4", compress_statistics=nested).to("cpu")
    found = dequantize_weight(made, torch.float32)
    assert torch.allclose(found, rounded(weight, "4-bit", torch.float32), atol=0.1 if nested else 1e-6)
    assert float((found - weight).norm() / weight.norm()) < 0.12


def test_a_4_bit_layer_has_the_gradients_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    layer = modules.Linear4bit(48, 20, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    replace_4bit_layers(nn.Sequential(layer))
    assert layer.bias is not None
    plain = nn.Linear(48, 20)
    plain.load_state_dict({"weight": dequantized_weight(layer), "bias": layer.bias})
    given, same = torch.randn(2, 3, 48, requires_grad=True), torch.randn(2, 3, 48, requires_grad=True)
    same.data.copy_(given.data)
    layer(given).square().sum().backward()
    plain(same).square().sum().backward()
    for mine, theirs in ((given.grad, same.grad), (layer.bias.grad, plain.bias.grad)):
        assert mine is not None
        assert theirs is not None
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_peft_merges_into_a_4_bit_layer_and_out_of_it(tmp_path: Path, machine: str) -> None:
    """Trellis merges into the whole base; a layer of ours must still be what PEFT takes it for."""
    model = load(make_llama(tmp_path / "m", hidden=64), precision="4-bit").model
    slot = AdapterSlots(model).get(SETTINGS)
    slot.install(torch.randn(slot.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = slot.model(ids).logits
        with pytest.warns(UserWarning, match="Merge lora module to 4-bit"):
            slot.model.merge_adapter()
        merged = slot.model(ids).logits
    assert slot.model.base_model.model.model.layers[0].self_attn.q_proj.merged
    assert float((merged - before).norm() / before.norm()) < 0.2


def test_the_run_says_which_features_the_processor_has() -> None:
    assert listed_features("model name\t: X\nflags\t\t: fpu avx2 avx512f avx512_bf16 bf16x\n") == [
        "avx2",
        "avx512f",
        "avx512_bf16",
    ]
    assert listed_features("Features\t: fp asimd bf16 sve\n") == ["bf16", "sve"]
    assert pytest_report_header() == f"processor: {describe_processor()}"
