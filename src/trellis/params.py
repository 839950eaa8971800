"""Every option of a session, once: name, default, bounds, label, help and unit.

The form, the command line, the API's schema and the validation all follow from these rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from .errors import Invalid, shorten
from .text_rules import PROMPT_LIMIT, require_storable

Precision = Literal["auto", "32-bit", "16-bit", "8-bit", "4-bit"]
Device = Literal["auto", "cpu", "cuda", "mps"]
EngineName = Literal["transformers", "transformers-eager"]
MethodName = Literal["choice", "dpo", "dpo-norm", "ipo", "simpo", "kto", "apo-zero", "sft", "grpo", "dr-grpo", "rloo",
                     "trellis-classic"]  # fmt: skip

THINKING_SWITCHES = ("enable_thinking", "thinking", "reasoning")
"""What chat templates call the variable that turns thinking on and off."""

OPENING_TOKEN_BUDGET = 20_000
"""Positions of prompt that the openings of one offer may take up together; with a longer prompt fewer are begun."""


def option(
    default: Any,
    title: str,
    help: str,
    *,
    unit: str = "",
    group: str = "",
    advanced: bool = False,
    later: bool = False,
    **bounds: Any,
) -> Any:
    """One row: a Pydantic field with what a form needs to show it.

    `later` marks an option that came after the first sessions: at its default it is left out of the recipes
    that name weights, so that what was grown before keeps its name.
    """
    extra: dict[str, Any] = {"unit": unit, "group": group, "advanced": advanced, "later": later}
    return Field(default, title=title, description=help, json_schema_extra=extra, **bounds)


class Options(BaseModel):
    """A frozen set of options; unknown names and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelOptions(Options):
    """Which model, and how it is loaded. Equal ones share an engine."""

    model: str = option(
        "demo", "Model", "The demo, a folder in the studio's models folder, or a model on the hub such as “org/name”.",
        group="Model", min_length=1, max_length=200,
    )  # fmt: skip
    revision: str = option(
        "", "Revision", "For a model on the hub: a branch, tag or commit. A commit pins the files. Empty: main.",
        group="Model", advanced=True, max_length=100, pattern=r"^[A-Za-z0-9._/-]*$",
    )  # fmt: skip
    precision: Precision = option(
        "auto", "Precision",
        "How exactly the base model's numbers are kept. Fewer bits take less memory; the adapter always learns in 32. "
        "“auto”: 32-bit on a CPU, 16-bit on a GPU.",
        group="Model",
    )  # fmt: skip
    device: Device = option(
        "auto", "Device", "Where the model runs. “auto”: the GPU where there is one.", group="Model", advanced=True
    )
    engine: EngineName = option(
        "transformers", "Engine",
        "“transformers” runs the model with fused attention; “transformers-eager” with plain attention, slower, "
        "for models or devices on which the fused one fails.",
        group="Model", advanced=True,
    )  # fmt: skip
    remote_code: bool = option(
        False, "Run the model's own code",
        "Some models bring Python code that would run on this computer with your rights. Only for a model on the hub "
        "whose revision is pinned to a commit that you have read.",
        group="Model", advanced=True,
    )  # fmt: skip


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
    lora_dropout: float = option(
        0.0, "Adapter dropout", "Share of the adapter's inputs dropped at random while it learns; 0 drops none.",
        group="Adapter", advanced=True, later=True, ge=0.0, le=0.9,
    )  # fmt: skip
    target_modules: str = option(
        "all-linear", "Target modules",
        "Which layers get an adapter: “all-linear”, or names with commas, such as “q_proj, v_proj” or “experts”.",
        group="Adapter", advanced=True, later=True, min_length=1, max_length=500,
    )  # fmt: skip

    @field_validator("target_modules")
    @classmethod
    def _normalize_target_modules(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        if not all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names):
            raise ValueError("must be “all-linear” or names of layers with commas between them")
        return ", ".join(dict.fromkeys(names))


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
    """How one choice changes the weights (docs/learning.md)."""

    learning_method: MethodName = option(
        "choice", "Learning method",
        "How a click becomes a change. “choice”, the default, takes “none of these” as one more option and needs the "
        "fewest clicks. “dpo”, “dpo-norm”, “ipo” and “simpo” set the chosen answer against each other one; “kto” and "
        "“apo-zero” call each answer good or bad by itself; “sft” only imitates what was chosen; “grpo”, “dr-grpo” and "
        "“rloo” reward it; “trellis-classic” is the first Trellis' rule.",
        group="Learning", advanced=True, later=True,
    )  # fmt: skip
    learning_rate: float | None = option(
        None, "Learning rate", "The strength of a click. Empty: chosen by the model's size.",
        group="Learning", gt=0.0, le=0.1,
    )  # fmt: skip
    kl_beta: float = option(
        0.04, "KL strength", "How hard the model is held to the base model's way of speaking.",
        group="Learning", ge=0.0, le=10.0,
    )  # fmt: skip
    choice_beta: float = option(
        1.0, "Choice sharpness", "How strongly a difference in likelihood counts as a preference.",
        group="Learning", advanced=True, gt=0.0, le=100.0,
    )  # fmt: skip
    opening_weight: float = option(
        0.5, "Weight of the opening",
        "How much of what sets one answer against another lies on its first few words, where it is decided what kind "
        "of answer it becomes; the rest is spread over all of it.",
        group="Learning", advanced=True, later=True, ge=0.0, le=1.0,
    )  # fmt: skip
    inner_steps: int = option(
        5, "Inner steps", "At most so many optimiser steps for one click; it stops sooner when the click has taken.",
        unit="steps", group="Learning", advanced=True, ge=1, le=64,
    )  # fmt: skip
    refusal_steps: int = option(
        2, "Steps for a refusal",
        "At most so many for “none of these”: it says what is wrong and not what is right, and pushed as far as a "
        "choice it tears down more than it teaches.",
        unit="steps", group="Learning", advanced=True, later=True, ge=1, le=64,
    )  # fmt: skip
    settling: int = option(
        8, "Settling",
        "After so many choices a click counts half as much, after three times as many a quarter, so that a model that "
        "has found its voice is not worn down. 0: every click counts the same.",
        unit="choices", group="Learning", advanced=True, later=True, ge=0, le=10_000,
    )  # fmt: skip
    target_share: float = option(
        0.9, "Target share", "A click has taken when the chosen answer holds this share among the options.",
        group="Learning", advanced=True, gt=0.0, lt=1.0,
    )  # fmt: skip
    step_limit: float = option(
        10.0, "Step limit", "A click moves the answers at most this far (mean k3 distance); a step over it is halved.",
        unit="nats", group="Learning", advanced=True, gt=0.0, le=100.0,
    )  # fmt: skip
    nll_weight: float = option(
        1.5, "Pull on the winner",
        "How much the chosen answer itself becomes likelier, beside being set against the others. It is what makes few "
        "clicks enough.",
        group="Learning", advanced=True, ge=0.0, le=10.0,
    )  # fmt: skip
    replay: int = option(
        3, "Replayed choices", "So many earlier choices of this branch are learned again with each click.",
        unit="choices", group="Learning", advanced=True, ge=0, le=8,
    )  # fmt: skip
    replay_weight: float = option(
        1.0, "Replay weight", "How much the replayed choices count together, against 1 for the new one.",
        group="Learning", advanced=True, ge=0.0, le=10.0,
    )  # fmt: skip


