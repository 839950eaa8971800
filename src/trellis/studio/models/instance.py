"""One model in one engine: loaded, or being loaded."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from ...errors import EngineError
from ...messages import Load, Loaded, Status, StatusReport
from ...options import ModelOptions
from ...workers.worker import Worker
from ..jobs import Job
from .catalog import ModelEntry
from .template_options import broken_template_error


@dataclass
class ModelInstance:
    """A model that is loaded, or being loaded: `worker` and `loaded` are None until it is."""

    entry: ModelEntry
    options: ModelOptions
    job: Job
    worker: Worker | None = None
    loaded: Loaded | None = None
    last_used: float = field(default_factory=time.monotonic)

    @property
    def is_alive(self) -> bool:
        """Whether its engine runs, or is still being loaded."""
        if self.worker:
            return self.worker.is_alive
        return self.job.task is not None and not self.job.task.done()

    async def as_json(self) -> dict[str, Any]:
        memory = None
        if self.worker and self.worker.is_alive:
            with suppress(EngineError, asyncio.TimeoutError):
                report = await asyncio.wait_for(self.worker.ask(Status(), priority=-1), 0.25)
                memory = report.resident_bytes if isinstance(report, StatusReport) else None
        loaded = self.loaded
        template_problem = broken_template_error(self.entry.id, loaded) if loaded else None
        return {
            "state": "loaded" if self.worker else "loading",
            "precision": self.options.precision if not loaded else loaded.dtype,
            "revision": self.options.revision,
            "device": loaded.device if loaded else None,
            "memory": memory,
            "template_problem": template_problem.as_json() if template_problem else None,
            "job": self.job.id,
        }


def resident_bytes(worker: Worker) -> int:
    """Return the resident memory of an engine in bytes; 0 when it is gone."""
    try:
        return int(psutil.Process(worker.pid).memory_info().rss) if worker.pid else 0
    except psutil.Error:
        return 0


def load_request(entry: ModelEntry, options: ModelOptions, allow_download: bool) -> Load:
    return Load(
        path=str(entry.path), repository=entry.repository, revision=options.revision, precision=options.precision,
        device=options.device, engine=options.engine, remote_code=options.remote_code, fetches=allow_download,
    )  # fmt: skip
