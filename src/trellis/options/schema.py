"""How an option is declared: a Pydantic field with what a form, a flag and the JSON schema need."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ..text_rules import PROMPT_LIMIT, plain_number, require_storable


def option(
    default: Any,
    title: str,
    help: str,
    *,
    unit: str = "",
    group: str = "",
    advanced: bool = False,
    later: bool = False,
    **bounds: Any,
) -> Any:
    """One row: a Pydantic field with what a form needs to show it.

    `later` marks an option that came after the first sessions: at its default it is left out of the recipes
    that name weights, so that what was grown before keeps its name.
    """
    extra: dict[str, Any] = {"unit": unit, "group": group, "advanced": advanced, "later": later}
    return Field(default, title=title, description=help, json_schema_extra=extra, **bounds)


class TypedNumbers(BaseModel):
    """A model whose numbers may be given as people type them: with a decimal comma or groups of thousands."""

    @field_validator("*", mode="before")
    @classmethod
    def _number_as_people_write_it(cls, value: Any, about: ValidationInfo) -> Any:
        kinds = get_args(row := cls.model_fields[str(about.field_name)].annotation) or (row,)
        return plain_number(value, whole=int in kinds) if isinstance(value, str) and {int, float} & {*kinds} else value


class Options(TypedNumbers):
    """A frozen set of options; unknown names and NaN are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


OptionsT = TypeVar("OptionsT", bound=Options)


StorableText = Annotated[str, Field(min_length=1, max_length=PROMPT_LIMIT), AfterValidator(require_storable)]
"""A prompt or a written answer as it may be sent."""
