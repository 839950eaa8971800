"""Which model, how it is loaded, and its adapter."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator

from .schema import Options, option

Precision = Literal["auto", "32-bit", "16-bit", "8-bit", "4-bit"]


Device = Literal["auto", "cpu", "cuda", "mps"]


EngineName = Literal["transformers", "transformers-eager"]


class ModelOptions(Options):
    """Which model, and how it is loaded. Equal ones share an engine."""

    model: str = option(
        "demo", "Model",
        "The demo model, a folder in the studio's models folder, or a Hugging Face model such as “org/name”.",
        group="Model", min_length=1, max_length=200,
    )  # fmt: skip
    revision: str = option(
        "", "Revision", "Branch, tag or commit of a Hugging Face model. A commit pins the files. Empty: main.",
        group="Model", advanced=True, max_length=100, pattern=r"^[A-Za-z0-9._/-]*$",
    )  # fmt: skip
    precision: Precision = option(
        "auto", "Weight precision",
        "Fewer bits need less memory. The adapter trains in 32-bit. “auto”: 32-bit on a CPU, 16-bit on a GPU.",
        group="Model",
    )  # fmt: skip
    device: Device = option(
        "auto", "Device", "Where the model runs. “auto”: the GPU, if there is one.", group="Model", advanced=True
    )
    engine: EngineName = option(
        "transformers", "Engine",
        "“transformers” uses fused attention. “transformers-eager” uses plain attention: slower, for models or "
        "devices on which fused attention fails.",
        group="Model", advanced=True,
    )  # fmt: skip
    remote_code: bool = option(
        False, "Run the model's own code",
        "Some models need Python code of their own, which runs on this computer with your permissions. Only for a "
        "Hugging Face model whose revision is a commit that you have reviewed.",
        group="Model", advanced=True,
    )  # fmt: skip


class Adapter(Options):
    """The low-rank adapter that learns while the base model stays as it is (LoRA, arXiv 2106.09685)."""

    lora_rank: int = option(
        16, "Adapter rank", "Capacity of the LoRA adapter. Higher learns finer detail and needs more memory.",
        group="Adapter", advanced=True, ge=1, le=256,
    )  # fmt: skip
    lora_alpha: int = option(
        16, "Adapter alpha", "Scales the adapter: its output is multiplied by alpha / rank.",
        group="Adapter", advanced=True, ge=1, le=1024,
    )  # fmt: skip
    lora_dropout: float = option(
        0.0, "Adapter dropout", "Fraction of the adapter's inputs dropped at random in training. 0 turns it off.",
        group="Adapter", advanced=True, later=True, ge=0.0, le=0.9,
    )  # fmt: skip
    target_modules: str = option(
        "all-linear", "Target modules",
        "Layers that get an adapter: “all-linear”, or comma-separated names such as “q_proj, v_proj” or “experts”.",
        group="Adapter", advanced=True, later=True, min_length=1, max_length=500,
    )  # fmt: skip

    @field_validator("target_modules")
    @classmethod
    def _normalize_target_modules(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        if not all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names):
            raise ValueError("must be “all-linear” or comma-separated layer names")
        return ", ".join(dict.fromkeys(names))
