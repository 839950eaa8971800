"""A seeded permutation that needs no list."""

from __future__ import annotations

import hashlib


def shuffled_index(index: int, total: int, seed: int) -> int:
    """Return the image of an index under a seeded permutation of `total` numbers, in constant memory.

    A Feistel network over the next power of four, walked until it lands inside (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"): at most four tries on average.
    """
    half = max(1, ((total - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    current = index
    while True:
        left, right = current >> half, current & mask
        for round_number in range(4):
            digest = hashlib.blake2b(f"{seed}.{round_number}.{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        current = left << half | right
        if current < total:
            return current
