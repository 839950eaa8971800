"""The commands of a room's socket, as clients send them."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import Invalid, shorten
from ..options import invalid_from_details
from ..studio.chat import MAX_MODELS
from ..text_rules import PROMPT_LIMIT, require_storable

MAX_KEYS = 60
"""The most keys of one command, and of each object in it."""

Id = Annotated[str, Field(max_length=100)]
MessageText = Annotated[str, Field(max_length=PROMPT_LIMIT), AfterValidator(require_storable)]


ModelNames = (
    Annotated[str, Field(max_length=300)]
    | Annotated[list[Annotated[str, Field(max_length=300)]], Field(max_length=MAX_MODELS, fail_fast=True)]
    | None
)


class Command(BaseModel):
    """A command of a client. `request` identifies the action, so that sending it twice does it once."""

    model_config = ConfigDict(extra="forbid")
    request: str = Field(default_factory=lambda: secrets.token_hex(12), min_length=4, max_length=100)


class Send(Command):
    type: Literal["send"]
    text: MessageText
    attachments: list[Id] = Field([], max_length=20, fail_fast=True)
    parent: Id | None = None
    model: ModelNames = None
    sampling: dict[str, Any] | None = None


class Stop(Command):
    type: Literal["stop"]
    message: Id | None = None


class Edit(Command):
    type: Literal["edit"]
    message: Id
    text: MessageText


class Regenerate(Command):
    type: Literal["regenerate"]
    message: Id
    model: Annotated[str, Field(max_length=300)] | None = None


class Continue(Command):
    type: Literal["go_on"]
    message: Id


class Choose(Command):
    type: Literal["choose"]
    message: Id


class Rate(Command):
    type: Literal["rate"]
    message: Id
    rating: int


class Sync(Command):
    type: Literal["sync"]
    after: int = Field(ge=0, le=2**53)


class Ping(Command):
    type: Literal["ping"]


COMMAND_ADAPTER: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        Send | Stop | Edit | Regenerate | Continue | Choose | Rate | Sync | Ping, Field(discriminator="type")
    ]
)  # fmt: skip

COMMAND_TYPES = "send, stop, edit, regenerate, go_on, choose, rate, sync, ping"


def request_id_field(text: str | None) -> dict[str, str]:
    """Return the request id of a refused command as a field of the error, where it is readable."""
    try:
        data = json.loads(text or "")
        request = data["request"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}
    return {"request": request} if isinstance(request, str) and len(request) <= 100 and request.isascii() else {}


def parse_command(text: str | None) -> Command:
    """Parse a command. Raise Invalid."""
    if text is None:
        raise Invalid(
            "Only text is accepted here.", code="bad_json", next_step="Send a JSON object as text.", fields=[]
        )
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise Invalid(
            "The message is not JSON.", code="bad_json", next_step="Send a JSON object with a “type”.", fields=[]
        ) from None
    if not isinstance(data, dict) or data.get("type") not in COMMAND_TYPES.split(", "):
        kind = data.get("type") if isinstance(data, dict) else data
        raise Invalid(
            f"type: there is no command “{shorten(kind, 40)}”.", field="type", code="unknown_type",
            next_step=f"The commands are {COMMAND_TYPES}.",
        )  # fmt: skip
    for each in (data, *(value for value in data.values() if isinstance(value, dict))):
        if len(each) > MAX_KEYS:
            raise Invalid(f"{len(each)} names are too many.", field="", next_step=f"Send {MAX_KEYS} at most.")
    try:
        command: Command = COMMAND_ADAPTER.validate_python(data)
    except ValidationError as error:
        findings = [{**finding, "loc": finding["loc"][1:]} for finding in error.errors()]
        raise invalid_from_details(findings) from None
    return command
