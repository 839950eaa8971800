"""The loaded models: one engine process for each, unloaded when it is idle for too long."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ...errors import Conflict, EngineDied, EngineError, NotFound, shorten
from ...memory_estimates import estimate_memory
from ...messages import Loaded, Progress
from ...model_files import Problem
from ...options import ModelOptions, SessionConfig
from ...workers.worker import Spawn, Worker
from ..jobs import Job, Jobs
from .catalog import Catalog, ModelEntry
from .instance import ModelInstance, load_request, resident_bytes
from .memory_fit import MemoryFit, resolve_precision

log = logging.getLogger(__name__)


class Models:
    """Loads and unloads models. It does not know sessions.

    `memory_limit`: the most bytes of one engine, 0 for no limit. `idle_seconds`: how long an unused model stays loaded,
    0 for always.
    """

    def __init__(
        self, jobs: Jobs, spawn: Spawn, catalog: Catalog, memory_limit: int = 0, idle_seconds: float = 0.0
    ) -> None:
        self.catalog = catalog
        self._jobs = jobs
        self._spawn = spawn
        self.memory = MemoryFit(memory_limit)
        self._idle_seconds = idle_seconds
        self._instances: dict[ModelOptions, ModelInstance] = {}
        self._unload_counts: Counter[ModelOptions] = Counter()
        self._lock = asyncio.Lock()
        self._idle_task: asyncio.Task[None] | None = None
        self.on_changed: Callable[[ModelOptions], None] = lambda options: None

    async def open(self) -> None:
        if self._idle_seconds:
            self._idle_task = asyncio.create_task(self._unload_idle_models(), name="idle models")

    async def close(self) -> None:
        if self._idle_task:
            self._idle_task.cancel()
        await asyncio.gather(*(instance.worker.stop() for instance in self._instances.values() if instance.worker))
        self._instances.clear()

    async def list_models(self) -> list[dict[str, Any]]:
        """Return all models as JSON, each with its engines."""
        entries = await self.catalog.list_models()
        known_ids = {entry.id for entry in entries}
        loading_entries = [
            instance.entry for instance in self._instances.values() if instance.entry.id not in known_ids
        ]
        return [await self._model_json(entry) for entry in [*entries, *dict.fromkeys(loading_entries)]]

    async def load(self, options: ModelOptions, request: str | None = None, allow_download: bool = True) -> Job:
        """Start loading, or return the job that is loading or has loaded it. Without `allow_download` only local files
        are used.

        Raise NotFound, or LoadFailed for a model that cannot be loaded or does not fit into free memory.
        """
        entry = await self.catalog.find(options.model, field="model")
        if entry.problem:
            raise entry.problem
        async with self._lock:
            instance = self._instances.get(options)
            if instance and instance.is_alive:
                return instance.job
            self.memory.require_memory(entry, options)
            body = options.model_dump(mode="json", exclude_defaults=True) | {"model": options.model}
            job = await self._jobs.start(
                "load", body, lambda job: self._load(entry, options, job, allow_download), request
            )
            if job.task is not None and not job.task.done():  # a repeated request returns its old, ended job
                self._instances[options] = ModelInstance(entry, options, job)
            return job

    async def engine(
        self, options: ModelOptions, on_progress: Callable[[Progress], None], allow_download: bool = True
    ) -> Worker:
        """Return the engine of a model, loading it first where needed. Raise why loading failed."""
        for _ in range(3):
            if (worker := self._running_worker(options)) is not None:
                return worker
            job = await self.load(options, allow_download=allow_download)
            job.progress_callbacks.append(on_progress)
            try:
                if job.task and not job.task.done():
                    await asyncio.wait([job.task])
            finally:
                with suppress(ValueError):
                    job.progress_callbacks.remove(on_progress)
            if (worker := self._running_worker(options)) is not None:
                return worker
            if job.failure:
                raise job.failure
            if job.row["state"] == "cancelled":
                raise EngineError("Loading was cancelled.", code="cancelled", next_step="Load the model again.")
        raise EngineDied("The engine stopped right after loading the model.", next_step="Load the model again.")

    async def unload(self, model_id: str) -> None:
        """Stop all engines of a model. Raise Conflict when there is none."""
        instances = [each for each in self._instances.values() if each.entry.id == model_id]
        if not instances:
            await self.catalog.find(model_id)
            raise Conflict(
                f"The model “{model_id}” is not loaded.", code="not_loaded", next_step="There is nothing to unload."
            )
        for each in instances:
            self._unload_counts[each.options] += 1
            await self._stop_instance(each)

    async def delete(self, model_id: str) -> None:
        """Delete a model's files. Raise NotFound, or Conflict while it is loaded or for the demo model."""
        if any(instance.entry.id == model_id for instance in self._instances.values()):
            raise Conflict(f"The model “{model_id}” is loaded.", code="loaded", next_step="Unload it first.")
        await self.catalog.delete(model_id)

    async def list_failed_loads(self) -> dict[str, dict[str, Any]]:
        """Return the last load job of each model, where it failed."""
        last_loads: dict[str, dict[str, Any]] = {}
        for job in await self._jobs.list(["load"]):
            last_loads.setdefault(job["about"]["model"], job)
        return {model: job for model, job in last_loads.items() if job["state"] == "failed"}

    async def delete_failed_loads(self, model_id: str) -> None:
        """Delete the failed loads of a model, and its partial download.

        Raise NotFound where none failed, or Conflict while the model is loading.
        """
        if any(instance.entry.id == model_id for instance in self._instances.values()):
            raise Conflict(f"The model “{model_id}” is loading or loaded.", code="loaded", next_step="Unload it first.")
        failed = [
            job["id"]
            for job in await self._jobs.list(["load"])
            if job["about"]["model"] == model_id and job["state"] in ("failed", "cancelled")
        ]
        if not failed:
            raise NotFound(
                f"“{shorten(model_id)}” has not failed to load.", next_step="See the Models page for all models."
            )
        await self._jobs.delete_ended(failed)
        await self.catalog.delete_partial(model_id)

    def unload_count(self, options: ModelOptions) -> int:
        """Return how often a person has unloaded the model: whoever used it then must not load it again by itself."""
        return self._unload_counts[options]

    def state(self, options: ModelOptions) -> str:
        instance = self._instances.get(options)
        if instance is None:
            return "unloaded"
        return "loaded" if instance.worker else "loading"

    def current_options(self, model_id: str) -> ModelOptions:
        """Return the options under which a model is loaded, last used first; else the defaults."""
        instances = sorted(
            (each for each in self._instances.values() if each.entry.id == model_id), key=lambda each: each.last_used
        )
        return instances[-1].options if instances else ModelOptions(model=model_id)

    def loaded_info(self, options: ModelOptions) -> Loaded | None:
        """Return what the engine reported of its model; None while it is not loaded."""
        instance = self._instances.get(options)
        return instance.loaded if instance else None

    def concurrency(self, options: ModelOptions) -> int:
        """Return how many requests the engine works on at once."""
        instance = self._instances.get(options)
        return instance.loaded.lanes if instance and instance.loaded else 1

    async def find_problem(self, entry: ModelEntry, options: ModelOptions) -> Problem | None:
        """Return why a model cannot be loaded with these options, as far as its files show."""
        precision = resolve_precision(options)
        return await self.catalog.find_problem(entry, options.revision, precision, options.remote_code)

    def estimate_fit(self, entry: ModelEntry, config: SessionConfig) -> dict[str, Any]:
        """Return the memory that a session needs, what is free, and options under which it would fit."""
        return self.memory.estimate_fit(entry, config, self.state(config.extract(ModelOptions)) == "loaded")

    def _running_worker(self, options: ModelOptions) -> Worker | None:
        instance = self._instances.get(options)
        if instance and instance.worker and instance.worker.is_alive:
            instance.last_used = time.monotonic()
            return instance.worker
        return None

    async def _stop_instance(self, instance: ModelInstance) -> None:
        if instance.worker is None:
            with suppress(Conflict):  # the job has just ended
                await self._jobs.cancel(instance.job.id)
            return
        self._instances.pop(instance.options, None)
        self.on_changed(instance.options)
        await instance.worker.stop()

    async def _unload_idle_models(self) -> None:
        while True:
            await asyncio.sleep(min(30.0, self._idle_seconds / 4))
            for instance in list(self._instances.values()):
                if instance.worker and instance.worker.is_busy:
                    instance.last_used = time.monotonic()
                elif instance.worker and time.monotonic() - instance.last_used > self._idle_seconds:
                    log.info("unloading %s, which nobody has used for a while", instance.entry.id)
                    await self._stop_instance(instance)

    async def _load(self, entry: ModelEntry, options: ModelOptions, job: Job, allow_download: bool) -> dict[str, Any]:
        job.report_progress(Progress(stage="connecting", fraction=0.0, message="Starting the engine"))
        worker: Worker | None = None
        is_ready = False
        try:
            worker = started = await Worker.start(self._spawn)
            job.report_progress(Progress(stage="initializing", fraction=0.01, message="Starting the engine"))
            loaded: Loaded | None = None
            async for event in worker.stream(load_request(entry, options, allow_download)):
                if isinstance(event, Progress):
                    job.report_progress(event)
                elif isinstance(event, Loaded):
                    loaded = event
            assert loaded is not None
            instance = self._instances[options]
            instance.worker, instance.loaded = worker, loaded
            instance.last_used = time.monotonic()
            worker.on_death = lambda error: self._on_engine_death(options, started)
            is_ready = True
            self.on_changed(options)
            job.report_progress(Progress(stage="ready", fraction=1.0, message="Ready"))
            return loaded.model_dump(exclude={"type"})
        except EngineError as error:
            raise self.memory.explain_load_error(error, entry, options) from error
        finally:
            if not is_ready:
                self._instances.pop(options, None)
                if worker:
                    memory_before = resident_bytes(worker)
                    await asyncio.shield(worker.stop(grace_seconds=0.2))
                    job.row["result"] = {"memory_before": memory_before, "memory_after": resident_bytes(worker)}

    def _on_engine_death(self, options: ModelOptions, worker: Worker) -> None:
        instance = self._instances.get(options)
        if instance and instance.worker is worker:
            del self._instances[options]
            self.on_changed(options)

    async def _model_json(self, entry: ModelEntry) -> dict[str, Any]:
        instances = [each for each in self._instances.values() if each.entry.id == entry.id]
        engines = [await each.as_json() for each in instances]
        states = [engine["state"] for engine in engines]
        state = "loaded" if "loaded" in states else states[0] if states else "unloaded"
        first = next((engine for engine in engines if engine["state"] == state), None)
        precision = resolve_precision(instances[0].options if instances else ModelOptions(model=entry.id))
        needed = estimate_memory(entry.shape, SessionConfig(), precision)
        return {
            "id": entry.id,
            "kind": "text",
            "source": entry.source,
            "size": entry.bytes,
            "parameters": entry.parameters,
            "architecture": entry.architecture,
            "problem": entry.problem.as_json() if entry.problem else None,
            "state": state,
            "memory_estimate": needed.total if entry.parameters else None,
            "memory": first["memory"] if first else None,
            "device": first["device"] if first else None,
            "job": first["job"] if first else None,
            "engines": engines,
        }
