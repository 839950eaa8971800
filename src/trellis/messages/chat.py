"""Messages of chat: a conversation, and its answer as it grows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..options import Sampling
from .message import Message
from .template_kwargs import TemplateKwargs


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


class PromptRead(Message):
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


class SampledToken(Message):
    """One token of an answer, with its log-probability and those of the likeliest, in nats."""

    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[tuple[str, tuple[int, ...], float], ...] = ()


class TextDelta(Message):
    """Text that an answer grew by, and how many tokens it has now."""

    type: Literal["spoke"] = "spoke"
    text: str
    tokens: int
    drawn: tuple[SampledToken, ...] = ()


class AnswerDone(Message):
    """An answer is whole. Seconds are counted from when the engine was asked."""

    type: Literal["answered"] = "answered"
    finish: Literal["stop", "length"]
    tokens: int
    prompt_tokens: int
    seconds_to_first: float
    seconds: float
