"""Mixtures of experts, recurrent and hybrid models: what Trellis does with them is what transformers and PEFT do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.engine.text.test_architectures import grown, learn, merge_of, offer, run
from tests.tiny import EXPERTS, STATEFUL, make_model
from trellis.engine.handlers import TextEngine
from trellis.engine.text.adapters import AdapterSlot
from trellis.engine.text.kv_cache import sequence_cache_for
from trellis.engine.text.weights_store import Weights
from trellis.errors import Invalid, LoadFailed
from trellis.messages import Learned, Merged, Offer, Offered, Prompt
from trellis.options import Adapter, Sampling

pytestmark = pytest.mark.engine

PROMPT = Prompt(text="Tell me about the sea.")

LEFT_OUT = {
    "qwen3_next": {"down_proj", "gate_proj", "up_proj"},
    "deepseek_v3": {"down_proj", "gate_proj", "up_proj"},
    "llama4_text": {"router"},
    "mamba": {"out_proj", "dt_proj"},
    "mamba2": {"out_proj"},
    "falcon_h1": {"out_proj"},
    "jamba": {"dt_proj"},
}
"""What PEFT cannot adapt: shared experts that it takes for those of an older format, a router that returns two tensors,
and projections that Mamba's kernels read directly."""


@dataclass
class Grown:
    kind: str
    folder: Path
    blobs: Path
    engine: TextEngine
    root: str
    offered: Offered
    learned: Learned
    plain: Any

    @property
    def prompt(self) -> list[int]:
        return self.engine.loaded.tokenize_prompt(PROMPT, 12, 512)

    def weights(self, name: str) -> tuple[AdapterSlot, Weights]:
        return self.engine.weights(name)

    def logits(self, model: Any, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return found


@pytest.fixture(scope="module", params=[*EXPERTS, *STATEFUL])
def room(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    kind = request.param
    place = tmp_path_factory.mktemp(kind)
    folder = make_model(place / "model", kind)
    engine, root, _ = grown(folder, place / "weights")
    offered = offer(engine, root)
    _, learned = learn(engine, root, offered)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Grown(kind, folder, place / "weights", engine, root, offered, learned, plain)


def test_an_adapter_of_zeros_changes_nothing(room: Grown) -> None:
    slot, weights = room.weights(room.root)
    slot.install(weights.flat)
    found, expected = room.logits(slot.model, room.prompt), room.logits(room.plain, room.prompt)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_likeliest_answer_is_that_of_the_whole_text_read_again_for_each_token(room: Grown) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0)
    asked = Offer(weights=room.root, prompt=PROMPT, sampling=sampling, group_size=2, seed=1, context_length=512)
    one, two = run(room.engine.offer(asked)).options
    read = room.plain.generate(
        torch.tensor([room.prompt]), do_sample=False, max_new_tokens=8, use_cache=False, pad_token_id=0
    )
    assert list(one.tokens) == list(two.tokens) == read[0, len(room.prompt) :].tolist()


def test_every_option_is_told_with_the_log_probability_that_the_model_gives_it(room: Grown) -> None:
    begun = Offer(
        weights=room.root, prompt=PROMPT, sampling=Sampling(max_new_tokens=10), group_size=2, seed=2, openings=2,
        context_length=512,
    )  # fmt: skip
    for option in (*room.offered.options, *run(room.engine.offer(begun)).options):
        logits = room.logits(room.plain, [*room.prompt, *option.tokens])[len(room.prompt) - 1 : -1]
        told = torch.log_softmax(logits, dim=-1).gather(-1, torch.tensor(option.tokens)[:, None]).sum()
        assert option.logprob == pytest.approx(float(told), abs=1e-3)


def test_a_step_follows_the_gradient_that_autograd_finds_through_peft(room: Grown) -> None:
    assert room.learned.metrics.share_after > room.learned.metrics.share_before
    assert room.learned.metrics.drift > 0
    slot, weights = room.weights(room.learned.weights)
    slot.install(weights.flat)
    ids = torch.tensor([[*room.prompt, *room.offered.options[1].tokens]])
    ours = slot.split(slot.gradient(_loss(slot.model, ids)))
    base = AutoModelForCausalLM.from_pretrained(room.folder)
    theirs = PeftModel.from_pretrained(base, room.blobs / room.learned.weights, is_trainable=True).eval()
    _loss(theirs, ids).backward()
    found = {name.replace(".default.", "."): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert set(found) == set(ours)
    for name, gradient in found.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)
    moved = [name for name in ours if bool(ours[name].any())]
    assert len(moved) > len(ours) / 2, "most of what has an adapter must feel the loss"


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logprobs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
    return -logprobs.gather(-1, ids[0, 1:, None]).mean()


def test_conversations_of_different_lengths_go_on_as_if_each_were_alone(room: Grown) -> None:
    engine, plain = room.engine, room.plain
    lines = sequence_cache_for(engine.loaded.slots, engine.loaded.fast_forward, engine.weights, 10**9)
    long, short = list(room.prompt), room.prompt[:5]
    one = lines.start(room.root, long)
    lines.prefill(one, long[:6])
    two = lines.start(room.root, short)
    _same(lines.prefill(two, short), room.logits(plain, short)[-1])
    _same(lines.prefill(one, long[6:]), room.logits(plain, long)[-1])
    for token in (17, 29, 31):
        long.append(token)
        short.append(token + 1)
        grew = lines.decode([one, two], [token, token + 1])
        _same(grew[0], room.logits(plain, long)[-1])
        _same(grew[1], room.logits(plain, short)[-1])
    lines.release(one)
    lines.release(two)
    for text in ([*long, 40, 41, 42], [*long[:-5], 43, 44]):  # a next turn, and one that was said otherwise
        again = lines.start(room.root, text)
        _same(lines.prefill(again, text[len(again.tokens) :]), room.logits(plain, text)[-1])
        lines.release(again)
    assert lines.bytes_for(2, 64, [room.root]) == 2 * lines.bytes_for(1, 64, [room.root])


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_what_was_learned_is_read_from_disk_and_merged(room: Grown, tmp_path: Path) -> None:
    other = TextEngine(room.engine._weights_store.blobs)
    other._loaded = room.engine.loaded
    assert torch.equal(other.weights(room.learned.weights)[1].flat, room.weights(room.learned.weights)[1].flat)
    merged: Merged = run(
        room.engine.merge(merge_of(room.folder, room.root, room.learned.weights, str(tmp_path / "merged")))
    )
    assert merged.agreement == 1.0
    assert merged.mean_difference < 1e-4


def test_drift_is_the_norm_of_the_whole_change(room: Grown) -> None:
    slot, weights = room.weights(room.learned.weights)
    slot.install(weights.flat)
    change = whole = 0.0
    for module in slot.model.modules():
        if slot.name in getattr(module, "lora_A", ()):
            weight = module.get_param() if hasattr(module, "get_param") else module.base_layer.weight
            whole += float(weight.square().sum())
            change += float(module.get_delta_weight(slot.name).detach().square().sum())
    assert slot.drift(weights.flat) == pytest.approx((change / whole) ** 0.5, rel=1e-3)


def test_experts_have_an_adapter_and_what_has_none_is_said(room: Grown) -> None:
    slot, _ = room.weights(room.root)
    assert {each.partition(" ")[0] for each in slot.left_out} == LEFT_OUT.get(room.kind, set())
    layers = room.engine.loaded.slots.layers
    assert bool(layers.experts) == (room.kind in {*EXPERTS, "jamba"})
    assert len(slot.slices) == 2 * (len(layers.linear) - (layers.head is not None) + len(layers.experts))


def test_experts_can_be_left_alone_or_named_alone(room: Grown) -> None:
    slots = room.engine.loaded.slots
    if not slots.layers.experts:
        with pytest.raises(Invalid, match="no linear layer “experts”"):
            slots.get(Adapter(lora_rank=2, target_modules="experts"))
        return
    dropping = slots.get(Adapter(lora_rank=2, lora_dropout=0.5))
    assert "experts (PEFT adapts them without dropout only)" in dropping.left_out
    alone = slots.get(Adapter(lora_rank=2, target_modules="experts"))
    assert len(alone.slices) == 2 * len(slots.layers.experts)
    slot, weights = room.weights(room.root)
    slot.install(weights.flat)
    torch.testing.assert_close(
        room.logits(slot.model, room.prompt), room.logits(room.plain, room.prompt), rtol=1e-4, atol=1e-4
    )


def test_a_model_that_reads_its_weights_directly_is_refused_in_few_bits(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "mamba")
    with pytest.raises(LoadFailed, match="in 4-bit") as raised:
        grown(folder, tmp_path / "weights", precision="4-bit")
    assert raised.value.next_step == "Choose 16-bit or 32-bit."


@pytest.mark.parametrize(("kind", "precision"), [("mixtral", "4-bit"), ("falcon_h1", "8-bit"), ("mamba", "16-bit")])
def test_fewer_bits_learn_too(kind: str, precision: str, tmp_path: Path) -> None:
    engine, root, _ = grown(make_model(tmp_path / "model", kind), tmp_path / "weights", precision=precision)
    offered = offer(engine, root)
    assert offered.options == offer(engine, root).options
    _, learned = learn(engine, root, offered)
    assert learned.metrics.share_after > learned.metrics.share_before
    assert 0 < learned.metrics.drift < 1


def test_the_language_model_of_one_that_sees_is_loaded_with_its_own_configuration(tmp_path: Path) -> None:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    folder = make_model(tmp_path / "model", "qwen3_5_text")
    text = AutoModelForCausalLM.from_pretrained(folder).config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 8,
              "out_hidden_size": 32}  # fmt: skip
    config = Qwen3_5Config(text_config=text, vision_config=vision, image_token_id=5, video_token_id=5)
    torch.manual_seed(0)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    engine, root, loaded = grown(folder, tmp_path / "weights")
    assert loaded.architecture == "Qwen3_5ForCausalLM"
    slot, weights = engine.weights(root)
    slot.install(weights.flat)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(6, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(slot.model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    _, learned = learn(engine, root, offer(engine, root))
    assert learned.metrics.share_after > learned.metrics.share_before
