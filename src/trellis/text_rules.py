"""What text may be, wherever it comes from. It imports nothing of ours, so that the lightest process can ask."""

from __future__ import annotations

import unicodedata

PROMPT_LIMIT = 100_000
"""Characters in one prompt or one written answer; more is refused before it reaches a tokenizer."""


def require_storable(text: str) -> str:
    """Text as it can be stored and encoded. Raises ValueError for NUL and lone surrogates."""
    if "\x00" in text:
        raise ValueError("must not hold the character NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be text that can be encoded as UTF-8") from None
    return text


def fold_text(text: str) -> str:
    """Text as it is searched: without case, and with each letter composed, however it was typed."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())


def search_spellings(word: str) -> list[str]:
    """A word as it may stand in stored text: folded, or as it was stored before letters were composed."""
    return list(dict.fromkeys([fold_text(word), word.casefold(), unicodedata.normalize("NFD", fold_text(word))]))
