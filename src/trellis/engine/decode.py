"""Group generation: the prompt is read once, then all options grow together, one token a step.

It knows a model that follows the transformers interface and a tokenizer; not weights, sessions or learning.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from ..params import OPENING_POSITIONS, Sampling
from .vitals import grams_of, overlap_of

OPENING = 6
"""So many tokens of an answer are drawn before it is known which answers go on."""


@dataclass
class Growing:
    """One option while it is drawn."""

    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    text: str = ""
    finish: Literal["stop", "length"] | None = None


def decode_group(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    ends: frozenset[int],
    sampling: Sampling,
    size: int,
    seed: int,
    openings: int = 1,
    base: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[list[Growing]]:
    """Draw `size` answers to one prompt. Yields the same list after every step, one token further.

    Log-probabilities are of the drawn tokens, in fp32, from the logits over the temperature, before any
    word was filtered out. The same arguments give the same answers: the random numbers are its own.
    The caller holds the model in inference mode and with the right weights at every step.

    With several `openings`, so many answers are begun for each of them, half within `base`, where the model is the base
    model, and those that differ most go on: what the adapted model no longer says has its chance again. Until it is
    known which ones go on, the answers are empty.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    group = [Growing() for _ in range(size)]
    readers = [TextReader(tokenizer) for _ in group]

    def grow(row: int, token: int, score: float) -> None:
        option = group[row]
        if option.finish:
            return
        option.tokens.append(token)
        option.logprob += score
        if token in ends:
            option.finish = "stop"
        else:
            option.text += readers[row].read(token)
            if len(option.tokens) == sampling.max_new_tokens:
                option.finish = "length"
        if option.finish:
            option.text += readers[row].rest()

    if sampling.temperature == 0:
        openings = 1  # they would all be the same
    openings = max(1, min(openings, OPENING_POSITIONS // (size * len(prompt))))
    if openings == 1:
        rows, drawn = Rows(model, prompt, size), None
    else:
        rows, begun, scores = yield from _begin(
            model, prompt, ends, sampling, size, openings, generator, base, waiting=group
        )
        for row, (opening, scored) in enumerate(zip(begun, scores, strict=True)):
            for token, score in zip(opening, scored, strict=True):
                grow(row, token, score)
        drawn = torch.tensor([opening[-1] for opening in begun], device=model.device)
        yield group
    while not all(option.finish for option in group):
        if drawn is not None:
            rows.feed(drawn[:, None])
        with torch.inference_mode():
            drawn, logprobs = draw(rows.logits, sampling, generator)
        for row, (token, score) in enumerate(zip(drawn.tolist(), logprobs.tolist(), strict=True)):
            grow(row, token, score)
        yield group


class Rows:
    """Answers to one prompt that grow together, a row each. `logits` (R, V) are of each one's next token."""

    def __init__(self, model: Any, prompt: list[int], count: int) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            found = model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            self._cache.batch_repeat_interleave(count)
        self.logits: Tensor = found.expand(count, -1)

    def feed(self, tokens: Tensor) -> Tensor:
        """Go on with tokens (R, T), the same count in each row. Returns logits (R, T, V), after each of them."""
        with torch.inference_mode():
            found: Tensor = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True).logits
        self.logits = found[:, -1]
        return found


def _begin(
    model: Any, prompt: list[int], ends: frozenset[int], sampling: Sampling, size: int, openings: int,
    generator: torch.Generator, base: Callable[[], AbstractContextManager[Any]], waiting: list[Growing],
) -> Generator[list[Growing], None, tuple[Rows, list[list[int]], list[list[float]]]]:  # fmt: skip
    """Begin more answers than are wanted, half of them within `base`, and choose which go on: their rows under the
    adapted weights, with the last token of each still to be fed, their tokens, and the log-probabilities of these."""
    total = size * openings
    half = -(-total // 2)
    own = Rows(model, prompt, half)
    with base():
        other = Rows(model, prompt, total - half)
    begun: list[list[int]] = [[] for _ in range(total)]
    drawn: Tensor | None = None
    for _ in range(min(OPENING, sampling.max_new_tokens)):
        if drawn is not None:
            yield waiting
            own.feed(drawn[:half, None])
            with base():
                other.feed(drawn[half:, None])
        with torch.inference_mode():
            drawn, _ = draw(torch.cat([own.logits, other.logits]), sampling, generator)
        for opening, token in zip(begun, drawn.tolist(), strict=True):
            if not opening or opening[-1] not in ends:
                opening.append(token)
        if all(opening[-1] in ends for opening in begun):
            break
    # By turns, so that where nothing is alike neither model's come first.
    by_turns = [begun[row] for row in sorted(range(total), key=lambda row: row % half)]
    kept = [by_turns[place] for place in most_different(by_turns, size)]
    # What the base began goes on under the adapted weights, and is told by their log-probabilities.
    rows = Rows(model, prompt, size)
    width = max(map(len, kept))
    ids = torch.tensor([opening + [0] * (width - len(opening)) for opening in kept], device=model.device)
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


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token for each row of logits (G, V): tokens (G,) and their log-probabilities (G,) in fp32.

    Filters: top-p (nucleus, arXiv 1904.09751) and min-p (arXiv 2407.01082), after the temperature.
    """
    if sampling.temperature == 0:
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        drawn = logprobs.argmax(dim=-1)
        return drawn, logprobs.gather(-1, drawn[:, None])[:, 0]
    logprobs = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    probabilities = logprobs.exp()
    if sampling.min_p > 0:
        floor = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    if sampling.top_p < 1:
        ordered, places = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= sampling.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, places, ordered)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return drawn[:, 0], logprobs.gather(-1, drawn)[:, 0]


class TextReader:
    """Tokens to text, token by token, in linear time. Half a character is held back until it is whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0
        self._read = 0

    def read(self, token: int) -> str:
        """The text that this token adds; empty while a character is incomplete."""
        self._tokens.append(token)
        known, longer = self._decoded()
        if len(longer) <= len(known) or longer.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return longer[len(known) :]

    def rest(self) -> str:
        """What was held back, at the end."""
        known, longer = self._decoded()
        self._start = self._read = len(self._tokens)
        return longer[len(known) :]

    def _decoded(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        window = self._tokens[self._start :]
        known = decode(window[: self._read - self._start], skip_special_tokens=True)
        return known, decode(window, skip_special_tokens=True)
