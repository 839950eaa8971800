"""The models that the studio knows, and the engines that hold them: one process for each loaded model."""

from __future__ import annotations

import asyncio
import importlib.resources
import json
import math
import re
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Conflict, EngineDied, EngineError, NotFound, shorten
from ..messages import Load, Loaded, Progress, Status, StatusReport
from ..workers.worker import Spawn, Worker
from .jobs import Job, Jobs

DEMO = "demo"
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HEADER_LIMIT = 100 * 1024 * 1024

UNREADABLE = (OSError, ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError, struct.error)
"""What reading a file that anyone may have written can raise."""


@dataclass(frozen=True)
class ModelEntry:
    """A model on disk. Bytes are of its files; parameters are counted from their headers."""

    id: str
    source: str
    path: Path
    bytes: int
    parameters: int
    architecture: str

    @property
    def memory_estimate(self) -> int:
        """Bytes that an engine needs for it: 32-bit weights, the libraries, and room for answers and gradients."""
        return 4 * self.parameters + 510_000_000 + 8 * self.parameters


@dataclass
class Held:
    """A model that is loaded or being loaded."""

    entry: ModelEntry
    job: Job
    worker: Worker | None = None
    loaded: Loaded | None = None

    @property
    def in_use(self) -> bool:
        """Whether its engine lives, or is still on its way."""
        if self.worker:
            return self.worker.alive
        return self.job.task is not None and not self.job.task.done()


