"""The wire between the web process and an engine: requests down, events up, and how weights are named.

Every request names all it needs: what an engine holds in memory is only a cache.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, TypeAdapter

from .errors import Invalid, shorten
from .params import Adapter, Device, EngineName, Learning, Precision, Sampling, Text


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


TemplateKwargs = dict[Annotated[str, Field(max_length=100)], StrictBool | StrictInt | StrictFloat | str]
"""Variables that a chat template reads beside the messages: plain values by name."""

MOST_TEMPLATE_KWARGS = 32

RESERVED_TEMPLATE_KWARGS = frozenset({
    "self", "conversation", "conversations", "messages", "tools", "documents", "chat_template", "compiled_template",
    "add_generation_prompt", "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "kwargs",
    "raise_exception", "strftime_now", "namespace", "dict", "range", "loop", "caller", "cycler", "joiner", "lipsum",
    "true", "false", "none", "True", "False", "None",
})  # fmt: skip
"""Names that a chat template's variables may not have: they are arguments of the function that applies it, or part of
the language it is written in. Special tokens, which end in `_token` or `_tokens`, are refused as well."""


def template_kwargs_from(values: Mapping[str, Any]) -> TemplateKwargs:
    """Variables for a chat template from what was sent. Raises Invalid for a name or value that cannot be one."""
    if len(values) > MOST_TEMPLATE_KWARGS:
        raise _not_for_a_template(f"has {len(values)} variables; {MOST_TEMPLATE_KWARGS} are allowed.")
    for name, value in values.items():
        if name in RESERVED_TEMPLATE_KWARGS or name.endswith(("_token", "_tokens")):
            raise _not_for_a_template(f"“{shorten(name)}” is set by the studio and cannot be set from outside.")
        if not name.isidentifier() or name.startswith("_") or len(name) > 100:
            raise _not_for_a_template(f"“{shorten(name)}” is not the name of a variable.")
        if not isinstance(value, bool | int | float | str):
            raise _not_for_a_template(f"“{name}” must be text, a number, true or false, got “{shorten(value)}”.")
    return dict(values)


def _not_for_a_template(message: str) -> Invalid:
    return Invalid(
        f"chat_template_kwargs: {message}",
        field="chat_template_kwargs",
        next_step="Send only variables that the model's chat template reads, such as enable_thinking.",
    )


def later(default: Any) -> Any:
    """A field that came after the first recipes: at its default it is left out of the names of weights."""
    return Field(default, json_schema_extra={"later": True})


# ── What both directions speak of ──────────────────────────────────────────────────────────────────


class Prompt(Message):
    """What the model is asked."""

    text: str
    system: str = ""
    template: bool = later(True)
    """Whether it is put into the model's chat template, where it has one."""
    opening: str = later("")
    """What every answer begins with, after the template."""
    template_kwargs: TemplateKwargs = later({})
    """Variables for the chat template beside the messages, such as `enable_thinking`."""


class Option(Message):
    """One answer, token by token. `logprob` is the sum over `tokens` as it was drawn, in nats."""

    text: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]
    logprob: float = 0.0


class Ranking(Message):
    """Options from best to worst; those not named come after all of them."""

    ranking: tuple[StrictInt, ...] = Field(min_length=1, max_length=8)


class Written(Message):
    """An answer that the person wrote or repaired."""

    written: Text


Choice = (
    StrictInt
    | Annotated[tuple[StrictInt, ...], Field(min_length=1, max_length=8)]
    | Literal["none", "skip"]
    | Ranking
    | Written
)
"""What a person said of an offer: one option, several good ones, none, skip, a ranking, or an answer of their own."""

CHOICE: TypeAdapter[Choice] = TypeAdapter(Choice)


class Lesson(Message):
    """One choice as it is learned from: the prompt, the options that were shown, what was said of them."""

    prompt: Prompt
    options: tuple[Option, ...]
    choice: Choice
    temperature: float


# ── Down: requests ─────────────────────────────────────────────────────────────────────────────────


class Load(Message):
    """Load a model folder (safetensors with a Hugging Face config), or the files of a repository on the hub.

    With `repository`, `path` is the folder that downloads are kept in.
    """

    type: Literal["load"] = "load"
    path: str
    repository: str = ""
    revision: str = ""
    precision: Precision = "auto"
    device: Device = "auto"
    engine: EngineName = "transformers"
    remote_code: bool = False
    fetches: bool = True
    """Whether the hub may be asked; else the files that are here are used as they are."""


class Plant(Message):
    """Make the weights a session starts from: an adapter that changes nothing yet."""

    type: Literal["plant"] = "plant"
    adapter: Adapter
    seed: int
    root: str = later("")
    """The weights that a session began with: made under this name on a model that an older version knew otherwise."""

    def makes(self, fingerprint: str) -> str:
        """The id of the weights on a model with this fingerprint."""
        return recipe_id("w", {"model": fingerprint, **recipe_of(self.model_copy(update={"root": ""}))})

    def makes_on(self, fingerprints: Sequence[str]) -> str:
        """The id on a model that goes by several fingerprints: `root` where one of them leads to it, else the first."""
        made = [self.makes(fingerprint) for fingerprint in fingerprints]
        return self.root if self.root in made else made[0]


class Merge(Message):
    """Merge an adapter into a freshly loaded base in its own precision, write it, and prove it (docs/export.md).

    `root` and `plant` name what the adapter grew from: another base than that one is refused.
    """

    type: Literal["merge"] = "merge"
    path: str
    weights: str
    into: str
    root: str
    plant: Plant
    probes: tuple[Prompt, ...] = Field(max_length=32)
    remote_code: bool = False


class Offer(Message):
    """Draw a group of answers. Pure: the same request gives the same answers.

    With several `openings`, so many answers are begun for each that is shown, half of them by the base model, and those
    that differ most go on.
    """

    type: Literal["offer"] = "offer"
    weights: str
    prompt: Prompt
    sampling: Sampling
    group_size: int
    openings: int = 1
    seed: int
    context_length: int


class Learn(Message):
    """Make new weights from one choice, with some earlier ones replayed. Pure: named by its own content.

    Unless they are to be kept, the weights are in the engine's memory alone, as long as there is room; asked again to
    keep them, it writes them. Weights that are not there any more are made again.
    """

    type: Literal["learn"] = "learn"
    weights: str
    lesson: Lesson
    replay: tuple[Lesson, ...] = ()
    learning: Learning
    context_length: int
    keep: bool = True

    def makes(self) -> str:
        """The id of the weights that this request makes, known before they are computed."""
        recipe = recipe_of(self)
        del recipe["keep"]  # where weights lie does not change what they are
        return recipe_id("w", recipe)


class Fit(Message):
    """Train weights on a whole log of choices: several passes over it in shuffled batches. Pure, as `Learn` is.

    `log` names the log by its content; `path` is the folder that it lies in, with a `Lesson` a line.
    """

    type: Literal["fit"] = "fit"
    weights: str
    log: str
    path: str
    learning: Learning
    epochs: int
    seed: int
    context_length: int

    def makes(self) -> str:
        """The id of the weights that this request makes, known before they are computed."""
        recipe = recipe_of(self)
        del recipe["path"]  # where a log lies does not change what it teaches
        return recipe_id("w", recipe)


class Assess(Message):
    """Ask how many of some choices weights agree with: whether they would choose the same."""

    type: Literal["assess"] = "assess"
    weights: str
    lessons: tuple[Lesson, ...] = Field(max_length=32)
    learning: Learning
    context_length: int


class Turn(Message):
    """What one side said in a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str
    pictures: tuple[str, ...] = ()
    """As `data:` addresses; for models elsewhere alone."""


class Chat(Message):
    """Answer a conversation, or go on with a text where there are no turns.

    Many at once share batches, which makes their last bits depend on who else is there: unlike an offer, the same
    request gives nearly the same answer, and is not named. `weights` may be empty, which is the base model. A last turn
    of the assistant is gone on with. With `trims`, the oldest turns are left out where they do not all fit.
    """

    type: Literal["chat"] = "chat"
    turns: tuple[Turn, ...] = ()
    text: str = ""
    weights: str = ""
    sampling: Sampling
    seed: int
    stop: tuple[str, ...] = ()
    top: int | None = None
    """So many of the likeliest tokens are told beside each that is drawn, with their log-probabilities."""
    top_k: int = 0
    """Only so many of the likeliest tokens are drawn from; 0 for all."""
    repetition_penalty: float = 1.0
    """What was read or said before is less likely by this factor (CTRL, arXiv 1909.05858); 1 changes nothing."""
    min_tokens: int = 0
    """Before so many tokens the answer neither ends by itself nor at one of `stop`."""
    trims: bool = False
    template_kwargs: TemplateKwargs = Field(default={})
    """Variables for the chat template beside the messages, such as `enable_thinking`."""
    template: bool = True
    """Whether the conversation is put into the model's chat template, where it has one."""


class Status(Message):
    """Ask what is loaded and how much memory it takes."""

    type: Literal["status"] = "status"


class Cancel(Message):
    """Stop a request at its next step."""

    type: Literal["cancel"] = "cancel"
    request: int


class Urge(Message):
    """Give a request that is waiting or under way another priority."""

    type: Literal["urge"] = "urge"
    request: int
    priority: int


Request = Load | Plant | Offer | Learn | Fit | Assess | Merge | Chat | Status


class Down(Message):
    """A frame from the web process: a request with its number; a lower priority number goes first."""

    id: int
    priority: int = 0
    owner: str = ""
    """For whom it is: the requests of several owners take turns."""
    goes_on: bool = False
    """Whether it is the second half of what its owner has just had a turn for."""
    body: Annotated[Request | Cancel | Urge, Field(discriminator="type")]


# ── Up: events ─────────────────────────────────────────────────────────────────────────────────────

Stage = Literal["connecting", "initializing", "downloading", "reading", "parsing", "quantizing", "placing",
                "warming_up", "regrowing", "fitting", "merging", "writing", "checking", "ready"]  # fmt: skip


class Progress(Message):
    """How far long work has come. `fraction` is of the whole; bytes and rate are of this stage, as measured."""

    type: Literal["progress"] = "progress"
    stage: Stage
    fraction: float
    message: str
    bytes: int | None = None
    total_bytes: int | None = None
    rate: float | None = None
    seconds_left: float | None = None


class Queued(Message):
    """Others are being worked for. `place` is 1 for who is next."""

    type: Literal["queued"] = "queued"
    place: int


class Loaded(Message):
    type: Literal["loaded"] = "loaded"
    fingerprint: str
    former_fingerprint: str = ""
    """What older versions called the same model: sessions that began with it go on."""
    parameters: int
    architecture: str
    device: str
    dtype: str
    bytes: int
    seconds: float
    has_template: bool = True
    template_problem: str = ""
    """Why the model's chat template cannot be used, where that is so."""
    can_switch_thinking: bool = False
    """Whether the chat template has a variable that turns thinking on and off."""
    positions: int | None = None
    lanes: int = 1
    """How many requests the engine works on at once."""


class Merged(Message):
    """What a merge wrote, and how far its answers are from those of base and adapter.

    The differences are between log-probabilities of answer tokens in nats: the largest one and the mean. `ends` are the
    tokens at which base and merged model end an answer; `conversations` is how many both write in the same words.
    """

    type: Literal["merged"] = "merged"
    files: dict[str, int]
    dtype: str
    tokens: int
    largest_difference: float
    mean_difference: float
    agreement: float
    seconds: float
    ends: tuple[int, ...] = ()
    conversations: int = 0


class Planted(Message):
    """The weights that a session starts from. `left_out` are layers that were asked for and cannot get an adapter, each
    with the reason."""

    type: Literal["planted"] = "planted"
    weights: str
    left_out: tuple[str, ...] = ()


class Delta(Message):
    """Text that some options grew by since the last delta."""

    type: Literal["delta"] = "delta"
    texts: dict[int, str]


class Offered(Message):
    type: Literal["offered"] = "offered"
    options: tuple[Option, ...]
    prompt_tokens: int
    seconds_to_first: float
    seconds: float
    overflowed: tuple[int, ...] = ()
    """Options that were cut short because the model gave no numbers for their next token."""


