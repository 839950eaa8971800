"""How a session learns, and all options of a session together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import ValidationError, field_validator

from ..text_rules import require_storable
from .datasets import Dataset
from .model import Adapter, ModelOptions
from .sampling import Sampling
from .schema import Options, OptionsT, option
from .validation import invalid_from, invalid_from_entries

THINKING_SWITCHES = ("enable_thinking", "thinking", "reasoning")
"""Names of the variable that turns thinking on and off in chat templates."""


MethodName = Literal["choice", "dpo", "dpo-norm", "ipo", "simpo", "kto", "apo-zero", "sft", "grpo", "dr-grpo", "rloo",
                     "trellis-classic"]  # fmt: skip


class Learning(Options):
    """How one choice changes the weights (docs/learning.md)."""

    learning_method: MethodName = option(
        "choice", "Learning method",
        "How your pick changes the model. “choice”, the default, counts “none of these” as one more option and needs "
        "the fewest picks. “dpo”, “dpo-norm”, “ipo” and “simpo” are pairwise; “kto” and “apo-zero” are pointwise; "
        "“sft” imitates your pick; “grpo”, “dr-grpo” and “rloo” reward it; “trellis-classic” is the rule of the "
        "first Trellis.",
        group="Learning", advanced=True, later=True,
    )  # fmt: skip
    learning_rate: float | None = option(
        None, "Learning rate", "Step size per choice. Empty: set by the model's size.",
        group="Learning", gt=0.0, le=0.1,
    )  # fmt: skip
    kl_beta: float = option(
        0.04, "KL penalty", "Keeps it close to the base model. Higher changes it less.",
        group="Learning", ge=0.0, le=10.0,
    )  # fmt: skip
    choice_beta: float = option(
        1.0, "Preference beta", "How strongly a difference in likelihood counts as a preference.",
        group="Learning", advanced=True, gt=0.0, le=100.0,
    )  # fmt: skip
    opening_weight: float = option(
        0.5, "Opening weight",
        "How much of the preference lies on an answer's first few tokens, which decide what kind of answer it "
        "becomes. The rest is spread over the whole answer.",
        group="Learning", advanced=True, later=True, ge=0.0, le=1.0,
    )  # fmt: skip
    inner_steps: int = option(
        5, "Max optimizer steps", "Most optimizer steps per choice. Stops earlier at the stop threshold.",
        unit="steps", group="Learning", advanced=True, ge=1, le=64,
    )  # fmt: skip
    refusal_steps: int = option(
        2, "Max steps for “none of these”",
        "It says what is wrong but not what is right, so too many steps do more harm than good.",
        unit="steps", group="Learning", advanced=True, later=True, ge=1, le=64,
    )  # fmt: skip
    settling: int = option(
        8, "Learning decay",
        "After this many choices a pick counts half as much, after three times as many a quarter, so that a model "
        "that is already good is not worn down. 0: every pick counts the same.",
        unit="choices", group="Learning", advanced=True, later=True, ge=0, le=10_000,
    )  # fmt: skip
    target_share: float = option(
        0.9, "Stop threshold", "Stop once the chosen answer has this probability among the answers.",
        group="Learning", advanced=True, gt=0.0, lt=1.0,
    )  # fmt: skip
    step_limit: float = option(
        10.0, "Step limit", "The most one choice may move the answers (mean k3 distance). A larger step is halved.",
        unit="nats", group="Learning", advanced=True, gt=0.0, le=100.0,
    )  # fmt: skip
    nll_weight: float = option(
        1.5, "NLL weight",
        "How much the chosen answer itself is made more likely, beside being compared with the others. This is why "
        "few choices are enough.",
        group="Learning", advanced=True, ge=0.0, le=10.0,
    )  # fmt: skip
    replay: int = option(
        3, "Replay count", "Earlier choices of this branch to train on again with each new one.",
        unit="choices", group="Learning", advanced=True, ge=0, le=8,
    )  # fmt: skip
    replay_weight: float = option(
        1.0, "Replay weight", "Weight of all replayed choices together. The new choice counts 1.",
        group="Learning", advanced=True, ge=0.0, le=10.0,
    )  # fmt: skip


class SessionConfig(ModelOptions, Adapter, Sampling, Learning):
    """All options of one steering session, flat, by their usual names."""

    context_length: int = option(
        1024, "Context length", "Prompt and answer together. A prompt that leaves no room for an answer is refused.",
        unit="tokens", group="Model", ge=64, le=131_072,
    )  # fmt: skip
    chat_template: bool = option(
        True, "Chat template", "Format prompts with the model's chat template. Turn off for base models.",
        group="Prompts", advanced=True,
    )  # fmt: skip
    group_size: int = option(4, "Answers per prompt", "How many answers you choose from.", group="Answers", ge=2, le=8)
    openings: int = option(
        1, "Candidate drafts",
        "After “none of these”, start this many drafts for each answer, half of them by the base model, and continue "
        "those that differ most. 3 helps if you sometimes misclick; 1 turns it off.",
        unit="per answer", group="Answers", advanced=True, later=True, ge=1, le=8,
    )  # fmt: skip
    seed: int = option(
        0, "Seed", "The same seed, prompts and choices give the same answers.",
        group="Answers", advanced=True, ge=0, le=2**31 - 1,
    )  # fmt: skip
    dataset: Dataset = option(
        Dataset(), "Prompts", "The prompts to steer on, in an order set by the seed.", group="Prompts"
    )
    system_prompt: str = option(
        "", "System prompt", "System message for every prompt.", group="Prompts", max_length=20_000
    )
    prompt_prefix: str = option(
        "", "Prompt prefix", "Text added before each prompt.",
        group="Prompts", advanced=True, max_length=20_000,
    )  # fmt: skip
    prompt_suffix: str = option(
        "", "Prompt suffix", "Text added after each prompt.",
        group="Prompts", advanced=True, max_length=20_000,
    )  # fmt: skip
    append_think: bool = option(
        False, "Append <think>", "Start every answer with a <think> tag, for models that think before they answer.",
        group="Prompts", advanced=True,
    )  # fmt: skip
    enable_thinking: Literal["auto", "on", "off"] = option(
        "auto", "Thinking",
        "Whether the model thinks before it answers. “auto”: as its chat template does. “on” and “off” need a "
        "template with such a switch.",
        group="Prompts", advanced=True, later=True,
    )  # fmt: skip
    control_prompt: str = option(
        "Tell me about the sea.", "Test prompt",
        "Re-answered after each step, so that you see what changed. Empty turns it off.",
        group="Prompts", max_length=20_000,
    )  # fmt: skip
    max_undos: int = option(
        32, "Undo history", "Latest steps whose weights stay on disk. Older ones are recomputed when needed.",
        unit="steps", group="History", advanced=True, ge=1, le=100_000,
    )  # fmt: skip
    checkpoint_interval: int = option(
        8, "Checkpoint interval",
        "Also keep the weights of every n-th step for good, so that going far back is fast.",
        unit="steps", group="History", advanced=True, ge=1, le=100_000,
    )  # fmt: skip

    @field_validator("system_prompt", "control_prompt", "prompt_prefix", "prompt_suffix")
    @classmethod
    def _check_text(cls, value: str) -> str:
        return require_storable(value)

    def extract(self, kind: type[OptionsT]) -> OptionsT:
        """Return the options of one part: `config.extract(Sampling)`."""
        return kind.model_validate({name: getattr(self, name) for name in kind.model_fields})

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Return a complete configuration from a partial one. Raise Invalid with an entry for each bad field."""
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            raise invalid_from(error, prefix="config") from None
        conflicts = list(config._find_conflicts())
        if conflicts:
            raise invalid_from_entries([{"field": f"config.{name}", "message": message} for name, message in conflicts])
        return config

    @classmethod
    def from_valid_fields(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from what is valid among some values, with defaults for the rest."""
        kept: dict[str, Any] = {}
        for name, value in values.items():
            try:
                cls.model_validate({name: value})
            except ValidationError:
                continue
            kept[name] = value
        return cls.model_validate(kept)

    def _find_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.max_new_tokens >= self.context_length:
            yield (
                "max_new_tokens",
                f"leaves no room for a prompt: {self.max_new_tokens} of {self.context_length} tokens of context.",
            )
        if self.dataset.source != "demo" and not self.dataset.id:
            yield "dataset.id", "is empty. Enter a file of prompts or a Hugging Face dataset."
        if self.enable_thinking != "auto" and not self.chat_template:
            yield (
                "enable_thinking",
                f"is “{self.enable_thinking}”, which needs the chat template. Turn on “Chat template”.",
            )
        if self.enable_thinking == "off" and self.append_think:
            yield "enable_thinking", "is “off”, but “Append <think>” starts a thought. Use only one of them."
        if self.remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            yield "remote_code", "needs a Hugging Face model with a full commit as its revision (40 hex digits)."


def default_learning_rate(parameters: int) -> float:
    """A rate by model size. Adam moves each weight by about the rate, so larger models want a smaller one.

    Measured at 1 to 3 million parameters (docs/learning.md); above, the usual fall with the square root of
    the size, held between 5e-5 and 3e-3. Larger models have not been measured.
    """
    return float(f"{min(3e-3, max(5e-5, 3e-3 * (2.5e6 / max(parameters, 1)) ** 0.5)):.2g}")
