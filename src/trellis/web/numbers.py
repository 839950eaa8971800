"""Numbers as a reader's locale writes them. `static/numbers.js` has the same functions for what scripts write."""

from __future__ import annotations

import math
import re
from contextvars import ContextVar
from decimal import ROUND_HALF_UP, Decimal
from functools import cache, lru_cache
from typing import TypeGuard

from babel import Locale

LOCALES = (
    "en", "bg", "ca", "cs", "da", "de", "de-CH", "el", "es", "es-MX", "et", "fi", "fr", "fr-CA", "hr", "hu", "id", "it",
    "it-CH", "ja", "ko", "lt", "lv", "nb", "nl", "no", "pl", "pt", "pt-PT", "ro", "ru", "sk", "sl", "sr", "sv", "th",
    "tr", "uk", "vi", "zh",
)  # fmt: skip
"""The locales that Babel and browsers write alike. Another region is written as its language, all else as English."""

UNKNOWN = "–"
_LARGEST = Decimal(10) ** 15
_TAGS = {tag.lower(): tag for tag in LOCALES}
_reader: ContextVar[str] = ContextVar("reader", default="en")


@lru_cache(maxsize=256)
def locale_from(accept_language: str) -> str:
    """The best locale of an Accept-Language header that is known here; English for anything else."""
    wanted: list[tuple[float, int, str]] = []
    for part in accept_language.split(",")[:10]:
        found = re.fullmatch(r"\s*([A-Za-z]{2,3})(-[A-Za-z0-9-]+)?\s*(?:;\s*q=([01](?:\.\d{0,3})?))?\s*", part)
        if found and (quality := float(found[3] or 1)) > 0:
            tag = (found[1] + (found[2] or "")).lower()
            if known := _TAGS.get(tag) or _TAGS.get(found[1].lower()):
                wanted.append((-quality, len(wanted), known))
    return min(wanted)[2] if wanted else "en"


def set_reader(accept_language: str) -> None:
    """Write the numbers of this request in the locale that its Accept-Language header asks for."""
    _reader.set(locale_from(accept_language[:200]))


def reader_locale() -> str:
    """The locale of the request that is being answered."""
    return _reader.get()


def number(value: float | Decimal | None, digits: int | None = None) -> str:
    """`1,024` or `0.0003`; with `digits`, rounded half up to that many decimals, as browsers do."""
    if not _is_known(value):
        return UNKNOWN
    exact = Decimal(str(value))
    if abs(exact) >= _LARGEST:
        return f"{value:g}"
    if digits is not None:
        exact = exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    symbols = _locale().number_symbols["latn"]
    written = f"{abs(exact):,f}".translate({ord(","): symbols["group"], ord("."): symbols["decimal"]})
    return f"{symbols['minusSign']}{written}" if exact < 0 else written


def percent(value: float | Decimal | None, digits: int = 0) -> str:
    """`74%` from `0.74`."""
    if not _is_known(value):
        return UNKNOWN
    before, after = _locale().percent_formats[None].pattern.split("#,##0")
    written = number(Decimal(str(value)) * 100, digits)
    sign = written[:1] if written[0] in "-−" else ""
    return f"{sign}{before}{written.removeprefix(sign)}{after}"


def compact(value: float | None) -> str:
    """Three digits and a letter: `2.26M`."""
    if not _is_known(value):
        return UNKNOWN
    amount, unit = _scaled(value, ("", "K", "M", "B", "T"))
    return number(amount, (amount < 99.95) + (amount < 9.995) if unit else None) + unit


def factor(value: float | None) -> str:
    """`1.6×`, and from ten on `12×`."""
    return number(value, int(value < 9.95)) + "×" if _is_known(value) else UNKNOWN


def size(value: float | None) -> str:
    """Bytes: `5.1 GB`."""
    if not _is_known(value):
        return UNKNOWN
    amount, unit = _scaled(value, ("bytes", "kB", "MB", "GB", "TB"))
    return f"{number(amount, int(unit != 'bytes' and amount < 99.95))} {unit}"


def duration(milliseconds: float | None) -> str:
    """`312 ms`, `1.2 s`, `45 s`, `2 min 5 s`, `3 h 20 min`."""
    if not _is_known(milliseconds):
        return UNKNOWN
    if milliseconds < 999.5:
        return f"{number(milliseconds, 0)} ms"
    if milliseconds < 59_500:
        return f"{number(milliseconds / 1000, int(milliseconds < 9950))} s"
    minutes, seconds = divmod(math.floor(milliseconds / 1000 + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min")) if hours else ((minutes, "min"), (seconds, "s"))
    return " ".join(f"{number(amount)} {unit}" for amount, unit in parts if amount)


def _is_known(value: float | Decimal | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _scaled(value: float, units: tuple[str, ...]) -> tuple[float, str]:
    amount, place = float(value), 0
    while amount >= 999.5 and place < len(units) - 1:
        amount, place = amount / 1000, place + 1
    return (amount if place else value), units[place]


def _locale() -> Locale:
    return _parsed(_reader.get())


@cache
def _parsed(tag: str) -> Locale:
    return Locale.parse(tag, sep="-")
