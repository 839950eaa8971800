"""Pydantic's findings as one error whose sentences name the field and quote the value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from pydantic import ValidationError

from ..errors import Invalid, shorten


def invalid_from(error: ValidationError, prefix: str = "") -> Invalid:
    """Pydantic's findings as the one error shape, each field named with the value that it was given."""
    return invalid_from_details((dict(finding) for finding in error.errors()), prefix)


MAX_REPORTED_ERRORS = 20
"""Most errors reported at once; a hostile body could have a hundred thousand."""


def invalid_from_details(details: Iterable[Mapping[str, Any]], prefix: str = "") -> Invalid:
    """Return the findings as one error. What the branches of a union say of one field becomes one sentence."""
    sentences: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    for detail in islice(details, MAX_REPORTED_ERRORS):
        path = ".".join(part for part in (prefix, *_field_path(detail)) if part)
        sentence = _error_sentence(detail, prefix)
        if sentence not in sentences.setdefault(path, []):
            sentences[path].append(sentence)
        values.setdefault(path, _quote_value(detail.get("input")))
    return invalid_from_entries(
        [{"field": path, "message": _join_sentences(sentences[path], values[path])} for path in sentences]
    )


UNION_LOC_PATTERN = re.compile(
    r"[A-Z]\w*|.*[\[(].*|str|int|float|bool|bytes|none|any|tuple|list|dict|set|constrained-\w+|json|tagged-union|"
    r"is-instance|chain|nullable|function-\w+"
)
"""A step of Pydantic's way to a value that names a branch of a union, or a validator, and no field."""


def _field_path(detail: Mapping[str, Any]) -> list[str]:
    """The way to a value in what was sent."""
    steps = list(detail["loc"])
    last = len(steps) - 1
    sent_by_name = detail["type"] == "extra_forbidden"  # whatever it is called, it is a name that was sent
    return [
        shorten(step)
        for place, step in enumerate(steps)
        if not (isinstance(step, str) and UNION_LOC_PATTERN.fullmatch(step)) or (sent_by_name and place == last)
    ]


def _join_sentences(sentences: list[str], value: str) -> str:
    """One sentence of several about the same field: “must be text or a list, got “5”.”"""
    if len(sentences) == 1:
        return sentences[0]
    ending = f", got {value}."
    kinds = [each.removeprefix("must be ").removesuffix(ending) for each in sentences if each.startswith("must be ")]
    if not kinds:
        return sentences[0]
    return f"must be {', '.join(kinds[:-1])}{' or ' if kinds[:-1] else ''}{kinds[-1]}{ending}"


def invalid_from_entries(fields: list[dict[str, str]]) -> Invalid:
    """One error for findings of `{field, message}`."""
    first = fields[0]
    message = f"{first['field'] or 'The request'}: {first['message']}"
    if len(fields) > 1:
        message += f" ({len(fields) - 1} more)"
    return Invalid(message, next_step="Fix the highlighted fields.", field=first["field"], fields=fields)


BOUND_MESSAGES = {
    "greater_than_equal": ("ge", "{} or more"), "less_than_equal": ("le", "{} or less"),
    "greater_than": ("gt", "more than {}"), "less_than": ("lt", "less than {}"), "multiple_of": ("multiple_of",
    "a multiple of {}"),
}  # fmt: skip


TYPE_MESSAGES = {
    "int_parsing": "a whole number", "int_type": "a whole number", "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number", "float_parsing": "a number", "float_type": "a number",
    "finite_number": "a finite number", "bool_parsing": "on or off", "bool_type": "on or off",
    "string_type": "text", "string_sub_type": "text", "string_unicode": "text", "bytes_type": "text",
    "list_type": "a list", "tuple_type": "a list", "set_type": "a list", "iterable_type": "a list",
    "dict_type": "an object", "model_type": "an object", "model_attributes_type": "an object",
    "mapping_type": "an object", "dataclass_type": "an object", "none_required": "empty",
}  # fmt: skip


LENGTH_MESSAGES = {
    "string_too_long": ("max_length", "must have at most {} characters."),
    "string_too_short": ("min_length", "must have at least {} characters."),
    "too_long": ("max_length", "must have at most {} entries."),
    "too_short": ("min_length", "must have at least {} entries."),
}
"""Pydantic's messages about lengths, as sentences for a person."""


def _error_sentence(detail: Mapping[str, Any], prefix: str = "") -> str:
    kind, value = detail["type"], detail.get("input")
    limits = detail.get("ctx") or {}
    got = f", got {_quote_value(value)}."
    if (kind == "string_too_short" and limits.get("min_length") == 1) or (
        kind == "string_pattern_mismatch" and not str(value).strip()
    ):
        return "is empty."
    if kind in BOUND_MESSAGES:
        name, words = BOUND_MESSAGES[kind]
        return f"must be {words.format(_limit(limits[name]))}{got}"
    if kind in TYPE_MESSAGES:
        return f"must be {TYPE_MESSAGES[kind]}{got}"
    if kind in LENGTH_MESSAGES:
        name, words = LENGTH_MESSAGES[kind]
        return words.format(_limit(limits[name]))
    if kind in ("literal_error", "enum"):
        return f"must be {_requote(limits['expected'])}{got}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = f" {_requote(limits['expected_tags'])}" if "expected_tags" in limits else " one of the kinds"
        return f"must have{tags} as its {_requote(limits.get('discriminator', 'type'))}."
    if kind == "missing":
        return "is required."
    if kind == "extra_forbidden":
        options = "is not an option. See /api/steering/schema for all options."
        return options if prefix == "config" else "is not a field of this request."
    if kind == "string_pattern_mismatch":
        return f"contains invalid characters{got}"
    if kind in ("value_error", "assertion_error"):  # what our own validators say
        message = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
        return f"{message}{got}"
    return f"is not valid{got}"


def _limit(value: object) -> str:
    """`5` and `20,000`, whether whole or not."""
    return f"{value:,.15g}" if isinstance(value, int | float) else str(value)


def _requote(expected: object) -> str:
    """Pydantic's list of what may be, in our quotes."""
    return re.sub(r"'([^']*)'", r"“\1”", str(expected))


def _quote_value(value: object) -> str:
    """A value as it is quoted: text and numbers as they are, others by what they are in JSON."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "“true”" if value else "“false”"
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a very large number"
    if isinstance(value, str | int | float):
        return f"“{shorten(value)}”"
    if isinstance(value, bytes):
        return f"“{shorten(value[:2000].decode(errors='replace'))}”"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, Mapping) else "something else"
