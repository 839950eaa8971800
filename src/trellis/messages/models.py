"""Messages about the loaded model: load, merge, status."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..options import Device, EngineName, Precision
from .message import Message
from .steering import CreateAdapter, Prompt


class Load(Message):
    """Load a model folder (safetensors with a Hugging Face config), or the files of a repository on the Hub.

    With `repository`, `path` is the folder for downloads.
    """

    type: Literal["load"] = "load"
    path: str
    repository: str = ""
    revision: str = ""
    precision: Precision = "auto"
    device: Device = "auto"
    engine: EngineName = "transformers"
    remote_code: bool = False
    fetches: bool = True
    """Whether the Hub may be contacted; if not, the files already downloaded are used."""


class Merge(Message):
    """Merge an adapter into a freshly loaded base model, write the result, and verify it (docs/export.md).

    `root` and `plant` identify the base model the adapter was trained on; any other is refused.
    """

    type: Literal["merge"] = "merge"
    path: str
    weights: str
    into: str
    root: str
    plant: CreateAdapter
    probes: tuple[Prompt, ...] = Field(max_length=32)
    remote_code: bool = False


class Status(Message):
    """Ask what is loaded and how much memory it takes."""

    type: Literal["status"] = "status"


class Loaded(Message):
    type: Literal["loaded"] = "loaded"
    fingerprint: str
    former_fingerprint: str = ""
    """The fingerprint that older versions computed for this model; sessions that began with it stay valid."""
    parameters: int
    architecture: str
    device: str
    dtype: str
    bytes: int
    seconds: float
    has_template: bool = True
    template_problem: str = ""
    """Why the model's chat template cannot be used; empty if it can."""
    can_switch_thinking: bool = False
    """Whether the chat template has a variable that turns thinking on and off."""
    positions: int | None = None
    lanes: int = 1
    """How many requests the engine works on concurrently."""


class Merged(Message):
    """The written files of a merge, and how far its answers are from those of base and adapter.

    `largest_difference` and `mean_difference` are between log-probabilities of answer tokens, in nats. `ends` are the
    tokens at which base and merged model end an answer; `conversations` counts the sample conversations that both
    render identically.
    """

    type: Literal["merged"] = "merged"
    files: dict[str, int]
    dtype: str
    tokens: int
    largest_difference: float
    mean_difference: float
    agreement: float
    seconds: float
    ends: tuple[int, ...] = ()
    conversations: int = 0


class StatusReport(Message):
    type: Literal["status_report"] = "status_report"
    model: str | None
    resident_bytes: int
    device_bytes: int | None = None
