"""Group generation: the prompt is read once, then all options are decoded together, one token per step.

It knows rows and a tokenizer; not models, weights, sessions or learning.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...options import OPENING_TOKEN_BUDGET, Sampling
from .group_forward import AnswerRows, GroupForward
from .quality_metrics import bigram_overlap, token_bigrams
from .sampling import draw_uniforms, is_greedy, overflow_error, sample
from .vocabulary import IncrementalDetokenizer

OPENING_TOKENS = 6
"""Tokens of an opening, after which the answers that continue are selected."""


class GrowingOption:
    """One option while it is generated. Its tokens are decoded when its text is asked for, as a continuation of the
    prompt. It ends with `overflowed` if the log-probability of its next token is NaN."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.logprob = 0.0
        self.finish: Literal["stop", "length"] | None = None
        self.overflowed = False
        self._text = ""
        self._undecoded: list[int] = []
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt)

    @property
    def text(self) -> str:
        if self._undecoded:
            self._text += self._detokenizer.decode(self._undecoded)
            self._undecoded = []
        if self.finish:
            self._text += self._detokenizer.flush()
        return self._text

    def add_token(self, token: int, logprob: float, end_tokens: frozenset[int], max_new_tokens: int) -> None:
        """Append a token, unless the option has ended."""
        if self.finish:
            return
        if math.isnan(logprob):
            self.finish, self.overflowed = "length", True
            return
        self.tokens.append(token)
        self.logprob += logprob
        if token in end_tokens:
            self.finish = "stop"
            return
        self._undecoded.append(token)
        if len(self.tokens) == max_new_tokens:
            self.finish = "length"


def decode_group(
    forward: GroupForward,
    tokenizer: Any,
    prompt: list[int],
    end_tokens: frozenset[int],
    sampling: Sampling,
    size: int,
    seed: int,
    openings: int = 1,
) -> Iterator[list[GrowingOption]]:
    """Sample `size` answers to one prompt. Yields the same list after every step, one token further.

    Log-probabilities are of the sampled tokens, in fp32, from the logits over the temperature, before any filter. The
    same arguments give the same answers: the random numbers are its own.

    With several `openings`, that many answers are begun per option, half by the base model, and the most different ones
    are continued: what the adapted model no longer says gets another chance. The options are empty until the openings
    are selected.
    """
    generator = torch.Generator().manual_seed(seed)
    max_new_tokens = sampling.max_new_tokens
    group = [GrowingOption(tokenizer, prompt) for _ in range(size)]
    if is_greedy(sampling):
        openings = 1  # all openings would be the same
    openings = max(1, min(openings, OPENING_TOKEN_BUDGET // (size * len(prompt))))
    pending: Tensor | None = None
    if openings == 1:
        rows = forward.rows(prompt, size, len(prompt) + max_new_tokens)
    else:
        rows, openings_tokens, scores = yield from _begin_openings(
            forward, prompt, end_tokens, sampling, size, openings, generator, waiting=group
        )
        for option, opening, scored in zip(group, openings_tokens, scores, strict=True):
            for token, score in zip(opening, scored, strict=True):
                option.add_token(token, score, end_tokens, max_new_tokens)
        pending = torch.tensor([opening[-1] for opening in openings_tokens], device=forward.device)
        yield group
    if all(option.finish for option in group):
        return
    chances = draw_uniforms(max_new_tokens, size, generator, forward.device)
    for steps in rows.sample_steps(sampling, chances, pending):
        for tokens, logprobs in steps:
            for option, token, logprob in zip(group, tokens, logprobs, strict=True):
                option.add_token(token, logprob, end_tokens, max_new_tokens)
            yield group
            if all(option.finish for option in group):
                return


def _begin_openings(
    forward: GroupForward, prompt: list[int], end_tokens: frozenset[int], sampling: Sampling, size: int, openings: int,
    generator: torch.Generator, waiting: list[GrowingOption],
) -> Generator[list[GrowingOption], None, tuple[AnswerRows, list[list[int]], list[list[float]]]]:  # fmt: skip
    """Begin more answers than wanted, half of them by the base model, and select which continue. Returns their rows
    under the adapted weights, with each last token not read yet, their tokens, and the log-probabilities of these.
    Openings without finite logits are dropped. Raises EngineError if too few are left."""
    total = size * openings
    half = -(-total // 2)
    capacity = len(prompt) + sampling.max_new_tokens
    own_rows = forward.rows(prompt, half, capacity)
    base_rows = forward.rows(prompt, total - half, capacity, base=True)
    opening_tokens: list[list[int]] = [[] for _ in range(total)]
    failed_rows: set[int] = set()
    pending: Tensor | None = None
    length = min(OPENING_TOKENS, sampling.max_new_tokens)
    for chances in draw_uniforms(length, total, generator, forward.device):
        if pending is not None:
            yield waiting
            own_rows.feed(pending[:half, None])
            base_rows.feed(pending[half:, None])
        with torch.inference_mode():
            pending, scores = sample(torch.cat([own_rows.logits, base_rows.logits]), sampling, chances)
        failed_rows |= {row for row, score in enumerate(scores.tolist()) if math.isnan(score)}
        for opening, token in zip(opening_tokens, pending.tolist(), strict=True):
            if not opening or opening[-1] not in end_tokens:
                opening.append(token)
        if all(opening[-1] in end_tokens for opening in opening_tokens):
            break
    # Alternate, so that neither model is preferred when all openings are equally different.
    interleaved = [
        opening_tokens[row] for row in sorted(range(total), key=lambda row: row % half) if row not in failed_rows
    ]
    if len(interleaved) < size:
        raise overflow_error()
    selected = [interleaved[place] for place in select_most_different(interleaved, size)]
    # Openings of the base model continue under the adapted weights, and get their log-probabilities.
    rows = own_rows.restart(size)
    width = max(map(len, selected))
    ids = torch.tensor([opening + [0] * (width - len(opening)) for opening in selected], device=forward.device)
    logits = rows.logits[:, None]
    if width > 1:
        logits = torch.cat([logits, rows.feed(ids[:, :-1])], dim=1)
    logprobs = torch.log_softmax(logits.float() / sampling.temperature, dim=-1).gather(-1, ids[:, :, None])[..., 0]
    return rows, selected, [line[: len(opening)] for opening, line in zip(selected, logprobs.tolist(), strict=True)]


def select_most_different(openings: list[list[int]], size: int) -> list[int]:
    """Select openings: the first one, then always the one least like those selected before (farthest-point selection,
    Gonzalez 1985), by the overlap of their token bigrams."""
    grams = [token_bigrams(opening) for opening in openings]
    selected = [0]
    nearest_overlap = [bigram_overlap(each, grams[0]) for each in grams]
    while len(selected) < size:
        at = min((row for row in range(len(grams)) if row not in selected), key=lambda row: nearest_overlap[row])
        selected.append(at)
        nearest_overlap = [
            max(near, bigram_overlap(each, grams[at])) for near, each in zip(nearest_overlap, grams, strict=True)
        ]
    return selected
