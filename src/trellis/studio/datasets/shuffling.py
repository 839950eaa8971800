"""A seeded order of prompts that needs no list of them."""

from __future__ import annotations

import hashlib


def shuffled(place: int, total: int, seed: int) -> int:
    """Where a seeded permutation of `total` things takes one of them, without making a list of all.

    A Feistel network over the next power of four, walked until it lands inside (Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains"): at most four tries on average, and no memory, for a million prompts as for ten.
    """
    half = max(1, ((total - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    at = place
    while True:
        left, right = at >> half, at & mask
        for turn in range(4):
            digest = hashlib.blake2b(f"{seed}.{turn}.{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        at = left << half | right
        if at < total:
            return at
