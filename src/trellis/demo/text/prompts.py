"""The demo model's prompts: those to steer on, and those held out to see whether steering carried over."""

from __future__ import annotations

import json
from pathlib import Path

PROMPTS_FILE = Path(__file__).with_name("prompts.jsonl")
SPLITS = ("steer", "held_out")


def load_prompts(split: str) -> list[str]:
    """The prompts of one split, in the file's order. Raises ValueError for a split that does not exist."""
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}. Use one of: {', '.join(SPLITS)}.")
    rows = [json.loads(line) for line in PROMPTS_FILE.read_text(encoding="utf-8").splitlines()]
    return [row["prompt"] for row in rows if row["split"] == split]