class Models:
    """Finds models, loads and unloads them. It does not know sessions."""

    def __init__(self, jobs: Jobs, spawn: Spawn, folder: Path) -> None:
        self._jobs = jobs
        self._spawn = spawn
        self._folder = folder
        self._held: dict[str, Held] = {}
        self._lock = asyncio.Lock()

    async def close(self) -> None:
        await asyncio.gather(*(held.worker.stop() for held in self._held.values() if held.worker))
        self._held.clear()

    async def find(self, model_id: str, field: str | None = None) -> ModelEntry:
        """Raises NotFound, which lists what there is."""
        folders = await asyncio.to_thread(self._folders)
        if model_id in folders:
            return await asyncio.to_thread(_read_entry, model_id, *folders[model_id])
        raise NotFound(
            f"There is no model “{shorten(model_id)}”. Known: {shorten(', '.join(folders), 400)}.",
            code="model_not_found",
            field=field,
            next_step=f"Choose one of these, or put a model's folder into {self._folder}.",
        )

    async def list(self) -> list[dict[str, Any]]:
        entries = await asyncio.to_thread(
            lambda: [_read_entry(name, *place) for name, place in self._folders().items()]
        )
        return [await self._describe(entry) for entry in entries]

    async def load(self, model_id: str, request: str | None = None) -> Job:
        """Start loading, or return the job that is at it or has done it."""
        entry = await self.find(model_id, field="model")
        async with self._lock:
            held = self._held.get(model_id)
            if held and held.in_use:
                return held.job
            job = await self._jobs.start("load", {"model": model_id}, lambda job: self._load(entry, job), request)
            if job.row["body"] != {"model": model_id}:
                raise Conflict(
                    "This Idempotency-Key was used for another model.",
                    code="key_reused",
                    next_step="Send a key of its own with each action.",
                )
            if job.task is not None and not job.task.done():  # a repeated request is answered with its old job
                self._held[model_id] = Held(entry, job)
            return job

    async def engine(self, model_id: str, follow: Callable[[Progress], None]) -> Worker:
        """A loaded engine of a model, loading it if need be. Raises the reason when that fails."""
        for _ in range(3):
            if (worker := self._worker(model_id)) is not None:
                return worker
            job = await self.load(model_id)
            job.followers.append(follow)
            try:
                if job.task and not job.task.done():
                    await asyncio.wait([job.task])
            finally:
                with suppress(ValueError):
                    job.followers.remove(follow)
            if (worker := self._worker(model_id)) is not None:
                return worker
            if job.failure:
                raise job.failure
            if job.row["state"] == "cancelled":
                raise EngineError("Loading was cancelled.", code="cancelled", next_step="Load the model again.")
        raise EngineDied("The engine ended right after it had loaded the model.", next_step="Load the model again.")

    async def unload(self, model_id: str) -> None:
        """Stop the engine of a model and give its memory back. Raises Conflict when it is not loaded."""
        await self.find(model_id)
        held = self._held.get(model_id)
        if held is None:
            raise Conflict(
                f"The model “{model_id}” is not loaded.",
                code="not_loaded",
                next_step="There is nothing to unload.",
            )
        if held.worker is None:
            await self._jobs.cancel(held.job.id)
            return
        del self._held[model_id]
        await held.worker.stop()

    def _worker(self, model_id: str) -> Worker | None:
        held = self._held.get(model_id)
        return held.worker if held and held.worker and held.worker.alive else None

    def state(self, model_id: str) -> str:
        held = self._held.get(model_id)
        if held is None:
            return "unloaded"
        return "loaded" if held.worker else "loading"

    async def _load(self, entry: ModelEntry, job: Job) -> dict[str, Any]:
        job.progress(Progress(stage="connecting", fraction=0.0, message="Starting an engine"))
        worker: Worker | None = None
        ready = False
        try:
            worker = started = await Worker.start(self._spawn)
            job.progress(Progress(stage="initializing", fraction=0.01, message="Starting the engine"))
            loaded: Loaded | None = None
            async for event in worker.stream(Load(path=str(entry.path))):
                if isinstance(event, Progress):
                    job.progress(event)
                elif isinstance(event, Loaded):
                    loaded = event
            assert loaded is not None
            held = self._held[entry.id]
            held.worker, held.loaded = worker, loaded
            worker.on_death = lambda error: self._lost(entry.id, started)
            ready = True
            job.progress(Progress(stage="ready", fraction=1.0, message="Ready"))
            return loaded.model_dump(exclude={"type"})
        finally:
            if not ready:
                self._held.pop(entry.id, None)
                if worker:
                    await asyncio.shield(worker.stop(patience=0.2))

    def _lost(self, model_id: str, worker: Worker) -> None:
        held = self._held.get(model_id)
        if held and held.worker is worker:
            del self._held[model_id]

    async def _describe(self, entry: ModelEntry) -> dict[str, Any]:
        held = self._held.get(entry.id)
        resident = None
        if held and held.worker and held.worker.alive:
            with suppress(EngineError, asyncio.TimeoutError):
                report = await asyncio.wait_for(held.worker.ask(Status(), priority=-1), 0.25)
                resident = report.resident_bytes if isinstance(report, StatusReport) else None
        return {
            "id": entry.id,
            "kind": "text",
            "source": entry.source,
            "size": entry.bytes,
            "parameters": entry.parameters,
            "architecture": entry.architecture,
            "state": self.state(entry.id),
            "memory_estimate": entry.memory_estimate,
            "memory": resident,
            "device": held.loaded.device if held and held.loaded else None,
            "job": held.job.id if held else None,
        }

    def _folders(self) -> dict[str, tuple[str, Path]]:
        """Names of models with where they are from and their folders. A name is never a path."""
        folders = {DEMO: ("shipped", Path(str(importlib.resources.files("trellis.demo"))) / "model")}
        with suppress(OSError):
            for folder in sorted(self._folder.iterdir()):
                if _FOLDER_NAME.fullmatch(folder.name) and folder.name != DEMO and (folder / "config.json").is_file():
                    folders[folder.name] = ("folder", folder)
        return folders


def _read_entry(name: str, source: str, path: Path) -> ModelEntry:
    """What a folder says of itself. One that cannot be read is listed all the same; loading it says what is wrong."""
    architecture, size, parameters = "unreadable", 0, 0
    with suppress(*UNREADABLE):
        config = json.loads((path / "config.json").read_text())
        architecture = str((config.get("architectures") or [config.get("model_type", "unknown")])[0])
    with suppress(*UNREADABLE):
        for file in path.glob("*.safetensors"):
            size += file.stat().st_size
            parameters += _count_parameters(file)
    return ModelEntry(name, source, path, size, parameters, architecture)


def _count_parameters(file: Path) -> int:
    """The number of values in a safetensors file, from its header alone. Raises one of UNREADABLE."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(_HEADER_LIMIT, file.stat().st_size):
            raise ValueError("the header is larger than its file")
        header = json.loads(stream.read(length))
    return sum(math.prod(about["shape"]) for name, about in header.items() if name != "__metadata__")
