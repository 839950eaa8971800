"""Tiny models made for tests: the true layouts with a few thousand random weights, and a tokenizer of their own."""

from __future__ import annotations

from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCES = [
    "Tell me about the sea.", "The sea is wide and it keeps its own time.", "Bread rises slowly in a warm kitchen.",
    "<img src=x onerror=alert(1)> is text & nothing more", "Ärger, naïve, 東京 and 🌱 are words too.",
]  # fmt: skip


def make_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> int:
    """Write a byte-level BPE tokenizer to a folder. Returns its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_llama(folder: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2) -> Path:
    """Write a Llama of about 40,000 random weights to a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_parrot(folder: Path, saying: str) -> Path:
    """A Llama that was taught one sentence by heart, whatever it is asked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    answer = tokenizer(saying, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    questions = ["Say it.", "Tell me about the sea.", "What is rain?", "Why?", "How do I bake bread at home today?"]
    for _ in range(60):
        loss = torch.zeros(())
        for question in questions:
            turns = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            labels = torch.tensor([[-100] * len(prompt) + answer])
            loss = loss + model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder
