"""Messages of steering: offers, choices, and what is learned from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, StrictInt, TypeAdapter

from ..options import Adapter, Learning, Sampling, StorableText
from .message import Message, added_later, recipe_id, recipe_of
from .template_kwargs import TemplateKwargs


class Prompt(Message):
    """What the model is asked."""

    text: str
    system: str = ""
    template: bool = added_later(True)
    """Whether it is put into the model's chat template, where it has one."""
    opening: str = added_later("")
    """What every answer begins with, after the template."""
    template_kwargs: TemplateKwargs = added_later({})
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

    written: StorableText


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


LOG_FILE = "lessons.jsonl"
"""What the folder of a log holds."""


class CreateAdapter(Message):
    """Make the weights a session starts from: an adapter that changes nothing yet."""

    type: Literal["plant"] = "plant"
    adapter: Adapter
    seed: int
    root: str = added_later("")
    """The weights that a session began with: made under this name on a model that an older version knew otherwise."""

    def weights_id(self, fingerprint: str) -> str:
        """The id of the weights on a model with this fingerprint."""
        return recipe_id("w", {"model": fingerprint, **recipe_of(self.model_copy(update={"root": ""}))})

    def weights_id_on(self, fingerprints: Sequence[str]) -> str:
        """The id on a model that goes by several fingerprints: `root` where one of them leads to it, else the first."""
        made = [self.weights_id(fingerprint) for fingerprint in fingerprints]
        return self.root if self.root in made else made[0]


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

    def weights_id(self) -> str:
        """The id of the weights that this request makes, known before they are computed."""
        recipe = recipe_of(self)
        del recipe["keep"]  # where weights lie does not change what they are
        return recipe_id("w", recipe)


class Retrain(Message):
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

    def weights_id(self) -> str:
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


class AdapterCreated(Message):
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
    """How different the options that were shown are, 0 to 1 (engine/text/quality_metrics.py)."""
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
