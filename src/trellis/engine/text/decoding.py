"""Group generation: the prompt is read once, then all options grow together, one token a step.

It knows rows that grow and a tokenizer; not models, weights, sessions or learning.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...params import OPENING_POSITIONS, Sampling
from .group_forward import Forward, Rows
from .quality_metrics import grams_of, overlap_of
from .sampling import draw, is_greedy, overflowed, uniforms
from .vocabulary import TextReader

OPENING = 6
"""So many tokens of an answer are drawn before it is known which answers go on."""


class Growing:
    """One option while it is drawn. Its text is read from its tokens when somebody asks for it, as what goes on from
    the prompt's. One whose next token has no probability ends before it, with `overflowed`."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.logprob = 0.0
        self.finish: Literal["stop", "length"] | None = None
        self.overflowed = False
        self._text = ""
        self._unread: list[int] = []
        self._reader = TextReader(tokenizer, prompt)

    @property
    def text(self) -> str:
        if self._unread:
            self._text += self._reader.read(self._unread)
            self._unread = []
        if self.finish:
            self._text += self._reader.rest()
        return self._text

    def grow(self, token: int, logprob: float, ends: frozenset[int], most: int) -> None:
        """Go on with a token, unless it has ended."""
        if self.finish:
            return
        if math.isnan(logprob):
            self.finish, self.overflowed = "length", True
            return
        self.tokens.append(token)
        self.logprob += logprob
        if token in ends:
            self.finish = "stop"
            return
        self._unread.append(token)
        if len(self.tokens) == most:
            self.finish = "length"


def decode_group(
    forward: Forward,
    tokenizer: Any,
    prompt: list[int],
    ends: frozenset[int],
    sampling: Sampling,
    size: int,
    seed: int,
    openings: int = 1,
) -> Iterator[list[Growing]]:
    """Draw `size` answers to one prompt. Yields the same list after every step, one token further.

    Log-probabilities are of the drawn tokens, in fp32, from the logits over the temperature, before any
    word was filtered out. The same arguments give the same answers: the random numbers are its own.

    With several `openings`, so many answers are begun for each of them, half by the base model, and those that differ
    most go on: what the adapted model no longer says has its chance again. Until it is known which ones go on, the
    answers are empty.
    """
    generator = torch.Generator().manual_seed(seed)
    most = sampling.max_new_tokens
    group = [Growing(tokenizer, prompt) for _ in range(size)]
    if is_greedy(sampling):
        openings = 1  # they would all be the same
    openings = max(1, min(openings, OPENING_POSITIONS // (size * len(prompt))))
    drawn: Tensor | None = None
    if openings == 1:
        rows = forward.rows(prompt, size, len(prompt) + most)
    else:
        rows, begun, scores = yield from _begin(
            forward, prompt, ends, sampling, size, openings, generator, waiting=group
        )
        for option, opening, scored in zip(group, begun, scores, strict=True):
            for token, score in zip(opening, scored, strict=True):
                option.grow(token, score, ends, most)
        drawn = torch.tensor([opening[-1] for opening in begun], device=forward.device)
        yield group
    if all(option.finish for option in group):
        return
    chances = uniforms(most, size, generator, forward.device)
    for steps in rows.draws(sampling, chances, drawn):
        for tokens, logprobs in steps:
            for option, token, logprob in zip(group, tokens, logprobs, strict=True):
                option.grow(token, logprob, ends, most)
            yield group
            if all(option.finish for option in group):
                return


def _begin(
    forward: Forward, prompt: list[int], ends: frozenset[int], sampling: Sampling, size: int, openings: int,
    generator: torch.Generator, waiting: list[Growing],
) -> Generator[list[Growing], None, tuple[Rows, list[list[int]], list[list[float]]]]:  # fmt: skip
    """Begin more answers than are wanted, half of them by the base model, and choose which go on: their rows under the
    adapted weights, with the last token of each still to be fed, their tokens, and the log-probabilities of these.
    One that the model gives no numbers for is not among them. Raises EngineError where too few are left."""
    total = size * openings
    half = -(-total // 2)
    room = len(prompt) + sampling.max_new_tokens
    own = forward.rows(prompt, half, room)
    other = forward.rows(prompt, total - half, room, base=True)
    begun: list[list[int]] = [[] for _ in range(total)]
    lost: set[int] = set()
    drawn: Tensor | None = None
    length = min(OPENING, sampling.max_new_tokens)
    for chances in uniforms(length, total, generator, forward.device):
        if drawn is not None:
            yield waiting
            own.feed(drawn[:half, None])
            other.feed(drawn[half:, None])
        with torch.inference_mode():
            drawn, scores = draw(torch.cat([own.logits, other.logits]), sampling, chances)
        lost |= {row for row, score in enumerate(scores.tolist()) if math.isnan(score)}
        for opening, token in zip(begun, drawn.tolist(), strict=True):
            if not opening or opening[-1] not in ends:
                opening.append(token)
        if all(opening[-1] in ends for opening in begun):
            break
    # By turns, so that where nothing is alike neither model's come first.
    by_turns = [begun[row] for row in sorted(range(total), key=lambda row: row % half) if row not in lost]
    if len(by_turns) < size:
        raise overflowed()
    kept = [by_turns[place] for place in most_different(by_turns, size)]
    # What the base began goes on under the adapted weights, and is told by their log-probabilities.
    rows = own.again(size)
    width = max(map(len, kept))
    ids = torch.tensor([opening + [0] * (width - len(opening)) for opening in kept], device=forward.device)
    logits = rows.logits[:, None]
    if width > 1:
        logits = torch.cat([logits, rows.feed(ids[:, :-1])], dim=1)
    told = torch.log_softmax(logits.float() / sampling.temperature, dim=-1).gather(-1, ids[:, :, None])[..., 0]
    return rows, kept, [line[: len(opening)] for opening, line in zip(kept, told.tolist(), strict=True)]


def most_different(openings: list[list[int]], size: int) -> list[int]:
    """Which of some openings go on: the first, then always the one that is least like those taken before it
    (farthest-point selection, Gonzalez 1985), by the overlap of their pairs of neighbouring tokens."""
    grams = [grams_of(opening) for opening in openings]
    kept = [0]
    nearest = [overlap_of(each, grams[0]) for each in grams]
    while len(kept) < size:
        at = min((row for row in range(len(grams)) if row not in kept), key=lambda row: nearest[row])
        kept.append(at)
        nearest = [max(near, overlap_of(each, grams[at])) for near, each in zip(nearest, grams, strict=True)]
    return kept
