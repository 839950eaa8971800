"""Every option of a session, once: name, default, bounds, label, help and unit.

The form, the command line, the API's schema and the validation all follow from these rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import Invalid, shorten

PROMPT_LIMIT = 100_000
"""Characters in one prompt or one written answer; more is refused before it reaches a tokenizer."""


def option(
    default: Any,
    title: str,
    help: str,
    *,
    unit: str = "",
    group: str = "",
    advanced: bool = False,
    **bounds: Any,
) -> Any:
    """One row: a Pydantic field with what a form needs to show it."""
    extra: dict[str, Any] = {"unit": unit, "group": group, "advanced": advanced}
    return Field(default, title=title, description=help, json_schema_extra=extra, **bounds)


class Options(BaseModel):
    """A frozen set of options; unknown names and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Adapter(Options):
    """The low-rank adapter that learns while the base model stays as it is (LoRA, arXiv 2106.09685)."""

    lora_rank: int = option(
        16, "Adapter rank", "How much the adapter can hold. More learns finer things and costs memory.",
        group="Adapter", advanced=True, ge=1, le=256,
    )  # fmt: skip
    lora_alpha: int = option(
        16, "Adapter alpha", "Scale of the adapter: its output is multiplied by alpha over rank.",
        group="Adapter", advanced=True, ge=1, le=1024,
    )  # fmt: skip


class Sampling(Options):
    """How an answer is drawn from the model."""

    temperature: float = option(
        1.0, "Temperature", "How freely the model speaks: 0 is always its likeliest word, higher is more varied.",
        group="Answers", ge=0.0, le=5.0,
    )  # fmt: skip
    top_p: float = option(
        1.0, "Top-p", "Keep only the likeliest words that together hold this much probability; 1 keeps all.",
        group="Answers", advanced=True, gt=0.0, le=1.0,
    )  # fmt: skip
    min_p: float = option(
        0.05, "Min-p", "Drop words less likely than this fraction of the likeliest one; 0 drops none.",
        group="Answers", advanced=True, ge=0.0, lt=1.0,
    )  # fmt: skip
    max_new_tokens: int = option(
        96, "Longest answer", "An answer that reaches this length is cut.",
        unit="tokens", group="Answers", ge=1, le=8192,
    )  # fmt: skip


class Learning(Options):
    """How one choice changes the weights: a choice model with an outside option (docs/learning.md)."""

    learning_rate: float | None = option(
        None, "Learning rate", "The strength of a click. Empty: chosen by the model's size.",
        group="Learning", gt=0.0, le=0.1,
    )  # fmt: skip
    kl_beta: float = option(
        0.02, "KL strength", "How hard the model is held to the base model's way of speaking.",
        group="Learning", ge=0.0, le=10.0,
    )  # fmt: skip
    choice_beta: float = option(
        2.0, "Choice sharpness", "How strongly a difference in likelihood counts as a preference.",
        group="Learning", advanced=True, gt=0.0, le=100.0,
    )  # fmt: skip
    inner_steps: int = option(
        4, "Inner steps", "At most so many optimiser steps for one click; it stops sooner when the click has taken.",
        unit="steps", group="Learning", advanced=True, ge=1, le=64,
    )  # fmt: skip
    target_share: float = option(
        0.6, "Target share", "A click has taken when the chosen answer holds this share among the options.",
        group="Learning", advanced=True, gt=0.0, lt=1.0,
    )  # fmt: skip
    step_limit: float = option(
        2.0, "Step limit", "A click moves the answers at most this far (mean k3 distance); a step over it is halved.",
        unit="nats", group="Learning", advanced=True, gt=0.0, le=100.0,
    )  # fmt: skip
    nll_weight: float = option(
        0.05, "Pull on the winner", "A small pull that keeps the chosen answer itself from becoming less likely.",
        group="Learning", advanced=True, ge=0.0, le=10.0,
    )  # fmt: skip
    replay: int = option(
        4, "Replayed choices", "So many earlier choices of this branch are learned again with each click.",
        unit="choices", group="Learning", advanced=True, ge=0, le=8,
    )  # fmt: skip
    replay_weight: float = option(
        1.0, "Replay weight", "How much the replayed choices count together, against 1 for the new one.",
        group="Learning", advanced=True, ge=0.0, le=10.0,
    )  # fmt: skip


