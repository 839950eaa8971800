"""The errors a person can be shown. Each says what happened, quotes the value, and names the next step.

TrellisError
├── Invalid          a value that was sent cannot be used; names the field
├── NotFound         no such thing (another person's thing looks the same)
├── Conflict         it can be done, but not now; carries the state that stands in the way
├── Refused          not allowed
└── EngineError      the engine said no
    ├── EngineDied   its process ended; the work can be done again
    ├── WeightsMissing   the weights named by a request are not on disk
    ├── EngineStopped    its model was unloaded on purpose; resuming loads it again
    └── LoadFailed   a model could not be loaded; the code says why
"""

from __future__ import annotations

from typing import Any


class TrellisError(Exception):
    """An error for a person. `code` is stable for programs; `message` and `next_step` are sentences."""

    code = "error"

    def __init__(
        self,
        message: str,
        *,
        next_step: str,
        code: str | None = None,
        field: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.message = message
        self.next_step = next_step
        self.field = field
        self.details = details or {}

    def as_json(self) -> dict[str, Any]:
        """The one shape of an error, on pages, in JSON and in events."""
        return {"code": self.code, "message": self.message, "next_step": self.next_step, "field": self.field}


class Invalid(TrellisError):
    """One or more values cannot be used. `fields` holds one entry for each of them."""

    code = "invalid"

    def __init__(
        self,
        message: str,
        *,
        next_step: str,
        field: str | None = None,
        code: str | None = None,
        fields: list[dict[str, str]] | None = None,
    ) -> None:
        super().__init__(message, next_step=next_step, field=field, code=code)
        self.fields = fields if fields is not None else [{"field": field or "", "message": message}]

    def as_json(self) -> dict[str, Any]:
        return super().as_json() | {"fields": self.fields}


class NotFound(TrellisError):
    code = "not_found"


class Conflict(TrellisError):
    code = "conflict"


class Refused(TrellisError):
    code = "refused"


class EngineError(TrellisError):
    code = "engine_error"


class EngineDied(EngineError):
    code = "engine_died"


class WeightsMissing(EngineError):
    code = "weights_missing"

    def __init__(self, weights: str) -> None:
        super().__init__(
            f"The weights “{weights}” are not on disk.",
            next_step="They will be recomputed from your choices.",
            details={"weights": weights},
        )
        self.weights = weights


class EngineStopped(EngineError):
    code = "unloaded"


class LoadFailed(EngineError):
    code = "load_failed"


def internal_error(reference: str) -> TrellisError:
    """The error shown for a bug, whose details are in the log under a reference."""
    return TrellisError(
        "Something went wrong.", code="internal", next_step=f"Try again. Error ID {reference} (see the log)."
    )


def shorten(value: object, limit: int = 60) -> str:
    """A value as it is quoted in a message: never long, on one line, and always text that can be encoded."""
    text = " ".join(str(value)[: 20 * limit].encode("utf-8", "replace").decode().split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
