"""Frames on the private socket between the web process and an engine: requests down, events up."""

from __future__ import annotations

import struct
from typing import Annotated, Any, Literal

from pydantic import Field

from .chat import AnswerDone, Chat, PromptRead, TextDelta
from .message import Message
from .models import Load, Loaded, Merge, Merged, Status, StatusReport
from .steering import AdapterCreated, Assess, Assessed, CreateAdapter, Delta, Learn, Learned, Offer, Offered, Retrain


class Cancel(Message):
    """Cancel a request before its next step."""

    type: Literal["cancel"] = "cancel"
    request: int


class SetPriority(Message):
    """Change the priority of a request that is queued or running."""

    type: Literal["urge"] = "urge"
    request: int
    priority: int


Request = Load | CreateAdapter | Offer | Learn | Retrain | Assess | Merge | Chat | Status


class RequestFrame(Message):
    """A frame from the web process: a request with its id. Lower priority numbers go first."""

    id: int
    priority: int = 0
    owner: str = ""
    """On whose behalf it is sent. Owners with several requests take turns."""
    continues_turn: bool = False
    """Whether it is the second half of what its owner has just had a turn for."""
    body: Annotated[Request | Cancel | SetPriority, Field(discriminator="type")]


Stage = Literal["connecting", "initializing", "downloading", "reading", "parsing", "quantizing", "placing",
                "warming_up", "regrowing", "fitting", "merging", "writing", "checking", "ready"]  # fmt: skip


class Progress(Message):
    """Progress of a long request. `fraction` is of the whole; bytes and rate are measured in this stage."""

    type: Literal["progress"] = "progress"
    stage: Stage
    fraction: float
    message: str
    bytes: int | None = None
    total_bytes: int | None = None
    rate: float | None = None
    seconds_left: float | None = None


class QueuePosition(Message):
    """Other requests are served first. `place` is 1 for the next one."""

    type: Literal["queued"] = "queued"
    place: int


class Cancelled(Message):
    type: Literal["cancelled"] = "cancelled"


class Failed(Message):
    """The request ended with an error that can be shown to a person."""

    type: Literal["failed"] = "failed"
    code: str
    message: str
    next_step: str
    field: str | None = None
    details: dict[str, Any] = Field(default={})


Event = (
    Progress
    | QueuePosition
    | Loaded
    | AdapterCreated
    | Merged
    | Delta
    | Offered
    | Learned
    | Assessed
    | PromptRead
    | TextDelta
    | AnswerDone
    | StatusReport
    | Cancelled
    | Failed
)


class EventFrame(Message):
    """A frame from the engine; `last` marks the final event of a request."""

    id: int
    last: bool
    body: Annotated[Event, Field(discriminator="type")]


FRAME_HEADER = struct.Struct(">I")
"""A frame is its length in four bytes, then the JSON of a RequestFrame or an EventFrame."""


MAX_FRAME_BYTES = 64 * 1024 * 1024


def encode_frame(message: Message) -> bytes:
    body = message.model_dump_json().encode()
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return FRAME_HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """Return the length from a frame header. Raises ValueError before anything of that size is allocated."""
    (length,) = FRAME_HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    return int(length)
