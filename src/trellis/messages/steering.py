"""Steering messages: offers, choices, and learning from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, StrictInt, TypeAdapter

from ..options import Adapter, Learning, Sampling, StorableText
from .message import Message, added_later, recipe_id, recipe_of
from .template_kwargs import TemplateKwargs


class Prompt(Message):
    """A prompt for the model."""

    text: str
    system: str = ""
    template: bool = added_later(True)
    """Whether the model's chat template is applied, if it has one."""
    opening: str = added_later("")
    """The fixed beginning of every answer, after the template."""
    template_kwargs: TemplateKwargs = added_later({})
    """Variables for the chat template in addition to the messages, such as `enable_thinking`."""


class Option(Message):
    """One answer. `logprob` is the sum over `tokens` at sampling time, in nats."""

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
"""What the person chose in an offer: one option, several, a ranking, none, skip, or a written answer."""


CHOICE: TypeAdapter[Choice] = TypeAdapter(Choice)


class Lesson(Message):
    """One choice as it is learned: the prompt, the options shown, and the choice."""

    prompt: Prompt
    options: tuple[Option, ...]
    choice: Choice
    temperature: float


LOG_FILE = "lessons.jsonl"
"""The file in the folder of a choice log."""


class CreateAdapter(Message):
    """Create the weights a session starts from: an adapter that changes nothing yet."""

    type: Literal["plant"] = "plant"
    adapter: Adapter
    seed: int
    root: str = added_later("")
    """The initial weights of the session: the id to keep if an older version knew the model by another fingerprint."""

    def weights_id(self, fingerprint: str) -> str:
        """Return the id of the weights on a model with this fingerprint."""
        return recipe_id("w", {"model": fingerprint, **recipe_of(self.model_copy(update={"root": ""}))})

    def weights_id_on(self, fingerprints: Sequence[str]) -> str:
        """Return the id on a model with several fingerprints: `root` if one of them leads to it, else the first."""
        made = [self.weights_id(fingerprint) for fingerprint in fingerprints]
        return self.root if self.root in made else made[0]


class Offer(Message):
    """Generate a group of answers. Pure: the same request gives the same answers.

    With `openings` > 1, that many answers are begun for each option, half of them by the base model, and the most
    different ones are continued.
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
    """Make new weights from one choice, replaying some earlier ones. Pure: the id follows from the content.

    Without `keep`, the weights stay in the engine's memory as long as there is room. Asking again with `keep` saves
    them; weights that are gone are computed again.
    """

    type: Literal["learn"] = "learn"
    weights: str
    lesson: Lesson
    replay: tuple[Lesson, ...] = ()
    learning: Learning
    context_length: int
    keep: bool = True

    def weights_id(self) -> str:
        """Return the id of the weights this request makes, known before they are computed."""
        recipe = recipe_of(self)
        del recipe["keep"]  # where weights are stored does not change them
        return recipe_id("w", recipe)


class Retrain(Message):
    """Train weights on a whole choice log: several epochs in shuffled batches. Pure, like `Learn`.

    `log` identifies the log by its content; `path` is its folder, with one `Lesson` per line.
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
        """Return the id of the weights this request makes, known before they are computed."""
        recipe = recipe_of(self)
        del recipe["path"]  # where a log is stored does not change what it teaches
        return recipe_id("w", recipe)


class Assess(Message):
    """Ask with how many of some choices the weights agree, that is, would choose the same."""

    type: Literal["assess"] = "assess"
    weights: str
    lessons: tuple[Lesson, ...] = Field(max_length=32)
    learning: Learning
    context_length: int


class AdapterCreated(Message):
    """The weights a session starts from. `left_out` are requested layers that cannot get an adapter, with the
    reasons."""

    type: Literal["planted"] = "planted"
    weights: str
    left_out: tuple[str, ...] = ()


class Delta(Message):
    """Text appended to options since the last delta, by option index."""

    type: Literal["delta"] = "delta"
    texts: dict[int, str]


class Offered(Message):
    type: Literal["offered"] = "offered"
    options: tuple[Option, ...]
    prompt_tokens: int
    seconds_to_first: float
    seconds: float
    overflowed: tuple[int, ...] = ()
    """Options cut short because the logits of their next token were not finite."""


class Metrics(Message):
    """Measurements of one learning request. Shares are of the choice model with its outside option
    (docs/learning.md)."""

    loss: float
    kl: float
    share_before: float
    share_after: float
    drift: float
    inner_steps: int
    seconds: float
    fluency: float | None = None
    """Log-probability per token that the base model gives to the options shown, in nats."""
    variety: float | None = None
    """How different the options shown are, 0 to 1 (engine/text/quality_metrics.py)."""
    agreed: int | None = None
    """With how many of the branch's last `agreed_of` choices the new weights agree; measured after the click."""
    agreed_of: int | None = None
    left_out: int | None = None
    """Choices of a log that were too long for the context and were not learned."""


class Learned(Message):
    type: Literal["learned"] = "learned"
    weights: str
    metrics: Metrics


class Assessed(Message):
    """With how many of the choices the weights agree, out of `of`."""

    type: Literal["assessed"] = "assessed"
    agreed: int
    of: int