class Dataset(Options):
    """Where prompts come from."""

    source: Literal["demo"] = option("demo", "Prompts", "The prompts that ship with the demo model.", group="Prompts")


Part = TypeVar("Part", bound=Options)


class SessionConfig(Adapter, Sampling, Learning):
    """All options of one steering session, flat, by their usual names."""

    model: str = option(
        "demo", "Model", "The demo, or the name of a folder in the studio's models folder.",
        group="Model", min_length=1, max_length=200,
    )  # fmt: skip
    context_length: int = option(
        1024, "Context length", "Prompt and answer together; a prompt that leaves no room is refused.",
        unit="tokens", group="Model", advanced=True, ge=64, le=131_072,
    )  # fmt: skip
    group_size: int = option(
        4, "Options per prompt", "How many answers stand beside each other.", group="Answers", ge=2, le=8
    )
    seed: int = option(
        0, "Seed", "The same seed, prompts and choices give the same answers again.",
        group="Answers", advanced=True, ge=0, le=2**31 - 1,
    )  # fmt: skip
    dataset: Dataset = option(
        Dataset(),
        "Prompts",
        "The prompts that the model is steered on, in an order that the seed gives.",
        group="Prompts",
    )
    system_prompt: str = option(
        "", "System prompt", "Said to the model before every prompt.", group="Prompts", max_length=20_000
    )
    control_prompt: str = option(
        "Tell me about the sea.", "Control prompt",
        "Answered after every step, so that you see what changed. Empty turns it off.",
        group="Prompts", max_length=20_000,
    )  # fmt: skip

    @field_validator("system_prompt", "control_prompt")
    @classmethod
    def _text_can_be_stored(cls, value: str) -> str:
        return storable(value)

    def part(self, kind: type[Part]) -> Part:
        """The options of one part: `config.part(Sampling)`."""
        return kind.model_validate({name: getattr(self, name) for name in kind.model_fields})

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """A whole configuration from a partial one. Raises Invalid with an entry for each bad field."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise invalid_from(error, prefix="config") from None


def storable(text: str) -> str:
    """Text as it can be stored and encoded. Raises ValueError for NUL and lone surrogates."""
    if "\x00" in text:
        raise ValueError("must not hold the character NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be text that can be encoded as UTF-8") from None
    return text


Text = Annotated[str, Field(min_length=1, max_length=PROMPT_LIMIT), AfterValidator(storable)]
"""A prompt or a written answer as it may be sent."""


def default_learning_rate(parameters: int) -> float:
    """A rate by model size. Adam moves each weight by about the rate, so larger models want a smaller one.

    Measured at 2 million parameters (docs/log.md); above, the usual fall with the square root of the
    size, held between 2e-5 and 1e-3. Larger models have not been measured.
    """
    return float(f"{min(1e-3, max(2e-5, 1e-3 * (1e7 / max(parameters, 1)) ** 0.5)):.2g}")


def invalid_from(error: ValidationError, prefix: str = "") -> Invalid:
    """Pydantic's findings as the one error shape, each field named with the value that it was given."""
    return invalid_fields((dict(finding) for finding in error.errors()), prefix)


def invalid_fields(findings: Iterable[Mapping[str, Any]], prefix: str = "") -> Invalid:
    fields = []
    for finding in findings:
        path = ".".join(part for part in (prefix, *(shorten(step) for step in finding["loc"])) if part)
        fields.append({"field": path, "message": _sentence(finding)})
    first = fields[0]
    message = f"{first['field'] or 'The request'}: {first['message']}"
    if len(fields) > 1:
        message += f" ({len(fields) - 1} more)"
    return Invalid(message, next_step="Correct the named fields and send again.", field=first["field"], fields=fields)


def _sentence(finding: Mapping[str, Any]) -> str:
    message = str(finding["msg"]).removeprefix("Value error, ")
    value = finding.get("input")
    if finding["type"] in ("string_pattern_mismatch", "string_too_short"):
        return "is empty."
    if finding["type"] == "missing":
        return "is missing."
    if finding["type"] == "extra_forbidden":
        return "is not an option. The options are listed at /api/steering/schema."
    return f"{message}, got “{shorten(value)}”."
