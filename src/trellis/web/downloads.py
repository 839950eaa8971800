"""Names of files that browsers save."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import quote

LONGEST = 120
"""Bytes of a title in a file name; file systems allow 255 for the whole name."""

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)$")
"""Names that Windows keeps for devices, whatever ending follows."""


def slug(title: str, otherwise: str) -> str:
    """A title as the name of a file on any system: its letters and digits, of every script, joined by hyphens."""
    letters = unicodedata.normalize("NFC", title).lower()
    kept = "".join(each if unicodedata.category(each)[0] in "LMN" else " " for each in letters)
    cut = "-".join(kept.split()).encode()[:LONGEST].decode("utf-8", "ignore").strip("-")
    return otherwise if not cut else f"{otherwise}-{cut}" if RESERVED.match(cut) else cut


def attachment(name: str) -> dict[str, str]:
    """Headers that have a response saved under a name: whole after RFC 5987, and in ASCII for clients without it."""
    plain = re.sub(r"[^\w. -]", "", unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()).strip("- ")
    plain = f"download{plain}" if plain.startswith(".") else plain or "download"
    return {"content-disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"}
