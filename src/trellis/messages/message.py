"""The base class of messages, and ids derived from their content."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def added_later(default: Any) -> Any:
    """A field added after ids were first derived: at its default it is left out of recipes."""
    return Field(default, json_schema_extra={"later": True})


def recipe_of(message: BaseModel) -> dict[str, Any]:
    """Return a message as a recipe: its JSON without None values and without `added_later` fields at their default.

    Ids outlive versions of the program: adding a field must not change the ids of what was made without it.
    """
    recipe = message.model_dump(mode="json", exclude_none=True)
    for name, field in type(message).model_fields.items():
        value = getattr(message, name)
        about = field.json_schema_extra
        if isinstance(about, dict) and about.get("later") and value == field.default:
            recipe.pop(name, None)
        elif isinstance(value, BaseModel):
            recipe[name] = recipe_of(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            recipe[name] = [recipe_of(each) for each in value]
    return recipe


def recipe_id(kind: str, recipe: Any) -> str:
    """Return the id of what a recipe makes: 128 bits of SHA-256 over its canonical JSON."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{kind}{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def derived_seed(*parts: str | int) -> int:
    """Return a 63-bit seed derived from what an offer depends on, never from global state."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
