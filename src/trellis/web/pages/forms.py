"""The options of a session as a form shows them, and what a form sends as options: both from the rows in params.py."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from ...errors import Invalid, TrellisError
from ...params import option_rows

GROUPS = ("Model", "Prompts", "Answers", "Learning", "Adapter", "History")
LONG = ("system_prompt", "control_prompt", "prompt_prefix", "prompt_suffix")
KEPT_EMPTY = (*LONG, "dataset.id", "dataset.subset", "dataset.split", "dataset.column", "revision")
"""Options for which an empty field means empty text; for all others it means the default."""


@dataclass(frozen=True)
class Field:
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
    known: tuple[str, ...] = ()
    whole: bool = False

    @property
    def id(self) -> str:
        return f"option-{self.name.replace('.', '-')}"


@dataclass(frozen=True)
class Group:
    title: str
    fields: list[Field] = field(default_factory=list)

    @property
    def plain(self) -> list[Field]:
        return [each for each in self.fields if not each.advanced]

    @property
    def folded(self) -> list[Field]:
        return [each for each in self.fields if each.advanced]

    @property
    def open(self) -> bool:
        """Whether the folded ones must be seen: one of them is wrong, or is not at its default."""
        return any(each.error or as_sent(each.value) != as_sent(each.default) for each in self.folded)


def groups_of(
    values: Mapping[str, Any],
    wrong: Mapping[str, str] | None = None,
    known: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Group]:
    """All options in their groups, with these values and what is wrong with them (both by flat name)."""
    wrong = wrong or {}
    groups = {title: Group(title) for title in GROUPS}
    for name, row in option_rows():
        about = row.json_schema_extra
        assert isinstance(about, dict)
        types = [kind for kind in (row.annotation, *get_args(row.annotation)) if isinstance(kind, type)]
        is_choice = get_origin(row.annotation) is Literal
        kind: Literal["choice", "switch", "long", "text", "number"] = (
            "choice" if is_choice else "switch" if bool in types else "long" if name in LONG
            else "text" if str in types else "number"
        )  # fmt: skip
        groups[str(about["group"])].fields.append(
            Field(
                name=name, title=str(row.title), help=str(row.description), kind=kind,
                value=values.get(name, row.default), default=row.default, error=wrong.get(name, ""),
                unit=str(about["unit"]), advanced=bool(about["advanced"]),
                choices=get_args(row.annotation) if is_choice else (), known=(known or {}).get(name, ()),
                whole=int in types,
            )
        )  # fmt: skip
    return list(groups.values())


def errors_of(error: TrellisError | None) -> dict[str, str]:
    """What is wrong by flat name of the option."""
    wrong = named(error.fields if isinstance(error, Invalid) else [])
    if error and error.field:
        for name, message in named([{"field": error.field, "message": error.message}]).items():
            wrong.setdefault(name, message)
    return wrong


def named(entries: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Entries of errors by flat name of the option, as they stand beside the field that shows its name and value."""
    return {
        entry["field"].removeprefix("config."): beside_field(entry["message"].removeprefix(f"{entry['field']}: "))
        for entry in entries
    }


def beside_field(message: str) -> str:
    """`Must be 5 or less.`, from `must be 5 or less, got “9”.`"""
    return message[:1].upper() + re.sub(", got (“[^”]*”|nothing|a very large number)\\.$", ".", message[1:])


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a form names it: `{"dataset": {"id": …}}` becomes `{"dataset.id": …}`."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            found[name] = value
    return found


def nested(sent: Mapping[str, str]) -> dict[str, Any]:
    """What a form sent as a partial configuration. A whole form says so, since a switch that is off sends nothing."""
    config: dict[str, Any] = {}
    if sent.get("form") == "whole":
        for name, row in option_rows():
            if row.annotation is bool:
                _set(config, name, name in sent)
    known = dict(option_rows())
    for name, value in sent.items():
        if name in ("form", "dataset", "typed", "under", "preset"):
            continue
        if name in known and known[name].annotation is bool:
            _set(config, name, True)
        elif value.strip() or name in KEPT_EMPTY:
            _set(config, name, value)
    return config


def as_sent(value: Any) -> str:
    """A value as a form sends it."""
    return "" if value is None else str(value).strip()


def config_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a form shows as a partial configuration."""
    config = nested({name: str(value) for name, value in values.items() if not isinstance(value, bool | None)})
    for name, value in values.items():
        if isinstance(value, bool):
            _set(config, name, value)
    return config


def shown(sent: Mapping[str, str]) -> dict[str, Any]:
    """What a form sent, as the form shows it again: with the switches that were off, and with what was wrong."""
    return flat(nested(sent)) | {name: value for name, value in sent.items() if value != "on"}


def _set(config: dict[str, Any], name: str, value: Any) -> None:
    outer, _, inner = name.partition(".")
    if inner:
        place = config.setdefault(outer, {})
        if isinstance(place, dict):
            place[inner] = value
    else:
        config[outer] = value