class Dataset(Options):
    """Where prompts come from."""

    source: Literal["demo", "file", "hub"] = option(
        "demo", "Prompts from",
        "“demo” ships with the demo model; “file” is a file or folder in the studio's prompts folder; "
        "“hub” is a dataset on the Hugging Face hub.",
        group="Prompts",
    )  # fmt: skip
    id: str = option(
        "", "File or dataset", "The name of a file or folder of prompts, or a dataset on the hub such as “org/name”.",
        group="Prompts", max_length=400,
    )  # fmt: skip
    subset: str = option(
        "", "Subset", "Which configuration of a hub dataset. Empty: its only or default one.",
        group="Prompts", advanced=True, max_length=200,
    )  # fmt: skip
    split: str = option(
        "", "Split", "Which part of the dataset, such as “train”. Empty: train, or the only one.",
        group="Prompts", advanced=True, max_length=200,
    )  # fmt: skip
    column: str = option(
        "", "Column", "Which column holds the prompts. Empty: found by the usual names (prompt, question, messages …).",
        group="Prompts", advanced=True, max_length=200,
    )  # fmt: skip
    rows: int | None = option(
        None, "Rows", "Take only the first so many rows. Empty: all of them.",
        unit="rows", group="Prompts", advanced=True, ge=1, le=100_000_000,
    )  # fmt: skip
    shuffle: bool = option(
        True, "Shuffle", "Draw the prompts in an order that the seed gives, instead of the file's own.",
        group="Prompts", advanced=True,
    )  # fmt: skip

    @field_validator("id", "subset", "split", "column")
    @classmethod
    def _strip_and_check_text(cls, value: str) -> str:
        return require_storable(value).strip()


