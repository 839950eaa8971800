"""The whole engine on a tiny model of each common layout and precision: it offers, learns, and merges."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import DENSE_MODEL_TYPES, make_llama, make_model
from trellis.blobs import Blobs
from trellis.engine.handlers import TextEngine
from trellis.errors import Invalid, TrellisError, WeightsMissing
from trellis.messages import (
    AdapterCreated,
    CreateAdapter,
    Event,
    Learn,
    Learned,
    Lesson,
    Load,
    Loaded,
    Merge,
    Merged,
    Offer,
    Offered,
    Progress,
    Prompt,
)
from trellis.options import Adapter, Learning, Sampling

pytestmark = pytest.mark.engine

STAGES = ["initializing", "reading", "parsing", "placing", "warming_up", "merging", "checking", "writing"]


def run(steps: Generator[Event | None, None, Event], seen: list[Event] | None = None) -> Any:
    while True:
        try:
            event = next(steps)
        except StopIteration as stop:
            return stop.value
        if event is not None and seen is not None:
            seen.append(event)


def offer(engine: TextEngine, weights: str, text: str = "Tell me about the sea.", **prompt: Any) -> Offered:
    request = Offer(
        weights=weights, prompt=Prompt(text=text, **prompt), sampling=Sampling(max_new_tokens=12), group_size=3, seed=5,
        context_length=512,
    )  # fmt: skip
    offered: Offered = run(engine.offer(request))
    return offered


def learn(engine: TextEngine, weights: str, offered: Offered, **options: Any) -> tuple[Learn, Learned]:
    lesson = Lesson(prompt=Prompt(text="Tell me about the sea."), options=offered.options, choice=1, temperature=1.0)
    learning = Learning(**({"learning_rate": 1e-3, "kl_beta": 0.0} | options))
    request = Learn(weights=weights, lesson=lesson, learning=learning, context_length=512)
    learned: Learned = run(engine.learn(request))
    return request, learned


def grown(folder: Path, blobs: Path, adapter: Adapter | None = None, **options: Any) -> tuple[TextEngine, str, Loaded]:
    engine = TextEngine(Blobs(blobs))
    loaded: Loaded = run(engine.load(Load(path=str(folder), **options)))
    planted: AdapterCreated = run(engine.create_adapter(CreateAdapter(adapter=adapter or Adapter(lora_rank=4), seed=1)))
    return engine, planted.weights, loaded


def merge_of(folder: Path, root: str, weights: str, into: str) -> Merge:
    plant = CreateAdapter(adapter=Adapter(lora_rank=4), seed=1)
    return Merge(path=str(folder), weights=weights, into=into, root=root, plant=plant, probes=(Prompt(text="Why?"),))


@pytest.mark.parametrize("kind", DENSE_MODEL_TYPES)
def test_each_layout_offers_learns_and_merges(kind: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", kind, pad_is_end=kind in ("gpt2", "mistral"))
    engine, root, _ = grown(folder, tmp_path / "weights")
    offered = offer(engine, root)
    assert offered.options == offer(engine, root).options
    _, learned = learn(engine, root, offered)
    assert learned.metrics.share_after > learned.metrics.share_before
    assert learned.metrics.drift > 0
    into = tmp_path / "merged"
    request = merge_of(folder, root, learned.weights, str(into))
    seen: list[Event] = []
    merged: Merged = run(engine.merge(request), seen)
    assert merged.mean_difference < 1e-4
    assert merged.agreement == 1.0
    stages = [event.stage for event in seen if isinstance(event, Progress)]
    assert list(dict.fromkeys(stages)) == STAGES
    assert stages[-1] == "checking"
    again: Loaded = run(TextEngine(Blobs(tmp_path / "other")).load(Load(path=str(into))))
    assert again.parameters == engine.loaded.info.parameters


@pytest.mark.parametrize(
    ("kind", "precision", "most"),
    [(kind, "32-bit", 1e-5) for kind in DENSE_MODEL_TYPES]
    + [("gpt2", "16-bit", 1e-5), ("gpt2", "8-bit", 0.02), ("gpt2", "4-bit", 0.2)],
)
def test_plain_peft_computes_the_same_with_what_was_learned(
    kind: str, precision: str, most: float, tmp_path: Path
) -> None:
    """On the whole base what was grown in few bits differs by what the base was rounded by."""
    folder = make_model(tmp_path / "model", kind)
    engine, root, _ = grown(folder, tmp_path / "weights", precision=precision)
    _, learned = learn(engine, root, offer(engine, root), learning_rate=1e-2)
    slot, weights = engine.weights(learned.weights)
    slot.install(weights.flat)
    ids = torch.arange(5, 15)[None]
    dtype = torch.bfloat16 if precision == "16-bit" else torch.float32
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT sees a Conv1D where bitsandbytes had a Linear
        ours = slot.model(ids).logits.float()
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        plain = base(ids).logits.float()
        theirs = PeftModel.from_pretrained(base, tmp_path / "weights" / learned.weights).eval()(ids).logits.float()
    assert float((theirs - plain).abs().max()) > 0.3
    assert float((theirs - ours).abs().max()) < most


def test_the_end_is_learned_where_pad_and_end_are_one_token(tmp_path: Path) -> None:
    engine, _, _ = grown(make_model(tmp_path / "model", "llama", pad_is_end=True), tmp_path / "weights")
    assert engine.loaded.tokenizer.pad_token_id == engine.loaded.end_token == 1
    assert engine.loaded.tokenize_answer("Yes.")[-1] == 1


@pytest.mark.parametrize("precision", ["16-bit", "8-bit", "4-bit"])
def test_fewer_bits_offer_and_learn_and_repeat_themselves(precision: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    engine, root, loaded = grown(folder, tmp_path / "weights", precision=precision)
    _, exact_root, exact = grown(folder, tmp_path / "exact")
    assert loaded.bytes < exact.bytes
    assert root != exact_root, "weights grown on rounded numbers must not be taken for others"
    offered = offer(engine, root)
    assert offered.options == offer(engine, root).options
    request, learned = learn(engine, root, offered)
    assert learned.metrics.share_after > learned.metrics.share_before
    assert 0 < learned.metrics.drift < 1
    other, _, _ = grown(folder, tmp_path / "other", precision=precision)
    assert run(other.learn(request)).weights == learned.weights
    one, two = (
        (tmp_path / place / learned.weights / "adapter_model.safetensors").read_bytes()
        for place in ("weights", "other")
    )
    assert one == two, "learning again must give the same bits"


def test_plain_attention_answers_like_the_fused_one(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    plain, root, _ = grown(folder, tmp_path / "weights", engine="transformers-eager")
    fused, _, _ = grown(folder, tmp_path / "weights")
    assert plain.loaded.model.config._attn_implementation == "eager"
    assert [o.tokens for o in offer(plain, root).options] == [o.tokens for o in offer(fused, root).options]


def test_dropout_changes_what_is_learned_and_repeats_itself(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    engine, root, _ = grown(folder, tmp_path / "a", Adapter(lora_rank=4, lora_dropout=0.5))
    plain, plain_root, _ = grown(folder, tmp_path / "b", Adapter(lora_rank=4))
    assert root != plain_root
    offered = offer(engine, root)
    state = torch.get_rng_state()
    request, learned = learn(engine, root, offered)
    assert torch.equal(torch.get_rng_state(), state), "the step must leave the global random state alone"
    again, _, _ = grown(folder, tmp_path / "c", Adapter(lora_rank=4, lora_dropout=0.5))
    run(again.learn(request))
    _, other = learn(plain, plain_root, offered)
    read = [
        (tmp_path / place / name / "adapter_model.safetensors").read_bytes()
        for place, name in (("a", learned.weights), ("c", learned.weights), ("b", other.weights))
    ]
    assert read[0] == read[1]
    assert read[0] != read[2]
    assert offer(engine, root).options == offered.options, "answers are drawn without dropout"


def test_named_layers_alone_get_an_adapter(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    engine, _, _ = grown(folder, tmp_path / "weights", Adapter(lora_rank=4, target_modules="q_proj, v_proj"))
    slot = engine.loaded.slots.get(Adapter(lora_rank=4, target_modules="q_proj, v_proj"))
    assert {name.split(".")[-3] for name, _, _ in slot.slices} == {"q_proj", "v_proj"}


def test_a_layer_that_is_not_there_is_refused_with_a_list(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "gpt2")
    with pytest.raises(Invalid, match=r"no linear layer “q_proj”\. It has: c_attn, c_fc, c_proj"):
        grown(folder, tmp_path / "weights", Adapter(lora_rank=4, target_modules="q_proj"))


@pytest.mark.parametrize("method", ["dpo", "grpo", "trellis-classic"])
def test_each_method_learns_and_names_its_weights(method: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    engine, root, _ = grown(folder, tmp_path / "weights")
    offered = offer(engine, root)
    _, one = learn(engine, root, offered)
    _, two = learn(engine, root, offered, learning_method=method)
    assert one.weights != two.weights
    assert two.metrics.share_after > two.metrics.share_before
    if method == "trellis-classic":
        assert two.metrics.inner_steps == 1


def test_a_merge_that_does_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraModel

    folder = make_model(tmp_path / "model", "llama")
    engine, root, _ = grown(folder, tmp_path / "weights")
    _, learned = learn(engine, root, offer(engine, root), learning_rate=0.1)
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda both: both.unload())
    request = merge_of(folder, root, learned.weights, str(tmp_path / "m"))
    with pytest.raises(TrellisError) as raised:
        run(engine.merge(request))
    assert raised.value.code == "not_proved"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_base_is_merged_in_its_own_precision(tmp_path: Path, dtype: str) -> None:
    folder = make_model(tmp_path / "model", "llama")
    AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).save_pretrained(folder)
    engine, root, _ = grown(folder, tmp_path / "weights")
    _, learned = learn(engine, root, offer(engine, root))
    request = merge_of(folder, root, learned.weights, str(tmp_path / "m"))
    merged: Merged = run(engine.merge(request))
    assert merged.dtype == dtype
    assert 0 < merged.mean_difference < 5e-2
    tensors = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "m"))
    one, two = (each["model.embed_tokens.weight"] for each in tensors)
    assert torch.equal(one, two), "what the adapter does not touch must stay as it was, to the bit"


def test_what_is_stored_in_more_digits_than_the_rest_keeps_them(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    stored = load_file(folder / "model.safetensors")
    dice = torch.Generator().manual_seed(1)
    mixed = {
        name: 1 + torch.rand(each.shape, generator=dice) if "norm" in name else each.to(torch.bfloat16)
        for name, each in stored.items()
    }
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    engine, root, _ = grown(folder, tmp_path / "weights")
    _, learned = learn(engine, root, offer(engine, root))
    merged: Merged = run(engine.merge(merge_of(folder, root, learned.weights, str(tmp_path / "m"))))
    assert merged.dtype == "bfloat16"
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert set(found) == set(mixed)
    assert {name: each.dtype for name, each in found.items()} == {name: each.dtype for name, each in mixed.items()}
    for name, each in found.items():
        assert torch.equal(each, mixed[name]) == ("proj" not in name), name


def test_an_adapter_that_does_not_fit_the_base_is_not_merged_in_part(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    engine, root, _ = grown(folder, tmp_path / "weights")
    _, learned = learn(engine, root, offer(engine, root))
    file = tmp_path / "weights" / learned.weights / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("q_proj", "query"): each for name, each in tensors.items()}, file)
    with (
        pytest.warns(UserWarning, match="missing adapter keys"),
        pytest.raises(TrellisError, match="4 of the adapter's 28 tensors") as raised,
    ):
        run(engine.merge(merge_of(folder, root, learned.weights, str(tmp_path / "m"))))
    assert raised.value.code == "not_proved"


def test_a_rotten_adapter_is_learned_again_to_the_same_bits(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    engine, root, _ = grown(folder, tmp_path / "weights")
    offered = offer(engine, root)
    request, learned = learn(engine, root, offered)
    file = tmp_path / "weights" / learned.weights / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\xff\xff\xff\xff")
    other, _, _ = grown(folder, tmp_path / "weights")
    for use in (
        lambda: offer(other, learned.weights),
        lambda: run(other.learn(request.model_copy(update={"weights": learned.weights}))),
    ):
        with pytest.raises(WeightsMissing):
            use()
    with pytest.raises(WeightsMissing):
        other.weights(learned.weights)  # which conversations ask for
    assert run(other.learn(request)).weights == learned.weights
    assert file.read_bytes() == whole


def test_planted_weights_that_rot_are_planted_again(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    _, root, _ = grown(folder, tmp_path / "weights")
    file = tmp_path / "weights" / root / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\x00\x00\x80\x7f")
    _, again, _ = grown(folder, tmp_path / "weights")
    assert again == root
    assert file.read_bytes() == whole


def test_a_rotten_adapter_is_not_merged(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    engine, root, _ = grown(folder, tmp_path / "weights")
    _, learned = learn(engine, root, offer(engine, root))
    file = tmp_path / "weights" / learned.weights / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\xff\xff\xff\xff")
    with pytest.raises(WeightsMissing):
        run(engine.merge(merge_of(folder, root, learned.weights, str(tmp_path / "m"))))
    assert not (tmp_path / "m").exists()


def test_another_base_than_the_adapters_own_is_not_merged_into(tmp_path: Path) -> None:
    engine, root, _ = grown(make_llama(tmp_path / "model"), tmp_path / "weights")
    _, learned = learn(engine, root, offer(engine, root))
    other = make_llama(tmp_path / "other", seed=9)
    with pytest.raises(TrellisError) as raised:
        run(engine.merge(merge_of(other, root, learned.weights, str(tmp_path / "m"))))
    assert raised.value.code == "model_changed"


def test_an_adapter_grown_in_few_bits_is_merged_into_the_whole_base(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    engine, root, _ = grown(folder, tmp_path / "weights", precision="4-bit")
    _, learned = learn(engine, root, offer(engine, root))
    merged: Merged = run(engine.merge(merge_of(folder, root, learned.weights, str(tmp_path / "m"))))
    assert merged.dtype == "float32"
    assert merged.mean_difference < 1e-4


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_a_tied_output_layer_is_merged_into_a_weight_of_its_own(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_llama(tmp_path / "model") if kind == "llama" else make_model(tmp_path / "model", kind)
    adapter = Adapter(lora_rank=4, target_modules="lm_head")
    engine, root, _ = grown(folder, tmp_path / "weights", adapter)
    assert engine.loaded.model.config.tie_word_embeddings
    _, learned = learn(engine, root, offer(engine, root), learning_rate=0.05)
    assert learned.metrics.share_after > learned.metrics.share_before
    request = merge_of(folder, root, learned.weights, str(tmp_path / "m"))
    merged: Merged = run(engine.merge(request.model_copy(update={"plant": CreateAdapter(adapter=adapter, seed=1)})))
    assert merged.mean_difference < 1e-4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.equal(again.get_output_embeddings().weight, base.get_output_embeddings().weight)
