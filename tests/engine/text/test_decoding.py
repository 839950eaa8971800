"""Group generation against transformers' own forward, the samplers, and text that comes out whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trellis.engine.text import decoding
from trellis.engine.text.adapters import AdapterSlot, AdapterSlots
from trellis.engine.text.cuda_graphs import STEPS_PER_SYNC, StepGraphs
from trellis.engine.text.decoding import OPENING_TOKENS, decode_group, select_most_different
from trellis.engine.text.fast_forward import FastForward
from trellis.engine.text.group_forward import FastGroupForward, GenericGroupForward, GroupForward
from trellis.engine.text.quality_metrics import token_bigrams
from trellis.engine.text.sampling import draw_uniforms, sample
from trellis.engine.text.vocabulary import IncrementalDetokenizer
from trellis.options import Adapter, Sampling

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def slot(tiny_llama: Path) -> AdapterSlot:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)  # a model that is sure of something
    return AdapterSlots(model, FastForward.from_model(model)).get(Adapter(lora_rank=4))


@pytest.fixture(scope="module")
def flat(slot: AdapterSlot) -> Tensor:
    return torch.randn(slot.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.6


@pytest.fixture(params=["transformers", "lean", "steps of a graph"])
def forward(request: pytest.FixtureRequest, slot: AdapterSlot, flat: Tensor) -> GroupForward:
    """Each way through the model. A graph cannot be captured here; what it would hold is run step by step."""
    if request.param == "transformers":
        return GenericGroupForward(slot, flat)
    assert slot.adapted_layers
    graphs = (
        StepGraphs(slot.adapted_layers.fast_forward, slot.adapted_layers.layers)
        if request.param == "steps of a graph"
        else None
    )
    return FastGroupForward(slot, flat, graphs)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def run(
    forward: GroupForward, tokenizer: Any, sampling: Sampling, ends: frozenset[int] = frozenset(), size: int = 3
) -> Any:
    prompt = tokenizer("Tell me about the sea.")["input_ids"]
    *_, group = decode_group(forward, tokenizer, prompt, ends, sampling, size, seed=5)
    return prompt, group


def told(slot: AdapterSlot, flat: Tensor, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> Tensor:
    """The log-probabilities of an answer's tokens by one plain pass of transformers' own."""
    slot.install(flat)
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        logits = slot.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, dim=-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def test_greedy_is_transformers_own_greedy(
    forward: GroupForward, slot: AdapterSlot, flat: Tensor, tokenizer: Any
) -> None:
    prompt, group = run(forward, tokenizer, Sampling(temperature=0.0, max_new_tokens=20), size=1)
    slot.install(flat)
    theirs = slot.model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert group[0].tokens == theirs[0, len(prompt) :].tolist()
    assert group[0].logprob == pytest.approx(float(told(slot, flat, prompt, group[0].tokens).sum()), abs=1e-3)


def test_log_probabilities_are_those_of_a_plain_forward(
    forward: GroupForward, slot: AdapterSlot, flat: Tensor, tokenizer: Any
) -> None:
    prompt, group = run(forward, tokenizer, Sampling(temperature=0.7, max_new_tokens=12))
    for option in group:
        expected = told(slot, flat, prompt, option.tokens, 0.7).sum()
        assert option.logprob == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("sampling", [
    Sampling(max_new_tokens=30), Sampling(max_new_tokens=30, temperature=0.6, top_p=0.8, min_p=0.1),
])  # fmt: skip
def test_every_way_draws_the_same(
    forward: GroupForward, slot: AdapterSlot, flat: Tensor, tokenizer: Any, sampling: Sampling
) -> None:
    *_, (_, theirs) = [run(GenericGroupForward(slot, flat), tokenizer, sampling)]
    _, group = run(forward, tokenizer, sampling)
    assert [option.tokens for option in group] == [option.tokens for option in theirs]
    assert [option.text for option in group] == [option.text for option in theirs]


def test_an_option_ends_with_its_end_token_and_the_others_go_on(forward: GroupForward, tokenizer: Any) -> None:
    _, free = run(forward, tokenizer, Sampling(max_new_tokens=30))
    end = free[0].tokens[10]
    _, group = run(forward, tokenizer, Sampling(max_new_tokens=30), frozenset([end]))
    assert group[0].finish == "stop"
    assert group[0].tokens[-1] == end
    assert end not in group[0].tokens[:-1]
    assert all(option.finish == "stop" or len(option.tokens) == 30 for option in group)


def test_two_groups_that_grow_by_turns_under_other_weights_are_in_nobodys_way(
    forward: GroupForward, slot: AdapterSlot, tokenizer: Any
) -> None:
    prompt, sampling = tokenizer("The sea")["input_ids"], Sampling(max_new_tokens=3 * STEPS_PER_SYNC)
    graphs = (forward.graphs,) if isinstance(forward, FastGroupForward) else ()
    other = type(forward)(slot, torch.zeros_like(slot.flat), *graphs)
    alone = [[option.tokens for option in list(decode_group(each, tokenizer, prompt, frozenset(), sampling, 2, 5))[-1]]
             for each in (forward, other)]  # fmt: skip
    assert alone[0] != alone[1]
    both = [decode_group(each, tokenizer, prompt, frozenset(), sampling, 2, 5) for each in (forward, other)]
    for groups in zip(*both, strict=True):
        last = [[option.tokens for option in group] for group in groups]
    assert last == alone


def openings_of(
    forward: GroupForward, tokenizer: Any, size: int, openings: int, **sampling: Any
) -> list[list[tuple[tuple[int, ...], str, float]]]:
    prompt = tokenizer("Tell me about the sea.")["input_ids"]
    steps = decode_group(forward, tokenizer, prompt, frozenset(), Sampling(**sampling), size, 5, openings)
    return [[(tuple(option.tokens), option.text, option.logprob) for option in group] for group in steps]


def test_of_several_openings_those_that_differ_most_go_on(
    slot: AdapterSlot, tokenizer: Any, forward: GroupForward, flat: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = type(forward).rows
    monkeypatch.setattr(type(forward), "rows", lambda self, *args, base=False: rows(self, *args))  # all are its own
    steps = openings_of(forward, tokenizer, 3, 4, max_new_tokens=12)
    assert all(shown == [((), "", 0.0)] * 3 for shown in steps[: OPENING_TOKENS - 1])
    assert [len(tokens) for tokens, _, _ in steps[OPENING_TOKENS - 1]] == [OPENING_TOKENS] * 3
    drawn = [list(row[0]) for row in openings_of(forward, tokenizer, 12, 1, max_new_tokens=12)[OPENING_TOKENS - 1]]
    begun = [
        drawn[row] for pair in zip(range(6), range(6, 12), strict=True) for row in pair
    ]  # the same draws, by turns
    kept = [list(tokens) for tokens, _, _ in steps[OPENING_TOKENS - 1]]
    assert kept == [begun[row] for row in select_most_different(begun, 3)]
    assert kept[0] == drawn[0]
    prompt = tokenizer("Tell me about the sea.")["input_ids"]
    for tokens, text, logprob in steps[-1]:
        expected = told(slot, flat, prompt, list(tokens)).sum()
        assert logprob == pytest.approx(float(expected), abs=1e-3)  # the cache that went on was each one's own
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_half_of_the_openings_are_the_base_models_and_go_on_under_the_adapted_one(
    forward: GroupForward, slot: AdapterSlot, flat: Tensor, tokenizer: Any
) -> None:
    prompt = tokenizer("Tell me about the sea.")["input_ids"]
    *_, group = decode_group(forward, tokenizer, prompt, frozenset(), Sampling(max_new_tokens=14), 4, 5, 2)
    likelier, after = 0, 0.0
    for option in group:
        mine = told(slot, flat, prompt, option.tokens)
        base = told(slot, torch.zeros_like(flat), prompt, option.tokens)
        assert option.logprob == pytest.approx(float(mine.sum()), abs=1e-3)  # the adapted model's, all of it
        likelier += bool(base[:OPENING_TOKENS].sum() > mine[:OPENING_TOKENS].sum())
        after += float(mine[OPENING_TOKENS:].sum() - base[OPENING_TOKENS:].sum())
    assert 0 < likelier < 4  # some were begun by the base model, some were not
    assert after > 0


def test_an_opening_that_ends_at_once_is_an_answer(forward: GroupForward, tokenizer: Any) -> None:
    prompt = tokenizer("Tell me about the sea.")["input_ids"]
    everything = frozenset(range(len(tokenizer)))
    steps = list(decode_group(forward, tokenizer, prompt, everything, Sampling(), 3, 5, 4))
    assert len(steps) == 1
    assert all(len(option.tokens) == 1 and option.finish == "stop" for option in steps[0])
    assert len({option.tokens[0] for option in steps[0]}) == 3


def test_short_answers_are_chosen_among_too(forward: GroupForward, tokenizer: Any) -> None:
    steps = openings_of(forward, tokenizer, 2, 3, max_new_tokens=3)
    assert [len(group) for group in steps] == [2, 2, 2]
    assert all(len(tokens) == 3 and text for tokens, text, _ in steps[-1])


def test_a_long_prompt_or_no_chance_begins_each_answer_once(
    forward: GroupForward, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = openings_of(forward, tokenizer, 3, 1, max_new_tokens=8)
    monkeypatch.setattr(decoding, "OPENING_TOKEN_BUDGET", 10)
    assert openings_of(forward, tokenizer, 3, 4, max_new_tokens=8) == plain
    monkeypatch.undo()
    greedy = openings_of(forward, tokenizer, 3, 4, max_new_tokens=8, temperature=0.0)
    assert greedy == openings_of(forward, tokenizer, 3, 1, max_new_tokens=8, temperature=0.0)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=4, max_size=10), st.integers(1, 4))
def test_what_goes_on_is_the_first_and_never_twice_the_same_place(openings: list[list[int]], size: int) -> None:
    kept = select_most_different(openings, size)
    assert kept[0] == 0
    assert len(set(kept)) == len(kept) == size
    grams = [frozenset(token_bigrams(opening)) for opening in openings]
    assert len({grams[row] for row in kept}) == min(size, len(set(grams)))  # two that are alike only for want of others


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 5.0, 0.0]])


@given(st.floats(0, 1 - 2**-20), st.floats(0.1, 1.0), st.floats(0.0, 0.9), st.floats(0.1, 3.0))
def test_filters_keep_what_they_promise(chance: float, top_p: float, min_p: float, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, min_p=min_p)
    drawn, logprobs = sample(LOGITS, sampling, torch.tensor([chance, 1 - chance - 2**-20]))
    probabilities = torch.softmax(LOGITS / temperature, dim=-1)
    for row, token in enumerate(drawn.tolist()):
        share = probabilities[row, token]
        assert float(logprobs[row]) == pytest.approx(float(share.log()), abs=1e-4)
        assert share >= min_p * probabilities[row].max() - 1e-6
        better = probabilities[row][probabilities[row] > share].sum()
        assert better <= top_p + 1e-5


def test_temperature_zero_is_the_likeliest() -> None:
    drawn, _ = sample(LOGITS, Sampling(temperature=0.0), torch.zeros(2))
    assert drawn.tolist() == [0, 2]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([1.0, 0.0, float("-inf"), 2.0, -1.0])
    chances = draw_uniforms(1, 40_000, torch.Generator().manual_seed(1), torch.device("cpu"))[0]
    drawn, _ = sample(logits.expand(len(chances), -1), Sampling(temperature=0.8, min_p=0.0), chances)
    found = torch.bincount(drawn, minlength=5) / len(drawn)
    assert found.tolist() == pytest.approx(torch.softmax(logits / 0.8, -1).tolist(), abs=0.01)


def test_the_chances_of_a_draw_do_not_depend_on_how_many_follow() -> None:
    few, many = (draw_uniforms(n, 3, torch.Generator().manual_seed(7), torch.device("cpu")) for n in (2, 40))
    assert torch.equal(few, many[:2])


@settings(max_examples=60)
@given(st.text(max_size=40), st.integers(1, 7))
def test_text_read_some_tokens_at_a_time_is_the_text(tokenizer: Any, text: str, some: int) -> None:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    reader = IncrementalDetokenizer(tokenizer)
    pieces = [reader.decode(tokens[at : at + some]) for at in range(0, len(tokens), some)] + [reader.flush()]
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)
