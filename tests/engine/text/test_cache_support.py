"""How a model goes on with a text is found out by trial, and whatever its cache cannot do is done another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import make_model
from trellis.engine.text.cache_support import CacheSupport, ModelCache, detect_cache_support, last_logits
from trellis.engine.text.loading import load_model
from trellis.errors import LoadFailed
from trellis.messages import Load

pytestmark = pytest.mark.engine


def loaded(folder: Path, kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_model(folder, kind)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "pieces", "copies"),
    [
        ("llama", "any", True),
        ("gemma2", "any", True),
        ("deepseek_v3", "any", True),
        ("lfm2", "any", True),
        ("falcon_h1", "any", True),
        ("mamba", "single", True),  # reads a second piece as if it were the first
        ("jamba", "single", True),
        ("rwkv", "none", False),  # mixes rows
        ("recurrent_gemma", "none", False),  # holds its state in its modules, the same for every text
        ("openai-gpt", "none", False),  # has no cache
    ],
)
def test_what_a_cache_can_do_is_found_out(kind: str, pieces: str, copies: bool, tmp_path: Path) -> None:
    model = loaded(tmp_path, kind)
    found = detect_cache_support(model)
    assert (found.chunks, found.can_repeat, found.is_causal) == (pieces, copies, True)
    if pieces != "none":
        past = ModelCache(found)
        with torch.inference_mode():
            past.read(model, torch.arange(6, 26)[None], last_only=True)
        assert past.nbytes <= found.bytes_for(20) < 2 * past.nbytes


@pytest.mark.parametrize("kind", ["llama", "mamba", "rwkv"])
def test_a_text_is_read_in_pieces_spread_and_gone_on_with(kind: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, kind)
    ids = torch.arange(6, 26)[None] * 7 % 300
    past = ModelCache(detect_cache_support(model))
    with torch.inference_mode():
        whole = last_logits(model, ids, 20, use_cache=False)[0]
        begun = past.read(model, ids[:, :8], last_only=True)
        second = past.read(model, ids[:, 8:12], last_only=False)
        assert past.repeat(3)
        rows = past.read(model, ids[:, 12:14].expand(3, -1), last_only=False)
    torch.testing.assert_close(begun[0], whole[7:8], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(second[0], whole[8:12], rtol=1e-3, atol=1e-3)
    for row in rows:
        torch.testing.assert_close(row, whole[12:14], rtol=1e-3, atol=1e-3)


def test_a_cache_that_cannot_be_copied_says_so(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    past = ModelCache(CacheSupport("past_key_values", chunks="any", can_repeat=False))
    with torch.inference_mode():
        past.read(model, torch.arange(6, 12)[None], last_only=True)
    assert not past.repeat(2)


def test_only_what_keeps_every_place_can_be_cut(tmp_path: Path) -> None:
    ids = torch.arange(6, 26)[None]
    cut = {}
    for kind in ("llama", "gemma2", "mamba"):
        model = loaded(tmp_path / kind, kind)
        past = ModelCache(detect_cache_support(model))
        with torch.inference_mode():
            past.read(model, ids, last_only=True)
        cut[kind] = past.crop(4)
    assert cut == {"llama": True, "gemma2": False, "mamba": False}


def test_logits_are_the_last_ones_whatever_a_model_makes_of_the_wish(tmp_path: Path) -> None:
    class Deaf(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **ignored: Any) -> Any:
            logits = input_ids[..., None].float().expand(-1, -1, 5)
            return type("Output", (), {"logits": logits})

    found = last_logits(Deaf(), torch.arange(10)[None], 3)
    assert found[0, :, 0].tolist() == [7.0, 8.0, 9.0]


def test_in_half_precision_states_are_gone_on_with_token_by_token(tmp_path: Path) -> None:
    model = loaded(tmp_path / "lfm2", "lfm2").to(torch.bfloat16)
    assert detect_cache_support(model).chunks == "single"
    assert detect_cache_support(loaded(tmp_path / "phi", "gemma2").to(torch.bfloat16)).chunks == "any"


@pytest.mark.parametrize("kind", ["xlm", "xlnet"])
def test_a_model_that_looks_ahead_is_refused(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from tests.tiny import make_tokenizer

    vocabulary = make_tokenizer(tmp_path)
    sizes = {"emb_dim": 32, "d_model": 32, "d_inner": 64, "n_layers": 2, "n_layer": 2, "n_heads": 4, "n_head": 4}
    wanted = ("emb_dim", "n_layers", "n_heads") if kind == "xlm" else ("d_model", "d_inner", "n_layer", "n_head")
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, **{name: sizes[name] for name in wanted})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(LoadFailed) as raised:
        for _ in load_model(tmp_path, Load(path=str(tmp_path))):
            pass
    assert raised.value.code == "unsupported_architecture"


@pytest.mark.parametrize("precision", ["16-bit", "8-bit"])
def test_a_model_that_forgets_is_told_from_one_that_rounds(precision: Any, tmp_path: Path) -> None:
    pieces = {}
    for kind in ("llama", "rwkv"):
        folder = make_model(tmp_path / kind, kind)
        if kind == "llama":  # large values in a few places, as real models have, which 8 bits keep apart
            tensors = load_file(folder / "model.safetensors")
            for name in tensors:
                if name.endswith("layernorm.weight"):
                    tensors[name][::8] = 40.0
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        steps = load_model(folder, Load(path=str(folder), precision=precision, engine="transformers-eager"))
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found = end.value.slots.cache_support
                break
        assert found.is_causal
        pieces[kind] = found.chunks
    assert pieces == {"llama": "any", "rwkv": "none"}
