"""Folders whose weights are quantised: unpacked to the numbers that they stand for, so that they offer, learn and merge
as any other model; compared with what transformers and bitsandbytes make of the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from tests.engine.text.test_architectures import grown, learn, merge_of, offer, run
from tests.engine.text.test_loading import load
from tests.quantized import change_config, make_bitsandbytes, make_fp8
from trellis.engine.learning.merging import stored_dtype
from trellis.engine.text.dequantization import dequantize
from trellis.errors import LoadFailed

pytestmark = pytest.mark.engine

KINDS = ("fp8", "fp8 a tensor", "nf4", "nf4 nested", "fp4", "int8")
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 100, 200]])


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("quantized")
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return {
        "fp8": make_fp8(tiny_llama, place / "fp8", (16, 16)),
        "fp8 a tensor": make_fp8(tiny_llama, place / "fp8-tensor", None),
        "nf4": make_bitsandbytes(tiny_llama, place / "nf4", **nf4),
        "nf4 nested": make_bitsandbytes(tiny_llama, place / "nested", bnb_4bit_use_double_quant=True, **nf4),
        "fp4": make_bitsandbytes(tiny_llama, place / "fp4", load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        "int8": make_bitsandbytes(tiny_llama, place / "int8", load_in_8bit=True),
    }


def twin_of(folder: Path, kind: str) -> Any:
    """The same files as transformers unpacks them."""
    if kind.startswith("fp8"):
        about = json.loads((folder / "config.json").read_text())["quantization_config"]
        block = about.get("weight_block_size")
        config = FineGrainedFP8Config(dequantize=True, weight_block_size=tuple(block) if block else None)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).float().eval()
    return AutoModelForCausalLM.from_pretrained(folder).dequantize(torch.float32).float().eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_are_the_numbers_that_they_stand_for(
    kind: str, folders: dict[str, Path], tiny_llama: Path
) -> None:
    with torch.inference_mode():
        found = load(folders[kind]).model(input_ids=TOKENS).logits
        twin = twin_of(folders[kind], kind)(input_ids=TOKENS).logits.float()
        whole = load(tiny_llama).model(input_ids=TOKENS).logits
    # transformers rounds FP8 weights to bfloat16 on the way, which 32 bits need not do
    assert (found - twin).abs().max() < (1e-2 if kind.startswith("fp8") else 1e-5)
    assert 1e-6 < (found - whole).abs().max() < 0.2 * whole.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_folder_offers_learns_and_merges(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[kind]
    engine, root, loaded = grown(folder, tmp_path / "weights")
    assert loaded.parameters == load(folder).info.parameters
    offered = offer(engine, root)
    _, learned = learn(engine, root, offered)
    assert learned.metrics.share_after > learned.metrics.share_before
    into = tmp_path / "merged"
    merged = run(engine.merge(merge_of(folder, root, learned.weights, str(into))))
    assert merged.dtype in ("bfloat16", "float32")
    assert "quantization_config" not in json.loads((into / "config.json").read_text())
    assert {tensor.dtype for tensor in load_file(into / "model.safetensors").values()} <= {
        torch.bfloat16,
        torch.float32,
    }


def test_blocks_of_fp8_need_not_divide_a_weight(tiny_llama: Path, tmp_path: Path) -> None:
    found = load(make_fp8(tiny_llama, tmp_path / "ragged", (24, 24))).model.state_dict()
    for name, weight in load_file(tiny_llama / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            # three bits of mantissa: half of one part in eight, and a little for the smallest numbers
            assert ((found[name] - weight).abs() <= weight.abs() / 15 + 1e-3 * weight.abs().max()).all(), name


@pytest.mark.parametrize("precision", ["16-bit", "4-bit", "8-bit"])
def test_a_quantized_folder_loads_in_another_precision(precision: str, folders: dict[str, Path]) -> None:
    for kind in ("fp8", "nf4"):
        loaded = load(folders[kind], precision=precision)
        with torch.inference_mode():
            assert torch.isfinite(loaded.model(input_ids=TOKENS).logits).all()


def test_the_shape_of_a_quantized_model_counts_what_its_weights_stand_for(
    folders: dict[str, Path], tiny_llama: Path
) -> None:
    from trellis.memory_estimates import model_shape
    from trellis.safetensors_files import read_shapes

    def shape(folder: Path) -> Any:
        return model_shape(json.loads((folder / "config.json").read_text()), read_shapes(folder / "model.safetensors"))

    for kind in KINDS:
        found, whole = shape(folders[kind]), shape(tiny_llama)
        assert (found.parameters, found.linear) == (whole.parameters, whole.linear), kind


def test_fp8_with_scales_that_do_not_fit_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["fp8"], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    for changed in ({name: torch.ones(5, 5)}, {name: torch.ones(2, 2, dtype=torch.uint8)}):
        save_file(tensors | changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(LoadFailed, match=name.removesuffix("_scale_inv")) as raised:
            load(folder)
        assert raised.value.code == "unsupported_quantization"
    change_config(folder, quantization_config=None)
    with pytest.raises(LoadFailed, match="packed numbers"):
        load(folder)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_a_merged_model_of_packed_weights_is_written_in_16_bits(kind: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(64, 64).to(kind), "b.weight": torch.ones(4, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == torch.bfloat16


def test_fused_experts_in_fp8_are_unpacked_by_their_own_scales() -> None:
    weights, scales = torch.randn(3, 32, 48).to(torch.float8_e4m3fn), torch.rand(3, 2, 3) + 0.5
    stored = {"experts.down_proj": weights, "experts.down_proj_scale_inv": scales, "norm.weight": torch.ones(4)}
    found = dequantize(dict(stored), "fp8", {"weight_block_size": [16, 16]}, torch.float32)
    assert set(found) == {"experts.down_proj", "norm.weight"}
    for expert, row, column in ((0, 0, 0), (1, 20, 47), (2, 31, 17)):
        expected = weights.float()[expert, row, column] * scales[expert, row // 16, column // 16]
        assert found["experts.down_proj"][expert, row, column] == expected
