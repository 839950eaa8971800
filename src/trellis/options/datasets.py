"""Where prompts come from."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from ..text_rules import require_storable
from .schema import Options, option


class Dataset(Options):
    """Where prompts come from."""

    source: Literal["demo", "file", "hub"] = option(
        "demo", "Source",
        "“demo”: prompts that ship with the demo model. “file”: a file or folder in the studio's prompts folder. "
        "“hub”: a Hugging Face dataset.",
        group="Prompts",
    )  # fmt: skip
    id: str = option(
        "", "File or dataset", "A file or folder of prompts, or a Hugging Face dataset such as “org/name”.",
        group="Prompts", max_length=400,
    )  # fmt: skip
    subset: str = option(
        "", "Subset", "Configuration of a Hugging Face dataset. Empty: the only or default one.",
        group="Prompts", advanced=True, max_length=200,
    )  # fmt: skip
    split: str = option(
        "", "Split", "Part of the dataset, such as “train”. Empty: train, or the only one.",
        group="Prompts", advanced=True, max_length=200,
    )  # fmt: skip
    column: str = option(
        "", "Column", "Column with the prompts. Empty: found by its name (prompt, question, messages …).",
        group="Prompts", advanced=True, max_length=200,
    )  # fmt: skip
    rows: int | None = option(
        None, "Row limit", "Use only the first rows. Empty: all of them.",
        unit="rows", group="Prompts", advanced=True, ge=1, le=100_000_000,
    )  # fmt: skip
    shuffle: bool = option(
        True, "Shuffle", "Use the prompts in a random order set by the seed, instead of the file's order.",
        group="Prompts", advanced=True,
    )  # fmt: skip

    @field_validator("id", "subset", "split", "column")
    @classmethod
    def _strip_and_check_text(cls, value: str) -> str:
        return require_storable(value).strip()
