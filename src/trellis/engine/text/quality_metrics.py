"""Signs of a model's health from the answers it offered: fluency and variety.

Plain arithmetic; no tensors, no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise


def fluency_of(logprobs: Sequence[float], tokens: Sequence[int]) -> float:
    """Return the mean log-probability per token over answers, in nats, from each answer's sum and token count.

    Measured with the base model, it falls when the adapted model's answers stop being language.
    """
    return sum(total / count for total, count in zip(logprobs, tokens, strict=True)) / len(tokens)


def variety_of(answers: Sequence[Sequence[int]]) -> float:
    """Return how different answers to one prompt are: 1 minus the mean overlap of their token bigrams (Jaccard 1901)
    over all pairs; 0 if all are the same."""
    overlaps = [bigram_overlap(one, other) for one, other in combinations(map(token_bigrams, answers), 2)]
    return 1.0 - sum(overlaps) / len(overlaps) if overlaps else 1.0


def token_bigrams(answer: Sequence[int]) -> set[tuple[int, int]]:
    """Return an answer's pairs of neighbouring tokens, with −1 before the first."""
    return set(pairwise([-1, *answer]))


def bigram_overlap(first: set[tuple[int, int]], second: set[tuple[int, int]]) -> float:
    """Return the Jaccard index of two answers' bigrams: 1 if they are the same."""
    return len(first & second) / len(first | second)