OptionsT = TypeVar("OptionsT", bound=Options)


class SessionConfig(ModelOptions, Adapter, Sampling, Learning):
    """All options of one steering session, flat, by their usual names."""

    context_length: int = option(
        1024, "Context length", "Prompt and answer together; a prompt that leaves no room is refused.",
        unit="tokens", group="Model", ge=64, le=131_072,
    )  # fmt: skip
    chat_template: bool = option(
        True, "Chat template", "Put prompts into the model's chat format. Off for base models, which continue text.",
        group="Prompts", advanced=True,
    )  # fmt: skip
    group_size: int = option(
        4, "Options per prompt", "How many answers stand beside each other.", group="Answers", ge=2, le=8
    )
    openings: int = option(
        1, "Openings", "After “none of these” so many answers are begun for each option that is shown, half of them "
        "by the base model, and those whose first words differ most go on. 3 helps people who sometimes err; 1 shows "
        "plain draws.",
        unit="for each option", group="Answers", advanced=True, later=True, ge=1, le=8,
    )  # fmt: skip
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
    prompt_prefix: str = option(
        "", "Before every prompt", "Text that is put before each prompt.",
        group="Prompts", advanced=True, max_length=20_000,
    )  # fmt: skip
    prompt_suffix: str = option(
        "", "After every prompt", "Text that is put after each prompt.",
        group="Prompts", advanced=True, max_length=20_000,
    )  # fmt: skip
    append_think: bool = option(
        False, "Append <think>", "Begin every answer with a <think> tag, for models that think before they speak.",
        group="Prompts", advanced=True,
    )  # fmt: skip
    enable_thinking: Literal["auto", "on", "off"] = option(
        "auto", "Thinking",
        "Whether a model that can think before it answers does so. “auto” leaves it to the model's chat template; “on” "
        "and “off” need a template that knows such a switch.",
        group="Prompts", advanced=True, later=True,
    )  # fmt: skip
    control_prompt: str = option(
        "Tell me about the sea.", "Control prompt",
        "AnswerDone after every step, so that you see what changed. Empty turns it off.",
        group="Prompts", max_length=20_000,
    )  # fmt: skip
    max_undos: int = option(
        32, "Kept steps", "So many last steps keep their weights on disk. Older ones are worked out again when needed.",
        unit="steps", group="History", advanced=True, ge=1, le=100_000,
    )  # fmt: skip
    checkpoint_interval: int = option(
        8, "Checkpoint interval",
        "Every so many steps the weights stay on disk for good, so that going far back is quick.",
        unit="steps", group="History", advanced=True, ge=1, le=100_000,
    )  # fmt: skip

    @field_validator("system_prompt", "control_prompt", "prompt_prefix", "prompt_suffix")
    @classmethod
    def _check_text(cls, value: str) -> str:
        return require_storable(value)

    def extract(self, kind: type[OptionsT]) -> OptionsT:
        """The options of one part: `config.part(Sampling)`."""
        return kind.model_validate({name: getattr(self, name) for name in kind.model_fields})

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """A whole configuration from a partial one. Raises Invalid with an entry for each bad field."""
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
                (f"leaves no room for a prompt: {self.max_new_tokens} of the context's {self.context_length} tokens."),
            )
        if self.dataset.source != "demo" and not self.dataset.id:
            yield "dataset.id", "is empty. Name a file of prompts or a dataset on the hub."
        if self.enable_thinking != "auto" and not self.chat_template:
            yield (
                "enable_thinking",
                f"is “{self.enable_thinking}”, which needs the chat template. Turn “Chat template” on.",
            )
        if self.enable_thinking == "off" and self.append_think:
            yield "enable_thinking", "is “off”, and “Append <think>” begins a thought. Turn one of them off."
        if self.remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            yield "remote_code", "needs a model on the hub and a revision that is a whole commit (40 hex digits)."


