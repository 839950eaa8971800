"""Group generation: the prompt is read once, then all options grow together, one token a step.

It knows a model that follows the transformers interface and a tokenizer; not weights, sessions or learning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from ..params import Sampling


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
) -> Iterator[list[Growing]]:
    """Draw `size` answers to one prompt. Yields the same list after every step, one token further.

    Log-probabilities are of the drawn tokens, in fp32, from the logits over the temperature, before any
    word was filtered out. The same arguments give the same answers: the random numbers are its own.
    The caller holds the model in inference mode and with the right weights at every step.
    """
    device = model.device
    generator = torch.Generator(device=device).manual_seed(seed)
    group = [Growing() for _ in range(size)]
    readers = [TextReader(tokenizer) for _ in group]
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        ids = torch.tensor([prompt], device=device)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        cache.batch_repeat_interleave(size)
        logits = logits.expand(size, -1)
    for step in range(sampling.max_new_tokens):
        with torch.inference_mode():
            drawn, logprobs = draw(logits, sampling, generator)
            chosen, scores = drawn.tolist(), logprobs.tolist()
        for option, reader, token, score in zip(group, readers, chosen, scores, strict=True):
            if option.finish:
                continue
            option.tokens.append(token)
            option.logprob += score
            if token in ends:
                option.finish = "stop"
            else:
                option.text += reader.read(token)
                if step + 1 == sampling.max_new_tokens:
                    option.finish = "length"
            if option.finish:
                option.text += reader.rest()
        yield group
        if all(option.finish for option in group):
            return
        with torch.inference_mode():
            logits = model(input_ids=drawn[:, None], past_key_values=cache, use_cache=True).logits[:, -1]


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
