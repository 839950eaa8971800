"""Group generation against transformers' own forward, the samplers, and text that comes out whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from trellis.engine import decode
from trellis.engine.decode import OPENING, TextReader, decode_group, draw, most_different
from trellis.engine.vitals import grams_of
from trellis.params import Sampling

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def run(model: Any, tokenizer: Any, sampling: Sampling, ends: frozenset[int] = frozenset(), size: int = 3) -> Any:
    prompt = tokenizer("Tell me about the sea.")["input_ids"]
    *_, group = decode_group(model, tokenizer, prompt, ends, sampling, size, seed=5)
    return prompt, group


def test_greedy_is_transformers_own_greedy(model: Any, tokenizer: Any) -> None:
    prompt, group = run(model, tokenizer, Sampling(temperature=0.0, max_new_tokens=20), size=1)
    theirs = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert group[0].tokens == theirs[0, len(prompt) :].tolist()


def test_log_probabilities_are_those_of_a_plain_forward(model: Any, tokenizer: Any) -> None:
    prompt, group = run(model, tokenizer, Sampling(temperature=0.7, max_new_tokens=12))
    for option in group:
        ids = torch.tensor([prompt + option.tokens])
        logits = model(ids).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = torch.log_softmax(logits, dim=-1).gather(-1, ids[0, len(prompt) :, None]).sum().detach()
        assert option.logprob == pytest.approx(float(expected), abs=1e-3)


def test_an_option_ends_with_its_end_token_and_the_others_go_on(model: Any, tokenizer: Any) -> None:
    _, free = run(model, tokenizer, Sampling(max_new_tokens=30))
    end = free[0].tokens[10]
    _, group = run(model, tokenizer, Sampling(max_new_tokens=30), frozenset([end]))
    assert group[0].finish == "stop"
    assert group[0].tokens[-1] == end
    assert end not in group[0].tokens[:-1]
    assert all(option.finish == "stop" or len(option.tokens) == 30 for option in group)


def openings_of(model: Any, tokenizer: Any, size: int, openings: int, **sampling: Any) -> list[list[Any]]:
    prompt = tokenizer("Tell me about the sea.")["input_ids"]
    steps = decode_group(model, tokenizer, prompt, frozenset(), Sampling(**sampling), size, 5, openings)
    return [[(tuple(option.tokens), option.text, option.logprob) for option in group] for group in steps]


def test_of_several_openings_those_that_differ_most_go_on(model: Any, tokenizer: Any) -> None:
    steps = openings_of(model, tokenizer, 3, 4, max_new_tokens=12)
    assert all(shown == [((), "", 0.0)] * 3 for shown in steps[: OPENING - 1])
    assert [len(tokens) for tokens, _, _ in steps[OPENING - 1]] == [OPENING] * 3
    drawn = [list(row[0]) for row in openings_of(model, tokenizer, 12, 1, max_new_tokens=12)[OPENING - 1]]
    begun = [
        drawn[row] for pair in zip(range(6), range(6, 12), strict=True) for row in pair
    ]  # the same draws, by turns
    kept = [list(tokens) for tokens, _, _ in steps[OPENING - 1]]
    assert kept == [begun[row] for row in most_different(begun, 3)]
    assert kept[0] == drawn[0]
    prompt = tokenizer("Tell me about the sea.")["input_ids"]
    for tokens, text, logprob in steps[-1]:
        logits = model(torch.tensor([prompt + list(tokens)])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens)[:, None]).sum().detach()
        assert logprob == pytest.approx(float(expected), abs=1e-3)  # the cache that went on was each one's own
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


class OtherModel:
    """A model with a switch: within `off`, it speaks as another one."""

    def __init__(self, model: Any, other: Any) -> None:
        self._models, self.device, self.config, self.was_off = [model, other], model.device, model.config, 0

    @contextmanager
    def off(self) -> Iterator[None]:
        self._models.reverse()
        self.was_off += 1
        yield
        self._models.reverse()

    def __call__(self, **arguments: Any) -> Any:
        return self._models[0](**arguments)


def test_half_of_the_openings_can_be_the_base_models_and_go_on_under_the_adapted_one(
    model: Any, tokenizer: Any, tiny_llama: Path
) -> None:
    torch.manual_seed(3)
    other = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        other.lm_head.weight.normal_(std=0.5)
    both = OtherModel(model, other)
    prompt = tokenizer("Tell me about the sea.")["input_ids"]
    sampling = Sampling(max_new_tokens=14, temperature=0.8)
    *_, group = decode_group(both, tokenizer, prompt, frozenset(), sampling, 4, 5, 2, both.off)
    assert both.was_off == OPENING
    likelier = 0
    for option in group:
        ids = torch.tensor([prompt + option.tokens])
        told = []
        for each in (model, other):
            logits = each(ids).logits[0, len(prompt) - 1 : -1] / 0.8
            told.append(torch.log_softmax(logits, -1).gather(-1, ids[0, len(prompt) :, None])[:, 0].detach())
        assert option.logprob == pytest.approx(float(told[0].sum()), abs=1e-3)  # the adapted model's, all of it
        likelier += bool(told[1][:OPENING].sum() > told[0][:OPENING].sum())
        assert told[0][OPENING:].sum() > told[1][OPENING:].sum()
    assert 0 < likelier < 4  # some were begun by the other, some were not


def test_an_opening_that_ends_at_once_is_an_answer(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("Tell me about the sea.")["input_ids"]
    everything = frozenset(range(model.config.vocab_size))
    steps = list(decode_group(model, tokenizer, prompt, everything, Sampling(), 3, 5, 4))
    assert len(steps) == 1
    assert all(len(option.tokens) == 1 and option.finish == "stop" for option in steps[0])
    assert len({option.tokens[0] for option in steps[0]}) == 3


def test_short_answers_are_chosen_among_too(model: Any, tokenizer: Any) -> None:
    steps = openings_of(model, tokenizer, 2, 3, max_new_tokens=3)
    assert [len(group) for group in steps] == [2, 2, 2]
    assert all(len(tokens) == 3 and text for tokens, text, _ in steps[-1])


def test_a_long_prompt_or_no_chance_begins_each_answer_once(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = openings_of(model, tokenizer, 3, 1, max_new_tokens=8)
    monkeypatch.setattr(decode, "OPENING_POSITIONS", 10)
    assert openings_of(model, tokenizer, 3, 4, max_new_tokens=8) == plain
    monkeypatch.undo()
    greedy = openings_of(model, tokenizer, 3, 4, max_new_tokens=8, temperature=0.0)
    assert greedy == openings_of(model, tokenizer, 3, 1, max_new_tokens=8, temperature=0.0)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=4, max_size=10), st.integers(1, 4))
def test_what_goes_on_is_the_first_and_never_twice_the_same_place(openings: list[list[int]], size: int) -> None:
    kept = most_different(openings, size)
    assert kept[0] == 0
    assert len(set(kept)) == len(kept) == size
    grams = [frozenset(grams_of(opening)) for opening in openings]
    assert len({grams[row] for row in kept}) == min(size, len(set(grams)))  # two that are alike only for want of others


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 5.0, 0.0]])


@given(st.integers(0, 2**32), st.floats(0.1, 1.0), st.floats(0.0, 0.9), st.floats(0.1, 3.0))
def test_filters_keep_what_they_promise(seed: int, top_p: float, min_p: float, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, min_p=min_p)
    drawn, logprobs = draw(LOGITS, sampling, torch.Generator().manual_seed(seed))
    probabilities = torch.softmax(LOGITS / temperature, dim=-1)
    for row, token in enumerate(drawn.tolist()):
        chance = probabilities[row, token]
        assert float(logprobs[row]) == pytest.approx(float(chance.log()), abs=1e-4)
        assert chance >= min_p * probabilities[row].max() - 1e-6
        better = probabilities[row][probabilities[row] > chance].sum()
        assert better <= top_p + 1e-5


def test_temperature_zero_is_the_likeliest() -> None:
    drawn, _ = draw(LOGITS, Sampling(temperature=0.0), torch.Generator())
    assert drawn.tolist() == [0, 2]


@settings(max_examples=60)
@given(st.text(max_size=40))
def test_text_read_token_by_token_is_the_text(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    reader = TextReader(tokenizer)
    pieces = [reader.read(token) for token in tokens] + [reader.rest()]
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)
