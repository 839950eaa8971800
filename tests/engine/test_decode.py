"""Group generation against transformers' own forward, the samplers, and text that comes out whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from trellis.engine.decode import TextReader, decode_group, draw
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
