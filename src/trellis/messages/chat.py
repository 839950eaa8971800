"""Chat messages: a conversation, and the events of its answer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..options import Sampling
from .message import Message
from .template_kwargs import TemplateKwargs


class Turn(Message):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str
    pictures: tuple[str, ...] = ()
    """As `data:` URLs; only providers receive them."""


class Chat(Message):
    """Answer a conversation, or continue `text` if there are no turns.

    Requests are batched, so the last bits depend on what else is in the batch. Unlike an offer, the same request gives
    only nearly the same answer, and the result has no id. Empty `weights` mean the base model. If the last turn is the
    assistant's, it is continued. With `trims`, the oldest turns are dropped when the conversation does not fit.
    """

    type: Literal["chat"] = "chat"
    turns: tuple[Turn, ...] = ()
    text: str = ""
    weights: str = ""
    sampling: Sampling
    seed: int
    stop: tuple[str, ...] = ()
    top: int | None = None
    """Report this many of the likeliest tokens, with log-probabilities, beside each sampled token."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0 means all."""
    repetition_penalty: float = 1.0
    """Penalty for tokens already in the prompt or the answer (CTRL, arXiv 1909.05858); 1 disables it."""
    min_tokens: int = 0
    """The answer ends neither by an end token nor at one of `stop` before this many tokens."""
    trims: bool = False
    template_kwargs: TemplateKwargs = Field(default={})
    """Variables for the chat template in addition to the messages, such as `enable_thinking`."""
    template: bool = True
    """Apply the model's chat template, if it has one."""


class PromptRead(Message):
    """Progress of the prefill. `warm` tokens came from the prefix cache; `left_out` turns did not fit."""

    type: Literal["heard"] = "heard"
    read: int
    prompt_tokens: int
    warm: int
    left_out: int
    context_length: int
    in_thought: bool = False
    """Whether the chat template opened a thinking block, so that the answer begins inside it."""


class SampledToken(Message):
    """One token of an answer, with its log-probability and those of the likeliest tokens, in nats."""

    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[tuple[str, tuple[int, ...], float], ...] = ()


class TextDelta(Message):
    """Text appended to an answer, and the number of its tokens so far."""

    type: Literal["spoke"] = "spoke"
    text: str
    tokens: int
    drawn: tuple[SampledToken, ...] = ()


class AnswerDone(Message):
    """The answer is complete. Seconds are counted from the arrival of the request."""

    type: Literal["answered"] = "answered"
    finish: Literal["stop", "length"]
    tokens: int
    prompt_tokens: int
    seconds_to_first: float
    seconds: float
