"""Is the model still well? Two signs, read off the answers that a person was offered: fluency and variety.

Plain arithmetic; no tensors, no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise


def fluency_of(logprobs: Sequence[float], tokens: Sequence[int]) -> float:
    """Mean over answers of the log-probability per token, in nats, from each one's sum and count of tokens.

    Given by the base model, it falls when what the adapted model says stops being language to it.
    """
    return sum(total / count for total, count in zip(logprobs, tokens, strict=True)) / len(tokens)


def variety_of(answers: Sequence[Sequence[int]]) -> float:
    """How different answers to one prompt are: 1 less the mean overlap of their pairs of neighbouring tokens
    (Jaccard 1901), over all pairs of answers; 0 when all are the same."""
    overlaps = [bigram_overlap(one, other) for one, other in combinations(map(token_bigrams, answers), 2)]
    return 1.0 - sum(overlaps) / len(overlaps) if overlaps else 1.0


def token_bigrams(answer: Sequence[int]) -> set[tuple[int, int]]:
    """The pairs of neighbouring tokens of an answer, its beginning counting as one."""
    return set(pairwise([-1, *answer]))


def bigram_overlap(first: set[tuple[int, int]], second: set[tuple[int, int]]) -> float:
    """How much two answers have in common, from their pairs of tokens (Jaccard 1901): 1 when all."""
    return len(first & second) / len(first | second)
