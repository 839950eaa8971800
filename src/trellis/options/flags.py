"""The options of a session as flags of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from .datasets import Dataset
from .steering import SessionConfig


@dataclass(frozen=True)
class Flag:
    """One option as the command line has it."""

    declarations: tuple[str, ...]
    help: str
    type: Any
    default_text: str


def option_rows() -> Iterator[tuple[str, FieldInfo]]:
    """Every option of a session with its name, those of the dataset as `dataset.…`."""
    for name, row in SessionConfig.model_fields.items():
        if name == "dataset":
            for inner, each in Dataset.model_fields.items():
                yield f"dataset.{inner}", each
        else:
            yield name, row


def flag_rows() -> Iterator[tuple[str, Flag]]:
    """Every option of a session as a flag: `lora_rank` is `--lora-rank`, `dataset.id` is `--dataset-id`."""
    for name, row in option_rows():
        flag = name.replace("_", "-").replace(".", "-")
        kinds = {kind for kind in (row.annotation, *get_args(row.annotation)) if isinstance(kind, type)}
        is_switch, is_choice = bool in kinds, get_origin(row.annotation) is Literal
        declaration = f"--{flag}/--no-{flag}" if is_switch else f"--{flag}"
        shown = "automatic" if row.default is None else "" if row.default == "" else str(row.default)
        kind = bool if is_switch else str  # what a value may be is said by the one validation, in the same words
        listed = f" One of: {', '.join(get_args(row.annotation))}." if is_choice else ""
        help = f"{row.description}{listed}"
        yield name, Flag((declaration,), help, kind, shown)


def config_from_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """A partial configuration from what was given on the command line."""
    config: dict[str, Any] = {}
    for name, _ in option_rows():
        value = given.get(name.replace(".", "_"))
        if value is not None:
            outer, _, inner = name.partition(".")
            if inner:
                config.setdefault(outer, {})[inner] = value
            else:
                config[outer] = value
    return config
