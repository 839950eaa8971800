"""Whether a model fits into the memory that is free, and which options would make it fit."""

from __future__ import annotations

from typing import Any

from ...errors import EngineDied, EngineError, LoadFailed, TrellisError
from ...memory_estimates import changes_that_fit, estimate_memory
from ...options import ModelOptions, Precision, SessionConfig
from .catalog import ModelEntry
from .devices import free_gpu_memory, free_memory


class MemoryFit:
    """Compares estimates with free memory. `limit` is the most bytes that one engine may take, 0 for no limit."""

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit

    def free_bytes(self, options: ModelOptions) -> int:
        on_gpu = free_gpu_memory() if options.device in ("auto", "cuda") else None
        return on_gpu if on_gpu is not None else free_memory(self._limit)

    def estimate_fit(self, entry: ModelEntry, config: SessionConfig, is_loaded: bool) -> dict[str, Any]:
        """Return the memory that a session needs, what is free, and options under which it would fit."""
        precision, free = resolve_precision(config), self.free_bytes(config)
        needed = estimate_memory(entry.shape, config, precision)
        missing = needed.total - (needed.loading if is_loaded else 0)
        fits = missing <= free or not entry.parameters
        alternatives = [] if fits else list(changes_that_fit(entry.shape, config, precision, free))
        return {
            "known": entry.parameters > 0,
            "precision": precision,
            "needed": needed.as_json(),
            "loaded": is_loaded,
            "free": free,
            "fits": fits,
            "would_fit": [{"change": change, "total": found.total} for change, found in alternatives],
        }

    def require_memory(self, entry: ModelEntry, options: ModelOptions) -> None:
        """Raise LoadFailed for a model whose weights alone do not fit."""
        if not entry.parameters:
            return
        config = SessionConfig().model_copy(update=options.model_dump())
        precision, free = resolve_precision(options), self.free_bytes(options)
        needed = estimate_memory(entry.shape, config, precision).loading
        if needed > free:
            raise LoadFailed(
                f"“{entry.id}” needs about {needed / 1e9:.1f} GB in {precision}; {free / 1e9:.1f} GB are free.",
                code="out_of_memory",
                next_step=self.suggest_precision(entry, options) or "Close other programs or choose a smaller model.",
            )

    def suggest_precision(self, entry: ModelEntry, options: ModelOptions) -> str:
        """Return the advice to load in a lower precision that fits; empty where none does."""
        precision, free = resolve_precision(options), self.free_bytes(options)
        for smaller_precision in ("16-bit", "8-bit", "4-bit"):
            needed = estimate_memory(entry.shape, SessionConfig(), smaller_precision).loading
            if int(smaller_precision.split("-")[0]) < int(precision.split("-")[0]) and needed <= free:
                return f"Load it in {smaller_precision}: about {needed / 1e9:.1f} GB."
        return ""

    def explain_load_error(self, error: EngineError, entry: ModelEntry, options: ModelOptions) -> TrellisError:
        """Return a load error with advice where memory was the cause."""
        if error.code == "engine_died" and "killed" in error.message:
            return EngineDied(  # EngineDied, not LoadFailed: it is retried, since there may be another cause
                f"The engine was killed while loading “{entry.id}”, most likely because memory ran out.",
                code="out_of_memory",
                next_step=self.suggest_precision(entry, options) or error.next_step,
            )
        if error.code == "out_of_memory" and (smaller := self.suggest_precision(entry, options)):
            return LoadFailed(error.message, code=error.code, next_step=smaller)
        return error


def resolve_precision(options: ModelOptions) -> Precision:
    """Return the precision that “auto” will probably be: only the engine knows its device for sure."""
    if options.precision != "auto":
        return options.precision
    on_gpu = options.device in ("cuda", "mps") or (options.device == "auto" and free_gpu_memory() is not None)
    return "16-bit" if on_gpu else "32-bit"