class Metrics(Message):
    """What one choice did. Shares are of the choice model with its outside option (docs/learning.md)."""

    loss: float
    kl: float
    share_before: float
    share_after: float
    drift: float
    inner_steps: int
    seconds: float
    fluency: float | None = None
    """Log-probability per token that the base model gives to the options that were shown, in nats."""
    variety: float | None = None
    """How different the options that were shown are, 0 to 1 (engine/vitals.py)."""
    agreed: int | None = None
    """With how many of the branch's last `agreed_of` choices the new weights agree; told after the click."""
    agreed_of: int | None = None
    left_out: int | None = None
    """Choices of a log that were too long for the context, and were not learned from."""


class Learned(Message):
    type: Literal["learned"] = "learned"
    weights: str
    metrics: Metrics


class Assessed(Message):
    """With how many of the choices the weights agree, of how many."""

    type: Literal["assessed"] = "assessed"
    agreed: int
    of: int


class Heard(Message):
    """How much of a conversation has been read. `warm` tokens of it were known from before; `left_out` turns did not
    fit."""

    type: Literal["heard"] = "heard"
    read: int
    prompt_tokens: int
    warm: int
    left_out: int
    context_length: int
    in_thought: bool = False
    """Whether the chat template has opened a thought, in which the answer begins."""


class Drawn(Message):
    """One token of an answer, with its log-probability and those of the likeliest, in nats."""

    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[tuple[str, tuple[int, ...], float], ...] = ()


class Spoke(Message):
    """Text that an answer grew by, and how many tokens it has now."""

    type: Literal["spoke"] = "spoke"
    text: str
    tokens: int
    drawn: tuple[Drawn, ...] = ()


class Answered(Message):
    """An answer is whole. Seconds are counted from when the engine was asked."""

    type: Literal["answered"] = "answered"
    finish: Literal["stop", "length"]
    tokens: int
    prompt_tokens: int
    seconds_to_first: float
    seconds: float


class StatusReport(Message):
    type: Literal["status_report"] = "status_report"
    model: str | None
    resident_bytes: int
    device_bytes: int | None = None


class Cancelled(Message):
    type: Literal["cancelled"] = "cancelled"


class Failed(Message):
    """The request ended with an error that a person can be shown."""

    type: Literal["failed"] = "failed"
    code: str
    message: str
    next_step: str
    field: str | None = None
    details: dict[str, Any] = {}


Event = (
    Progress
    | Queued
    | Loaded
    | Planted
    | Merged
    | Delta
    | Offered
    | Learned
    | Assessed
    | Heard
    | Spoke
    | Answered
    | StatusReport
    | Cancelled
    | Failed
)


class Up(Message):
    """A frame from the engine. The last one of a request is marked."""

    id: int
    last: bool
    body: Annotated[Event, Field(discriminator="type")]


# ── Names ──────────────────────────────────────────────────────────────────────────────────────────


def recipe_of(message: BaseModel) -> dict[str, Any]:
    """A message as a recipe: its JSON without what is None, and without later fields that stand at their default.

    Names outlive versions: a field that is added must leave the names of what was made without it as they were.
    """
    recipe = message.model_dump(mode="json", exclude_none=True)
    for name, field in type(message).model_fields.items():
        value = getattr(message, name)
        about = field.json_schema_extra
        if isinstance(about, dict) and about.get("later") and value == field.default:
            recipe.pop(name, None)
        elif isinstance(value, BaseModel):
            recipe[name] = recipe_of(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            recipe[name] = [recipe_of(each) for each in value]
    return recipe


def recipe_id(kind: str, recipe: Any) -> str:
    """A short name for what a recipe makes: 128 bits of SHA-256 over its canonical JSON."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{kind}{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def derived_seed(*parts: str | int) -> int:
    """A 63-bit seed from what an offer depends on, never from global state."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# ── Frames ─────────────────────────────────────────────────────────────────────────────────────────

HEADER = struct.Struct(">I")
"""A frame is its length in four bytes, then the JSON of a Down or an Up."""

MAX_FRAME = 64 * 1024 * 1024

LOG_FILE = "lessons.jsonl"
"""What the folder of a log holds."""


def frame(message: Message) -> bytes:
    body = message.model_dump_json().encode()
    if len(body) > MAX_FRAME:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """The length that a header announces. Raises ValueError before anything of that size is allocated."""
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME:
        raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME}")
    return int(length)
