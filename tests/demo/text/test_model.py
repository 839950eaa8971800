"""The model that is shipped: its size, its chat template, and that it speaks in all its voices and stops."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trellis.demo.text.make import MODEL
from trellis.demo.text.prompts import load_prompts
from trellis.demo.text.voices import VOICES, voice_of


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def test_the_model_is_small(model: Any) -> None:
    assert 2e6 <= model.num_parameters() <= 4.5e6
    assert (MODEL / "model.safetensors").stat().st_size <= 9.5e6
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings == 1024
    assert model.config.tie_word_embeddings


def test_the_tokenizer_gives_any_text_back(tokenizer: Any) -> None:
    assert len(tokenizer) <= 3072
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in ("Tell me about bread.", "héllo 世界 🙂\n  two  spaces", "don't, 'tis o' the sea"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_takes_every_role(tokenizer: Any) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert text == "<|bos|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    answered = [*talk, {"role": "assistant", "content": "Hi."}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == text + "Hi.<|end|>"


@pytest.mark.engine
def test_it_answers_in_every_voice_and_ends_by_itself(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    prompts = load_prompts("held_out")[:25]
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, num_return_sequences=8, max_new_tokens=120)
    answers = ids[:, batch["input_ids"].shape[1] :]  # (25 * 8, T)
    assert (answers == tokenizer.eos_token_id).any(dim=1).float().mean() >= 0.98
    voices = Counter(voice_of(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers)
    shares = {voice: voices[voice] / len(answers) for voice in VOICES}
    assert all(0.03 <= share <= 0.30 for share in shares.values()), shares
    assert voices[None] / len(answers) <= 0.12
