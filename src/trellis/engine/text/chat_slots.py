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
"""Tokens of an answer that room is kept for at least; few answers are as long as they may be."""


MAX_INLINE_CHARACTERS = 10_000
"""Characters of a conversation that is made ready within a step; a longer one is tokenized on a thread of its own,
while the others go on."""


TURN_OVERHEAD = 64
"""Characters that a turn counts as beside its text, for what a template makes of it."""


@dataclass(frozen=True)
class PreparedChat:
    """A conversation as tokens. `limit` is how many there may be with the answer, `most` how long that may be."""

    tokens: list[int]
    left_out: int
    context_length: int
    max_new_tokens: int
    stop: tuple[str, ...]
    in_thinking: bool = False
    """Whether the answer begins in a thought that the chat template has opened."""


class ChatModel(Protocol):
    """What a batch needs of a loaded model beside its lines."""

    tokenizer: Any
    end_tokens: frozenset[int]

    def prepare_chat(self, request: Chat) -> PreparedChat:
        """A conversation made ready. Raises Invalid for one that does not fit."""


@dataclass(frozen=True)
class PendingChat:
    """A conversation that has come and is not made ready yet."""

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
    """One conversation in the batch, or on its way there."""

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
    """Tokens of the answer."""
    next_token: int | None = None
    """The token that was drawn and is not read yet."""
    seconds_to_first: float = 0.0
    finish: Literal["stop", "length"] | None = None
    seen_tokens: Tensor | None = None
    """Which tokens (V,) have been read or drawn, where repeating them is penalized."""

    @property
    def is_prefilling(self) -> bool:
        return self.sequence is not None and self.next_token is None and self.finish is None

    @property
    def max_tokens(self) -> int:
        """So many tokens, as far as can be told."""
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
