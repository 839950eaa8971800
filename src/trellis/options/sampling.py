"""How answers are sampled."""

from __future__ import annotations

from .schema import Options, option

OPENING_TOKEN_BUDGET = 20_000
"""Prompt tokens that the openings of one offer may use together; with longer prompts there are fewer openings."""


class Sampling(Options):
    """How an answer is sampled."""

    temperature: float = option(
        1.0, "Temperature", "Randomness. 0 is deterministic; higher is more varied.",
        group="Answers", ge=0.0, le=5.0,
    )  # fmt: skip
    top_p: float = option(
        1.0, "Top-p", "Sample only from the most likely tokens that together have this probability. 1 keeps all.",
        group="Answers", advanced=True, gt=0.0, le=1.0,
    )  # fmt: skip
    min_p: float = option(
        0.05, "Min-p", "Drop tokens less likely than this fraction of the most likely one. 0 drops none.",
        group="Answers", advanced=True, ge=0.0, lt=1.0,
    )  # fmt: skip
    max_new_tokens: int = option(
        96, "Max new tokens", "Longer answers are cut off.",
        unit="tokens", group="Answers", ge=1, le=8192,
    )  # fmt: skip
