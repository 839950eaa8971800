"""Rules for text from outside. It imports nothing else of Trellis, so that the lightest process can use it."""

from __future__ import annotations

import re
import unicodedata

PROMPT_LIMIT = 100_000
"""Characters in one prompt or one written answer; more is refused before it reaches a tokenizer."""


def require_storable(text: str) -> str:
    """Return text that can be stored and encoded. Raise ValueError for NUL and lone surrogates."""
    if "\x00" in text:
        raise ValueError("must not contain the character NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid UTF-8") from None
    return text


def fold_text(text: str) -> str:
    """Text as it is searched: without case, and with each letter composed, however it was typed."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())


def search_spellings(word: str) -> list[str]:
    """A word as it may stand in stored text: folded, or as it was stored before letters were composed."""
    return list(dict.fromkeys([fold_text(word), word.casefold(), unicodedata.normalize("NFD", fold_text(word))]))


GROUPED = re.compile(r"\d{1,3}([ ,.'’])\d{3}(?:\1\d{3})*")
DECIMAL = re.compile(r"(\d*|\d{1,3}([ ,.'’])\d{3}(?:\2\d{3})*)(?!\2)[.,](\d+)")


def plain_number(text: str, *, whole: bool) -> str:
    """A number as people write it (`0,5`, `1 024`, `1.024,5`), written as Python reads it; other text as it is.

    Raises ValueError for a number that can be read in two ways, such as `1,024` where it need not be whole.
    """
    found = re.fullmatch(r"\s*([+-]?)([\d.,'’\s]*\d)((?:[eE][+-]?\d+)?)\s*", text[:60])
    if not found or len(text) > 60:
        return text
    sign, digits, exponent = found[1], re.sub(r"\s", " ", found[2]), found[3]
    if grouped := GROUPED.fullmatch(digits):
        mark = grouped[1]
        if mark in " '’" or digits.count(mark) > 1 or (mark == "," and whole and digits[0] != "0"):
            return sign + digits.replace(mark, "") + exponent
        if mark == "," and digits[0] != "0":
            raise ValueError(f"is ambiguous: write {digits.replace(',', '')} or {digits.replace(',', '.')}")
    if not whole and (decimal := DECIMAL.fullmatch(digits)):
        return f"{sign}{re.sub('[^0-9]', '', decimal[1])}.{decimal[3]}{exponent}"
    return text
