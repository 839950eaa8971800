"""Sets of options to start from: data that ships with Trellis, read once."""

from __future__ import annotations

import importlib.resources
import tomllib
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from ...errors import NotFound, shorten


@dataclass(frozen=True)
class Preset:
    """Options that are applied over the defaults."""

    id: str
    title: str
    help: str
    config: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@cache
def all_presets() -> tuple[Preset, ...]:
    text = importlib.resources.files("trellis").joinpath("presets/steering.toml").read_text(encoding="utf-8")
    return tuple(Preset(**row) for row in tomllib.loads(text)["preset"])


def get_preset(preset_id: str) -> Preset:
    """Return a preset. Raise NotFound."""
    found = next((each for each in all_presets() if each.id == preset_id), None)
    if found is None:
        raise NotFound(
            f"There is no preset “{shorten(preset_id)}”.",
            next_step=f"The presets are {', '.join(each.id for each in all_presets())}.",
        )
    return found
