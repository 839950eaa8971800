"""Random Llamas of a size, for measuring: they say nothing, at the speed of a model that does.

python bench/random_model.py "1.2 billion" FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

DEMO = Path(__file__).resolve().parent.parent / "src" / "trellis" / "demo" / "text" / "model"

SIZES: dict[str, dict[str, Any]] = {
    "140 million": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 32000,
    },
    "1.2 billion": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
"""Random Llamas; the larger one has the shape of Llama 3.2 1B."""


def random_model(size: str, device: str, dtype: torch.dtype) -> Any:
    config = LlamaConfig(**SIZES[size], tie_word_embeddings=True, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def save(size: str, folder: Path) -> None:
    """Write one with a tokenizer that knows a word for each of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    words = SIZES[size]["vocab_size"]
    tokenizer.add_tokens([f" word{number}" for number in range(len(tokenizer), words)])
    tokenizer.save_pretrained(folder)
    model = random_model(size, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]))
