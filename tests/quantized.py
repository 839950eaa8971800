"""Tiny model folders whose weights are quantised, as they are published: made from a whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

FP8_MAX = 448.0
"""The largest number in eight bits of which four are the exponent's (E4M3)."""


def change_config(folder: Path, **changes: Any) -> Path:
    """Write other values into a folder's config.json; None takes a key away."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def make_fp8(base: Path, folder: Path, block: tuple[int, int] | None = (16, 16)) -> Path:
    """A copy of a Llama in FP8, with a scale for each block as DeepSeek and Qwen publish it, or for each tensor as
    Mistral does."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight.bfloat16()
            continue
        rows, columns = block or tuple(weight.shape)
        scale = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        scaled = torch.empty_like(weight)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
                scale[i, j] = weight[part].abs().max() / FP8_MAX
                scaled[part] = weight[part] / scale[i, j]
        tensors[name] = scaled.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale if block else scale.reshape(())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    about: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    if block:
        about["weight_block_size"] = list(block)
    return change_config(folder, quantization_config=about)


def make_bitsandbytes(base: Path, folder: Path, **options: Any) -> Path:
    """A copy of a Llama that was quantised with bitsandbytes and saved."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shutil.copytree(base, folder)
    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder
