"""The engines that hold models: one process for each model as it is loaded, ended when nobody uses it any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from ...errors import Conflict, EngineDied, EngineError, LoadFailed, NotFound, TrellisError, shorten
from ...memory_estimates import changes_that_fit, estimate_memory
from ...messages import Load, Loaded, Progress, Status, StatusReport
from ...model_files import Problem
from ...params import ModelOptions, Precision, SessionConfig
from ...workers.worker import Spawn, Worker
from ..jobs import Job, Jobs
from .catalog import Catalog, ModelEntry
from .devices import free_gpu_memory, free_memory
from .template_options import broken_template_error

log = logging.getLogger(__name__)


@dataclass
class ModelInstance:
    """A model that is loaded or being loaded."""

    entry: ModelEntry
    options: ModelOptions
    job: Job
    worker: Worker | None = None
    loaded: Loaded | None = None
    last_used: float = field(default_factory=time.monotonic)

    @property
    def is_alive(self) -> bool:
        """Whether its engine lives, or is still on its way."""
        if self.worker:
            return self.worker.is_alive
        return self.job.task is not None and not self.job.task.done()


class Models:
    """Loads and unloads models. It does not know sessions.

    `memory_limit`: bytes that one engine may take, 0 for no limit. `idle_seconds`: how long a model stays loaded
    that nobody uses, 0 for always.
    """

    def __init__(
        self, jobs: Jobs, spawn: Spawn, catalog: Catalog, memory_limit: int = 0, idle_seconds: float = 0.0
    ) -> None:
        self.catalog = catalog
        self._jobs = jobs
        self._spawn = spawn
        self._memory_limit = memory_limit
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
        """All models, each with the engines that hold it."""
        entries = await self.catalog.list_models()
        known_ids = {entry.id for entry in entries}
        loading_entries = [
            instance.entry for instance in self._instances.values() if instance.entry.id not in known_ids
        ]
        return [await self._model_json(entry) for entry in [*entries, *dict.fromkeys(loading_entries)]]

    async def load(self, options: ModelOptions, request: str | None = None, allow_download: bool = True) -> Job:
        """Start loading, or return the job that is at it or has done it. Unless it `fetches`, the hub is not asked.

        Raises NotFound, or LoadFailed for a model that cannot be loaded or does not fit into the memory that is free.
        """
        entry = await self.catalog.find(options.model, field="model")
        if entry.problem:
            raise entry.problem
        async with self._lock:
            instance = self._instances.get(options)
            if instance and instance.is_alive:
                return instance.job
            self._require_memory(entry, options)
            body = options.model_dump(mode="json", exclude_defaults=True) | {"model": options.model}
            job = await self._jobs.start(
                "load", body, lambda job: self._load(entry, options, job, allow_download), request
            )
            if job.task is not None and not job.task.done():  # a repeated request is answered with its old job
                self._instances[options] = ModelInstance(entry, options, job)
            return job

    async def engine(
        self, options: ModelOptions, on_progress: Callable[[Progress], None], allow_download: bool = True
    ) -> Worker:
        """A loaded engine of a model, loading it if need be; from what is here alone, unless it `fetches`. Raises the
        reason when that fails."""
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
        raise EngineDied("The engine ended right after it had loaded the model.", next_step="Load the model again.")

    async def unload(self, model_id: str) -> None:
        """End all engines of a model and give their memory back. Raises Conflict when there is none."""
        instances = [each for each in self._instances.values() if each.entry.id == model_id]
        if not instances:
            await self.catalog.find(model_id)
            raise Conflict(
                f"The model “{model_id}” is not loaded.",
                code="not_loaded",
                next_step="There is nothing to unload.",
            )
        for each in instances:
            self._unload_counts[each.options] += 1
            await self._stop_instance(each)

    async def delete(self, model_id: str) -> None:
        """Remove a model's files. Raises NotFound, or Conflict while it is loaded or when it is the demo."""
        if any(instance.entry.id == model_id for instance in self._instances.values()):
            raise Conflict(f"The model “{model_id}” is loaded.", code="loaded", next_step="Unload it first.")
        await self.catalog.delete(model_id)

    async def list_failed_loads(self) -> dict[str, dict[str, Any]]:
        """By model the last load of it, as a job, where that one failed."""
        last_loads: dict[str, dict[str, Any]] = {}
        for job in await self._jobs.list(["load"]):
            last_loads.setdefault(job["about"]["model"], job)
        return {model: job for model, job in last_loads.items() if job["state"] == "failed"}

    async def delete_failed_loads(self, model_id: str) -> None:
        """Remove the loads of a model that failed, and what a download that was never finished has left on the disk.

        Raises NotFound where none failed, or Conflict while the model is loading.
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
                f"No load of “{shorten(model_id)}” has failed.", next_step="The models are listed on the Models page."
            )
        await self._jobs.delete_ended(failed)
        await self.catalog.delete_partial(model_id)

    def unload_count(self, options: ModelOptions) -> int:
        """How often a person has unloaded it: who was at work with it then must not load it again by itself."""
        return self._unload_counts[options]

    def state(self, options: ModelOptions) -> str:
        instance = self._instances.get(options)
        if instance is None:
            return "unloaded"
        return "loaded" if instance.worker else "loading"

    def current_options(self, model_id: str) -> ModelOptions:
        """How a model is loaded at present, the one used last where that is in several ways; else the defaults."""
        instances = sorted(
            (each for each in self._instances.values() if each.entry.id == model_id), key=lambda each: each.last_used
        )
        return instances[-1].options if instances else ModelOptions(model=model_id)

    def loaded_info(self, options: ModelOptions) -> Loaded | None:
        """What its engine said of the model, None while it is not loaded."""
        instance = self._instances.get(options)
        return instance.loaded if instance else None

    def concurrency(self, options: ModelOptions) -> int:
        """How many requests its engine works on at once."""
        instance = self._instances.get(options)
        return instance.loaded.lanes if instance and instance.loaded else 1

    async def find_problem(self, entry: ModelEntry, options: ModelOptions) -> Problem | None:
        """What keeps a model from being loaded with these options, as far as its files say."""
        precision = self.resolve_precision(options)
        return await self.catalog.find_problem(entry, options.revision, precision, options.remote_code)

    def estimate_fit(self, entry: ModelEntry, config: SessionConfig) -> dict[str, Any]:
        """What a session would need, what is free, and under which options it would fit if it does not."""
        precision, free = self.resolve_precision(config), self.available_memory(config)
        needed = estimate_memory(entry.shape, config, precision)
        instance = self._instances.get(config.extract(ModelOptions))
        missing = needed.total - (needed.loading if instance and instance.worker else 0)
        fits = missing <= free or not entry.parameters
        alternatives = [] if fits else list(changes_that_fit(entry.shape, config, precision, free))
        return {
            "known": entry.parameters > 0,
            "precision": precision,
            "needed": needed.as_json(),
            "loaded": bool(instance and instance.worker),
            "free": free,
            "fits": fits,
            "would_fit": [{"change": change, "total": found.total} for change, found in alternatives],
        }

    def resolve_precision(self, options: ModelOptions) -> Precision:
        """What “auto” will be, as far as can be told from here."""
        if options.precision != "auto":
            return options.precision
        on_gpu = options.device in ("cuda", "mps") or (options.device == "auto" and free_gpu_memory() is not None)
        return "16-bit" if on_gpu else "32-bit"

    def available_memory(self, options: ModelOptions) -> int:
        on_gpu = free_gpu_memory() if options.device in ("auto", "cuda") else None
        return on_gpu if on_gpu is not None else free_memory(self._memory_limit)

    def _require_memory(self, entry: ModelEntry, options: ModelOptions) -> None:
        """Raises LoadFailed for a model whose weights alone cannot fit."""
        if not entry.parameters:
            return
        config = SessionConfig().model_copy(update=options.model_dump())
        precision, free = self.resolve_precision(options), self.available_memory(options)
        needed = estimate_memory(entry.shape, config, precision).loading
        if needed > free:
            raise LoadFailed(
                f"“{entry.id}” needs about {needed / 1e9:.1f} GB in {precision}, and {free / 1e9:.1f} GB are free.",
                code="out_of_memory",
                next_step=self._suggest_precision(entry, options) or "Close other programs, or choose a smaller model.",
            )

    def _suggest_precision(self, entry: ModelEntry, options: ModelOptions) -> str:
        """A way to load it with less, where there is one."""
        precision, free = self.resolve_precision(options), self.available_memory(options)
        for smaller_precision in ("16-bit", "8-bit", "4-bit"):
            needed = estimate_memory(entry.shape, SessionConfig(), smaller_precision).loading
            if int(smaller_precision.split("-")[0]) < int(precision.split("-")[0]) and needed <= free:
                return f"Load it in {smaller_precision}, which needs about {needed / 1e9:.1f} GB."
        return ""

    def _running_worker(self, options: ModelOptions) -> Worker | None:
        instance = self._instances.get(options)
        if instance and instance.worker and instance.worker.is_alive:
            instance.last_used = time.monotonic()
            return instance.worker
        return None

    async def _stop_instance(self, instance: ModelInstance) -> None:
        if instance.worker is None:
            with suppress(Conflict):  # it has ended meanwhile
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
        job.report_progress(Progress(stage="connecting", fraction=0.0, message="Starting an engine"))
        worker: Worker | None = None
        is_ready = False
        try:
            worker = started = await Worker.start(self._spawn)
            job.report_progress(Progress(stage="initializing", fraction=0.01, message="Starting the engine"))
            loaded: Loaded | None = None
            async for event in worker.stream(_load_request(entry, options, allow_download)):
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
            raise self._explain_load_error(error, entry, options) from error
        finally:
            if not is_ready:
                self._instances.pop(options, None)
                if worker:
                    memory_before = resident_bytes(worker)
                    await asyncio.shield(worker.stop(grace_seconds=0.2))
                    job.row["result"] = {"memory_before": memory_before, "memory_after": resident_bytes(worker)}

    def _explain_load_error(self, error: EngineError, entry: ModelEntry, options: ModelOptions) -> TrellisError:
        """A load that ran out of memory names a smaller way, where there is one."""
        if error.code == "engine_died" and "killed" in error.message:
            return EngineDied(  # which is tried again, since it may have been killed for another reason
                f"The engine was killed while it loaded “{entry.id}”, most often because memory ran out.",
                code="out_of_memory",
                next_step=self._suggest_precision(entry, options) or error.next_step,
            )
        if error.code == "out_of_memory" and (smaller := self._suggest_precision(entry, options)):
            return LoadFailed(error.message, code=error.code, next_step=smaller)
        return error

    def _on_engine_death(self, options: ModelOptions, worker: Worker) -> None:
        instance = self._instances.get(options)
        if instance and instance.worker is worker:
            del self._instances[options]
            self.on_changed(options)

    async def _model_json(self, entry: ModelEntry) -> dict[str, Any]:
        instances = [each for each in self._instances.values() if each.entry.id == entry.id]
        engines = [await self._engine_json(each) for each in instances]
        states = [engine["state"] for engine in engines]
        state = "loaded" if "loaded" in states else states[0] if states else "unloaded"
        first = next((engine for engine in engines if engine["state"] == state), None)
        precision = self.resolve_precision(instances[0].options if instances else ModelOptions(model=entry.id))
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

    async def _engine_json(self, instance: ModelInstance) -> dict[str, Any]:
        memory = None
        if instance.worker and instance.worker.is_alive:
            with suppress(EngineError, asyncio.TimeoutError):
                report = await asyncio.wait_for(instance.worker.ask(Status(), priority=-1), 0.25)
                memory = report.resident_bytes if isinstance(report, StatusReport) else None
        loaded = instance.loaded
        template_problem = broken_template_error(instance.entry.id, loaded) if loaded else None
        return {
            "state": "loaded" if instance.worker else "loading",
            "precision": instance.options.precision if not loaded else loaded.dtype,
            "revision": instance.options.revision,
            "device": loaded.device if loaded else None,
            "memory": memory,
            "template_problem": template_problem.as_json() if template_problem else None,
            "job": instance.job.id,
        }


def resident_bytes(worker: Worker) -> int:
    """Bytes of memory that an engine takes; 0 when it is gone."""
    try:
        return int(psutil.Process(worker.pid).memory_info().rss) if worker.pid else 0
    except psutil.Error:
        return 0


def _load_request(entry: ModelEntry, options: ModelOptions, allow_download: bool) -> Load:
    return Load(
        path=str(entry.path), repository=entry.repository, revision=options.revision, precision=options.precision,
        device=options.device, engine=options.engine, remote_code=options.remote_code, fetches=allow_download,
    )  # fmt: skip
