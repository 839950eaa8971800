"""Every option of a session, once: name, default, bounds, label, help and unit.

The form, the command line, the API's schema and the validation all follow from these rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from .errors import Invalid, shorten
from .text_rules import PROMPT_LIMIT, plain_number, require_storable

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


class TypedNumbers(BaseModel):
    """A model whose numbers may be given as people type them: with a decimal comma or groups of thousands."""

    @field_validator("*", mode="before")
    @classmethod
    def _number_as_people_write_it(cls, value: Any, about: ValidationInfo) -> Any:
        kinds = get_args(row := cls.model_fields[str(about.field_name)].annotation) or (row,)
        return plain_number(value, whole=int in kinds) if isinstance(value, str) and {int, float} & {*kinds} else value


class Options(TypedNumbers):
    """A frozen set of options; unknown names and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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


class Sampling(Options):
    """How an answer is drawn from the model."""

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


OptionsT = TypeVar("OptionsT", bound=Options)


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
        Dataset(),
        "Prompts",
        "The prompts to steer on, in an order set by the seed.",
        group="Prompts",
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
    return Invalid(message, next_step="Fix the highlighted fields.", field=first["field"], fields=fields)


BOUND_MESSAGES = {
    "greater_than_equal": ("ge", "{} or more"), "less_than_equal": ("le", "{} or less"),
    "greater_than": ("gt", "more than {}"), "less_than": ("lt", "less than {}"), "multiple_of": ("multiple_of",
    "a multiple of {}"),
}  # fmt: skip
TYPE_MESSAGES = {
    "int_parsing": "a whole number", "int_type": "a whole number", "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number", "float_parsing": "a number", "float_type": "a number",
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
        return f"must be {words.format(_limit(limits[name]))}{got}"
    if kind in TYPE_MESSAGES:
        return f"must be {TYPE_MESSAGES[kind]}{got}"
    if kind in LENGTH_MESSAGES:
        name, words = LENGTH_MESSAGES[kind]
        return words.format(_limit(limits[name]))
    if kind in ("literal_error", "enum"):
        return f"must be {_requote(limits['expected'])}{got}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = f" {_requote(limits['expected_tags'])}" if "expected_tags" in limits else " one of the kinds"
        return f"must have{tags} as its {_requote(limits.get('discriminator', 'type'))}."
    if kind == "missing":
        return "is required."
    if kind == "extra_forbidden":
        options = "is not an option. See /api/steering/schema for all options."
        return options if prefix == "config" else "is not a field of this request."
    if kind == "string_pattern_mismatch":
        return f"contains invalid characters{got}"
    if kind in ("value_error", "assertion_error"):  # what our own validators say
        message = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
        return f"{message}{got}"
    return f"is not valid{got}"


def _limit(value: object) -> str:
    """`5` and `20,000`, whether whole or not."""
    return f"{value:,.15g}" if isinstance(value, int | float) else str(value)


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