StorableText = Annotated[str, Field(min_length=1, max_length=PROMPT_LIMIT), AfterValidator(require_storable)]
"""A prompt or a written answer as it may be sent."""


def default_learning_rate(parameters: int) -> float:
    """A rate by model size. Adam moves each weight by about the rate, so larger models want a smaller one.

    Measured at 1 to 3 million parameters (docs/learning.md); above, the usual fall with the square root of
    the size, held between 5e-5 and 3e-3. Larger models have not been measured.
    """
    return float(f"{min(3e-3, max(5e-5, 3e-3 * (2.5e6 / max(parameters, 1)) ** 0.5)):.2g}")


def invalid_from(error: ValidationError, prefix: str = "") -> Invalid:
    """Pydantic's findings as the one error shape, each field named with the value that it was given."""
    return invalid_from_details((dict(finding) for finding in error.errors()), prefix)


MAX_REPORTED_ERRORS = 20
"""So many things that are wrong are said at once: a body may be made to have a hundred thousand of them."""


def invalid_from_details(details: Iterable[Mapping[str, Any]], prefix: str = "") -> Invalid:
    """Findings as one error. What several branches of a union say of one field is one sentence."""
    sentences: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    for detail in islice(details, MAX_REPORTED_ERRORS):
        path = ".".join(part for part in (prefix, *_field_path(detail)) if part)
        sentence = _error_sentence(detail, prefix)
        if sentence not in sentences.setdefault(path, []):
            sentences[path].append(sentence)
        values.setdefault(path, _quote_value(detail.get("input")))
    return invalid_from_entries(
        [{"field": path, "message": _join_sentences(sentences[path], values[path])} for path in sentences]
    )


UNION_LOC_PATTERN = re.compile(
    r"[A-Z]\w*|.*[\[(].*|str|int|float|bool|bytes|none|any|tuple|list|dict|set|constrained-\w+|json|tagged-union|"
    r"is-instance|chain|nullable|function-\w+"
)
"""A step of Pydantic's way to a value that names a branch of a union, or a validator, and no field."""


def _field_path(detail: Mapping[str, Any]) -> list[str]:
    """The way to a value in what was sent."""
    steps = list(detail["loc"])
    last = len(steps) - 1
    sent_by_name = detail["type"] == "extra_forbidden"  # whatever it is called, it is a name that was sent
    return [
        shorten(step)
        for place, step in enumerate(steps)
        if not (isinstance(step, str) and UNION_LOC_PATTERN.fullmatch(step)) or (sent_by_name and place == last)
    ]


def _join_sentences(sentences: list[str], value: str) -> str:
    """One sentence of several about the same field: “must be text or a list, got “5”.”"""
    if len(sentences) == 1:
        return sentences[0]
    ending = f", got {value}."
    kinds = [each.removeprefix("must be ").removesuffix(ending) for each in sentences if each.startswith("must be ")]
    if not kinds:
        return sentences[0]
    return f"must be {', '.join(kinds[:-1])}{' or ' if kinds[:-1] else ''}{kinds[-1]}{ending}"


def invalid_from_entries(fields: list[dict[str, str]]) -> Invalid:
    """One error for findings of `{field, message}`."""
    first = fields[0]
    message = f"{first['field'] or 'The request'}: {first['message']}"
    if len(fields) > 1:
        message += f" ({len(fields) - 1} more)"
    return Invalid(message, next_step="Correct the named fields and send again.", field=first["field"], fields=fields)


BOUND_MESSAGES = {
    "greater_than_equal": ("ge", "{} or more"), "less_than_equal": ("le", "{} or less"),
    "greater_than": ("gt", "more than {}"), "less_than": ("lt", "less than {}"), "multiple_of": ("multiple_of",
    "a multiple of {}"),
}  # fmt: skip
TYPE_MESSAGES = {
    "int_parsing": "a whole number", "int_type": "a whole number", "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of a usual size", "float_parsing": "a number", "float_type": "a number",
    "finite_number": "a finite number", "bool_parsing": "on or off", "bool_type": "on or off",
    "string_type": "text", "string_sub_type": "text", "string_unicode": "text", "bytes_type": "text",
    "list_type": "a list", "tuple_type": "a list", "set_type": "a list", "iterable_type": "a list",
    "dict_type": "an object", "model_type": "an object", "model_attributes_type": "an object",
    "mapping_type": "an object", "dataclass_type": "an object", "none_required": "empty",
}  # fmt: skip
LENGTH_MESSAGES = {
    "string_too_long": ("max_length", "must have at most {} characters."),
    "string_too_short": ("min_length", "must have at least {} characters."),
    "too_long": ("max_length", "must have at most {} entries."),
    "too_short": ("min_length", "must have at least {} entries."),
}
"""What Pydantic says for programs, as a form says it to a person."""


