"""What only a GPU can run: captured steps, and the whole engine there. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine.text.test_architectures import grown, learn, offer
from tests.engine.text.test_chat_batch import run
from tests.tiny import make_model
from trellis.blobs import Blobs
from trellis.engine.handlers import TextEngine
from trellis.engine.text.adapters import AdapterSlots
from trellis.engine.text.decoding import decode_group
from trellis.engine.text.fast_forward import SUPPORTED_FAMILIES, FastForward
from trellis.engine.text.group_forward import GenericGroupForward, group_forward_for
from trellis.messages import CreateAdapter, Load
from trellis.options import Adapter, Sampling

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]

PROMPT = [5, 17, 33, 8, 60, 41, 7]


def drawn(forward: Any, tokenizer: Any, sampling: Sampling, seed: int = 5) -> list[list[int]]:
    *_, group = decode_group(forward, tokenizer, PROMPT, frozenset(), sampling, 3, seed)
    return [option.tokens for option in group]


@pytest.mark.parametrize("kind", sorted(SUPPORTED_FAMILIES))
def test_captured_steps_draw_what_transformers_draws(tmp_path: Path, kind: str) -> None:
    make_model(tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to("cuda").eval().requires_grad_(False)
    model.config.sliding_window = None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    slot = AdapterSlots(model, FastForward.from_model(model)).get(Adapter(lora_rank=4))
    assert slot.graphs
    torch.manual_seed(1)
    for sampling in (Sampling(max_new_tokens=30), Sampling(max_new_tokens=30, top_p=0.8, temperature=0.6),
                     Sampling(max_new_tokens=9, temperature=0.0)):  # fmt: skip
        for flat in (torch.randn_like(slot.flat) * 0.3, torch.zeros_like(slot.flat)):  # other values, the same graph
            theirs = drawn(GenericGroupForward(slot, flat), tokenizer, sampling)
            assert drawn(group_forward_for(slot, flat, 64), tokenizer, sampling) == theirs
    assert len(slot.graphs._free) == 3  # one for each shape, however often it was used


def test_groups_that_grow_by_turns(tmp_path: Path) -> None:
    make_model(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to("cuda").eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    slot = AdapterSlots(model, FastForward.from_model(model)).get(Adapter(lora_rank=4))
    ways = [group_forward_for(slot, torch.randn_like(slot.flat) * 0.3, 64) for _ in range(2)]
    sampling = Sampling(max_new_tokens=24)
    alone = [drawn(way, tokenizer, sampling) for way in ways]
    both = [decode_group(way, tokenizer, PROMPT, frozenset(), sampling, 3, 5) for way in ways]
    for groups in zip(*both, strict=True):
        last = [[option.tokens for option in group] for group in groups]
    assert last == alone != [alone[0], alone[0]]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_the_engine_offers_and_learns_there(tmp_path: Path, kind: str) -> None:
    make_model(tmp_path / "model", kind)
    engine, weights, about = grown(tmp_path / "model", tmp_path / "blobs")
    assert about.device == "cuda"
    assert about.dtype == "bfloat16"
    offered = offer(engine, weights)
    assert offered.options == offer(engine, weights).options
    _, learned = learn(engine, weights, offered)
    assert learned.metrics.share_after > learned.metrics.share_before
    assert offer(engine, learned.weights).options


def test_captured_steps_never_draw_padding_and_survive_what_is_no_number(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama", padding=600)
    engine = TextEngine(Blobs(tmp_path / "blobs"))
    run(engine.load(Load(path=str(tmp_path / "model"), precision="32-bit")))
    planted = run(engine.create_adapter(CreateAdapter(adapter=Adapter(lora_rank=4), seed=1))).weights
    slot, size = engine.weights(planted)[0], len(engine.loaded.tokenizer)
    assert slot.graphs
    hot = Sampling(max_new_tokens=60, temperature=5.0, min_p=0.0)
    for sampling in (hot, hot.model_copy(update={"top_p": 0.9}), hot.model_copy(update={"temperature": 0.0})):
        way = group_forward_for(slot, torch.randn_like(slot.flat), 96)
        assert all(token < size for tokens in drawn(way, engine.loaded.tokenizer, sampling) for token in tokens)
        lost = group_forward_for(slot, torch.full_like(slot.flat, float("nan")), 96)
        *_, group = decode_group(lost, engine.loaded.tokenizer, PROMPT, frozenset(), sampling, 3, 5)
        assert all(option.overflowed and not option.tokens for option in group)
        assert drawn(way, engine.loaded.tokenizer, sampling) == drawn(way, engine.loaded.tokenizer, sampling)
