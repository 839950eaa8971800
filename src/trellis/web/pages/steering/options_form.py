"""The options of a session as a form shows them, and what a form sends as options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from ....errors import Invalid, TrellisError
from ....options import option_rows

GROUPS = ("Model", "Prompts", "Answers", "Learning", "Adapter", "History")
MULTILINE_OPTIONS = ("system_prompt", "control_prompt", "prompt_prefix", "prompt_suffix")
OPTIONS_THAT_MAY_BE_EMPTY = (
    *MULTILINE_OPTIONS,
    "dataset.id",
    "dataset.subset",
    "dataset.split",
    "dataset.column",
    "revision",
)
"""Options for which an empty field means empty text; for all others it means the default."""


@dataclass(frozen=True)
class FormField:
    """One option as a form shows it."""

    name: str
    title: str
    help: str
    kind: Literal["choice", "switch", "long", "text", "number"]
    value: Any
    default: Any
    error: str = ""
    unit: str = ""
    advanced: bool = False
    choices: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()
    is_integer: bool = False

    @property
    def id(self) -> str:
        return f"option-{self.name.replace('.', '-')}"


@dataclass(frozen=True)
class FieldGroup:
    title: str
    fields: list[FormField] = field(default_factory=list)

    @property
    def basic_fields(self) -> list[FormField]:
        return [each for each in self.fields if not each.advanced]

    @property
    def advanced_fields(self) -> list[FormField]:
        return [each for each in self.fields if each.advanced]

    @property
    def is_open(self) -> bool:
        """Whether the folded ones must be seen: one of them is wrong, or is not at its default."""
        return any(each.error or as_sent(each.value) != as_sent(each.default) for each in self.advanced_fields)


def group_fields(
    values: Mapping[str, Any],
    errors: Mapping[str, str] | None = None,
    suggestions: Mapping[str, tuple[str, ...]] | None = None,
) -> list[FieldGroup]:
    """All options in their groups, with these values and what is wrong with them (both by flat name)."""
    errors = errors or {}
    groups = {title: FieldGroup(title) for title in GROUPS}
    for name, row in option_rows():
        about = row.json_schema_extra
        assert isinstance(about, dict)
        types = [kind for kind in (row.annotation, *get_args(row.annotation)) if isinstance(kind, type)]
        is_choice = get_origin(row.annotation) is Literal
        kind: Literal["choice", "switch", "long", "text", "number"] = (
            "choice" if is_choice else "switch" if bool in types else "long" if name in MULTILINE_OPTIONS
            else "text" if str in types else "number"
        )  # fmt: skip
        groups[str(about["group"])].fields.append(
            FormField(
                name=name, title=str(row.title), help=str(row.description), kind=kind,
                value=values.get(name, row.default), default=row.default, error=errors.get(name, ""),
                unit=str(about["unit"]), advanced=bool(about["advanced"]),
                choices=get_args(row.annotation) if is_choice else (), suggestions=(suggestions or {}).get(name, ()),
                is_integer=int in types,
            )
        )  # fmt: skip
    return list(groups.values())


def errors_by_option(error: TrellisError | None) -> dict[str, str]:
    """Return error messages by flat option name."""
    errors = messages_by_option(error.fields if isinstance(error, Invalid) else [])
    if error and error.field:
        for name, message in messages_by_option([{"field": error.field, "message": error.message}]).items():
            errors.setdefault(name, message)
    return errors


def messages_by_option(entries: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return error messages by flat option name, without the name and value that the field shows itself."""
    return {
        entry["field"].removeprefix("config."): beside_field(entry["message"].removeprefix(f"{entry['field']}: "))
        for entry in entries
    }


def beside_field(message: str) -> str:
    """`Must be 5 or less.`, from `must be 5 or less, got “9”.`"""
    return message[:1].upper() + re.sub(", got (“[^”]*”|nothing|a very large number)\\.$", ".", message[1:])


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a form names it: `{"dataset": {"id": …}}` becomes `{"dataset.id": …}`."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            found[name] = value
    return found


def config_from_form(form: Mapping[str, str]) -> dict[str, Any]:
    """Return the sent form as a partial configuration. Whole forms are marked: switches that are off send nothing."""
    config: dict[str, Any] = {}
    if form.get("form") == "whole":
        for name, row in option_rows():
            if row.annotation is bool:
                _set_option(config, name, name in form)
    known = dict(option_rows())
    for name, value in form.items():
        if name in ("form", "dataset", "typed", "under", "preset"):
            continue
        if name in known and known[name].annotation is bool:
            _set_option(config, name, True)
        elif value.strip() or name in OPTIONS_THAT_MAY_BE_EMPTY:
            _set_option(config, name, value)
    return config


def as_sent(value: Any) -> str:
    """Return a value as a form sends it."""
    return "" if value is None else str(value).strip()


def config_from_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a form shows as a partial configuration."""
    config = config_from_form(
        {name: str(value) for name, value in values.items() if not isinstance(value, bool | None)}
    )
    for name, value in values.items():
        if isinstance(value, bool):
            _set_option(config, name, value)
    return config


def values_from_form(form: Mapping[str, str]) -> dict[str, Any]:
    """Return the sent values to show again, including switches that were off and invalid values."""
    return flatten_config(config_from_form(form)) | {name: value for name, value in form.items() if value != "on"}


def _set_option(config: dict[str, Any], name: str, value: Any) -> None:
    outer, _, inner = name.partition(".")
    if inner:
        section = config.setdefault(outer, {})
        if isinstance(section, dict):
            section[inner] = value
    else:
        config[outer] = value