def _error_sentence(detail: Mapping[str, Any], prefix: str = "") -> str:
    kind, value = detail["type"], detail.get("input")
    limits = detail.get("ctx") or {}
    got = f", got {_quote_value(value)}."
    if (kind == "string_too_short" and limits.get("min_length") == 1) or (
        kind == "string_pattern_mismatch" and not str(value).strip()
    ):
        return "is empty."
    if kind in BOUND_MESSAGES:
        name, words = BOUND_MESSAGES[kind]
        return f"must be {words.format(limits[name])}{got}"
    if kind in TYPE_MESSAGES:
        return f"must be {TYPE_MESSAGES[kind]}{got}"
    if kind in LENGTH_MESSAGES:
        name, words = LENGTH_MESSAGES[kind]
        return words.format(limits[name])
    if kind in ("literal_error", "enum"):
        return f"must be {_requote(limits['expected'])}{got}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = f" {_requote(limits['expected_tags'])}" if "expected_tags" in limits else " one of the kinds"
        return f"must have{tags} as its {_requote(limits.get('discriminator', 'type'))}."
    if kind == "missing":
        return "is missing."
    if kind == "extra_forbidden":
        options = "is not an option. The options are listed at /api/steering/schema."
        return options if prefix == "config" else "is not a field of this request."
    if kind == "string_pattern_mismatch":
        return f"has characters or a form that it cannot have{got}"
    if kind in ("value_error", "assertion_error"):  # what our own validators say
        message = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
        return f"{message}{got}"
    return f"cannot be used{got}"


def _requote(expected: object) -> str:
    """Pydantic's list of what may be, in our quotes."""
    return re.sub(r"'([^']*)'", r"“\1”", str(expected))


def _quote_value(value: object) -> str:
    """A value as it is quoted: text and numbers as they are, others by what they are in JSON."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "“true”" if value else "“false”"
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a very large number"
    if isinstance(value, str | int | float):
        return f"“{shorten(value)}”"
    if isinstance(value, bytes):
        return f"“{shorten(value[:2000].decode(errors='replace'))}”"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, Mapping) else "something else"


@dataclass(frozen=True)
class Flag:
    """One option as the command line has it."""

    declarations: tuple[str, ...]
    help: str
    type: Any
    default_text: str


def option_rows() -> Iterator[tuple[str, FieldInfo]]:
    """Every option of a session with its name, those of the dataset as `dataset.…`."""
    for name, row in SessionConfig.model_fields.items():
        if name == "dataset":
            for inner, each in Dataset.model_fields.items():
                yield f"dataset.{inner}", each
        else:
            yield name, row


def flag_rows() -> Iterator[tuple[str, Flag]]:
    """Every option of a session as a flag: `lora_rank` is `--lora-rank`, `dataset.id` is `--dataset-id`."""
    for name, row in option_rows():
        flag = name.replace("_", "-").replace(".", "-")
        kinds = {kind for kind in (row.annotation, *get_args(row.annotation)) if isinstance(kind, type)}
        is_switch, is_choice = bool in kinds, get_origin(row.annotation) is Literal
        declaration = f"--{flag}/--no-{flag}" if is_switch else f"--{flag}"
        shown = "automatic" if row.default is None else "" if row.default == "" else str(row.default)
        kind = bool if is_switch else str  # what a value may be is said by the one validation, in the same words
        listed = f" One of: {', '.join(get_args(row.annotation))}." if is_choice else ""
        help = f"{row.description}{listed}"
        yield name, Flag((declaration,), help, kind, shown)


def config_from_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """A partial configuration from what was given on the command line."""
    config: dict[str, Any] = {}
    for name, _ in option_rows():
        value = given.get(name.replace(".", "_"))
        if value is not None:
            outer, _, inner = name.partition(".")
            if inner:
                config.setdefault(outer, {})[inner] = value
            else:
                config[outer] = value
    return config
