"""Tiny models made for tests: the true layouts with a few thousand random weights, and a tokenizer of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


TOKENIZER_KINDS = ("byte-level", "llama", "gemma", "unigram", "wordpiece")
"""Kinds of tokenizers: byte-level BPE; SentencePiece BPE with byte fallback whose decoder strips a leading space (as
Llama 2 and Mistral have it) or does not (Gemma); Unigram with Metaspace (T5); WordPiece (BERT)."""


def make_tokenizer_kind(folder: Path, kind: str) -> Any:
    """Write a tokenizer of one of SPELLINGS to a folder, and return it as transformers reads it again."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if kind == "byte-level":
        make_tokenizer(folder)
        return AutoTokenizer.from_pretrained(folder)
    special = ["<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"]
    options: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    spaced = [" ".join(SENTENCES)] * 4
    if kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.decoder = decoders.WordPiece()
        raw.train_from_iterator(spaced, trainers.WordPieceTrainer(vocab_size=300, **options))
    elif kind == "unigram":
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        raw.decoder = decoders.Metaspace()
        raw.train_from_iterator(spaced, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", **options))
    else:
        learned = Tokenizer(models.BPE())
        learned.pre_tokenizer = pre_tokenizers.Metaspace()
        learned.train_from_iterator(spaced, trainers.BpeTrainer(vocab_size=250, **options))
        about = json.loads(learned.to_str())["model"]
        vocabulary = dict(about["vocab"])
        for byte in range(256):
            vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
        merges = [tuple(merge) for merge in about["merges"]]
        raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        added: list[Any] = []
        if kind == "llama":
            steps, added = [*steps, decoders.Strip(" ", 1, 0)], [normalizers.Prepend("▁")]
        raw.normalizer = normalizers.Sequence([*added, normalizers.Replace(" ", "▁")])
        raw.decoder = decoders.Sequence(steps)
        raw.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="<|end|>", pad_token="<|pad|>",
        additional_special_tokens=special[2:5],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def make_llama(folder: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2, positions: int = 512) -> Path:
    """Write a Llama of about 40,000 random weights to a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions, tie_word_embeddings=True,
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


DENSE_MODEL_TYPES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "gpt2", "gpt_neox")
"""Dense models with attention alone."""

_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_hidden_layers": 4, "head_dim": 8,
}  # fmt: skip
_LATENT_ATTENTION = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "qwen3_next": {**_EXPERTS, **_LINEAR_ATTENTION, "shared_expert_intermediate_size": 16},
    "deepseek_v3": {
        **_LATENT_ATTENTION, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 64,
        "attention_chunk_size": 16,
    },
}  # fmt: skip
"""Mixtures of experts, with the sizes of their own."""

STATEFUL: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _LINEAR_ATTENTION,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "falcon_h1": {
        "head_dim": 8, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_heads": 4,
        "mamba_chunk_size": 8,
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 4, "num_experts_per_tok": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 64, "lru_width": 32, "head_dim": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 512},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
}  # fmt: skip
"""Models whose cache holds more than keys and values, or that have none that can be used, with sizes of their own."""


def make_model(
    folder: Path, kind: str, *, template: str | None = TEMPLATE, pad_is_end: bool = False, tokenizer_kind: str = "",
    padding: int = 0,
) -> Path:  # fmt: skip
    """Write a tiny model of one of KINDS, a random one, to a folder; with a tokenizer of one of SPELLINGS, and so many
    rows in the embedding that no token belongs to, where that is wanted."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    vocabulary = (
        len(make_tokenizer_kind(folder, tokenizer_kind))
        if tokenizer_kind
        else make_tokenizer(folder, template=template)
    )
    vocabulary += padding
    special: dict[str, Any] = {"eos_token_id": 1, "pad_token_id": 1 if pad_is_end else 0, "bos_token_id": None}
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    if kind in ("gemma", "gemma2", "qwen3"):
        sizes["head_dim"] = 8
    if kind in ("gemma2", "mistral"):
        sizes["sliding_window"] = 16
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    if kind in ("gpt_neox", "rwkv"):
        del sizes["num_key_value_heads"]
    sizes |= EXPERTS.get(kind, {}) | STATEFUL.get(kind, {})
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, **sizes, **special)
    model = AutoModelForCausalLM.from_config(config)
    if kind not in DENSE_MODEL_TYPES:
        _enlarge_weights(model)
    model.save_pretrained(folder)
    if pad_is_end:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
    return folder


def _enlarge_weights(model: Any) -> None:
    """Make the random weights larger: with those of a new model, logits would be much the same after any text."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.abs().mean() < 0.05:
                parameter.mul_(3.0)


def make_memorizing_llama(folder: Path, sentence: str) -> Path:
    """A Llama that was taught one sentence by heart, whatever it is asked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    answer = tokenizer(sentence, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
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
