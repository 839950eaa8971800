"""What one conversation of a batch consists of: the request, its tokens, and its slot while the answer is generated."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from ...errors import Invalid
from ...messages import Chat
from .answer_text import AnswerText
from .kv_cache import CachedSequence

RESERVED_ANSWER_TOKENS = 1024
"""Lower bound on the answer tokens that memory is reserved for; few answers reach their maximum."""


MAX_INLINE_CHARACTERS = 10_000
"""Longer conversations are tokenized on another thread while the batch continues."""


TURN_OVERHEAD = 64
"""Characters counted per turn in addition to its text, for what a template adds."""


@dataclass(frozen=True)
class PreparedChat:
    """A conversation as tokens. `context_length` limits prompt and answer together, `max_new_tokens` the answer."""

    tokens: list[int]
    left_out: int
    context_length: int
    max_new_tokens: int
    stop: tuple[str, ...]
    in_thinking: bool = False
    """Whether the chat template opened a thinking block, in which the answer begins."""


class ChatModel(Protocol):
    """What a batch needs of a loaded model besides its sequence cache."""

    tokenizer: Any
    end_tokens: frozenset[int]

    def prepare_chat(self, request: Chat) -> PreparedChat:
        """Tokenize a conversation. Raises Invalid if it does not fit."""


@dataclass(frozen=True)
class PendingChat:
    """A conversation that has arrived and is not tokenized yet."""

    number: int
    owner: str
    request: Chat
    arrived: float

    @property
    def is_long(self) -> bool:
        turns = self.request.turns
        return len(self.request.text) + sum(TURN_OVERHEAD + len(turn.text) for turn in turns) > MAX_INLINE_CHARACTERS


@dataclass(eq=False)
class ChatSlot:
    """One conversation in the batch, or waiting for it."""

    number: int
    owner: str
    request: Chat
    arrived: float
    prepared: PreparedChat
    answer: AnswerText
    rng: random.Random
    queue_position: int | None = None
    sequence: CachedSequence | None = None
    cached_tokens: int = 0
    answer_tokens: int = 0
    """Number of tokens in the answer."""
    next_token: int | None = None
    """The token that was sampled and not read yet."""
    seconds_to_first: float = 0.0
    finish: Literal["stop", "length"] | None = None
    seen_tokens: Tensor | None = None
    """Mask (V,) of the tokens read or sampled, if repetition is penalized."""

    @property
    def is_prefilling(self) -> bool:
        return self.sequence is not None and self.next_token is None and self.finish is None

    @property
    def max_tokens(self) -> int:
        """Expected maximum length of prompt and answer in tokens."""
        longest = max(min(self.prepared.max_new_tokens, RESERVED_ANSWER_TOKENS), self.answer_tokens)
        return min(self.prepared.context_length, len(self.prepared.tokens) + longest)


def conversation_too_long(tokens: int, limit: int, at_least: bool = False) -> Invalid:
    counted = f"at least {tokens}" if at_least else str(tokens)
    return Invalid(
        f"The conversation has {counted} tokens; with room for an answer it does not fit into the context of {limit}.",
        code="prompt_too_long",
        field="messages",
        next_step="Shorten the last message, or use a model with a longer context.",
    )
