"""The weight files of an export: an adapter that PEFT loads, or the base model with the adapter merged in.

An adapter is copied. A merge runs in an engine of its own, which may be cancelled and verifies its result
(engine/learning/merging.py). It does not know names of exports.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ...blobs import Blobs
from ...errors import EngineError, LoadFailed
from ...memory_estimates import LIBRARY_BYTES
from ...messages import CreateAdapter, Merge, Merged, Progress
from ...options import Adapter
from ...safetensors_files import read_shapes
from ...workers.worker import Spawn, Worker
from ..jobs import Job
from ..models import Catalog, ModelEntry, free_memory
from ..steering import Node, Session

P = ParamSpec("P")
R = TypeVar("R")
DISK_RESERVE_BYTES = 200_000_000
PROBE_PROMPTS = ("Tell me about yourself.", "What is rain?", "How do I bake bread?", "Why is the sky blue?")
"""The prompts on which a merged model is compared, beside the session's own."""


class WeightFiles:
    """Writes the weights of a node into a work folder, and returns what was verified. `folder` is on the disk that
    must have space for them."""

    def __init__(self, catalog: Catalog, spawn: Spawn, weights: Blobs, folder: Path) -> None:
        self._catalog, self._spawn, self._weights, self._folder = catalog, spawn, weights, folder

    async def write_adapter(
        self, job: Job, session: Session, node: Node, entry: ModelEntry, work: Path
    ) -> dict[str, Any]:
        job.report_progress(Progress(stage="writing", fraction=0.3, message="Writing the adapter"))
        source = self._weights.path(node.weights)

        def write() -> dict[str, Any]:
            work.mkdir(parents=True)
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                shutil.copyfile(source / file, work / file)
            config = work / "adapter_config.json"
            about = json.loads(config.read_text())
            about["base_model_name_or_path"] = entry.repository or str(entry.path)
            about["revision"] = session.config.revision or None
            config.write_text(json.dumps(about, indent=2))
            tensors = work / "adapter_model.safetensors"
            is_identical = tensors.read_bytes() == (source / tensors.name).read_bytes()
            return {"tensors": len(read_shapes(tensors)), "same_as_in_the_session": is_identical}

        return await run_to_completion(write)

    async def write_merged(
        self, job: Job, session: Session, node: Node, entry: ModelEntry, work: Path
    ) -> dict[str, Any]:
        folder = await self._model_folder(session, entry)
        size = await asyncio.to_thread(lambda: sum(file.stat().st_size for file in folder.glob("*.safetensors")))
        self._require_space(max(size, 2 * entry.parameters))  # quantized weights are unpacked to 16 bits
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        prompts = [session.prompts.at(place) for place in range(8)] if session.prompts else []
        probes = tuple(
            session.requests.prompt(text)
            for text in dict.fromkeys([session.config.control_prompt, *PROBE_PROMPTS, *prompts])
            if text
        )
        job.report_progress(Progress(stage="connecting", fraction=0.0, message="Starting the merge process"))
        worker = await Worker.start(self._spawn)
        try:
            request = Merge(
                path=str(folder), weights=node.weights, into=str(work), probes=probes,
                root=session.tree.root.weights, remote_code=session.config.remote_code,
                plant=CreateAdapter(adapter=session.config.extract(Adapter), seed=session.config.seed),
            )  # fmt: skip
            async for event in worker.stream(request):
                if isinstance(event, Progress):
                    job.report_progress(event)
                elif isinstance(event, Merged):
                    return event.model_dump(exclude={"type", "files"}) | {"prompts": len(probes)}
        finally:
            await asyncio.shield(worker.stop(grace_seconds=0.2))
        raise EngineError("The merge stopped without a result.", code="engine_error", next_step="Try again.")

    async def _model_folder(self, session: Session, entry: ModelEntry) -> Path:
        """Return the folder of the base model; a model on the hub has one once it has been loaded."""
        if not entry.repository:
            return entry.path
        found = await asyncio.to_thread(self._catalog.downloaded_folder, entry.repository, session.config.revision)
        if found is None:
            raise LoadFailed(
                f"The files of “{entry.id}” no longer exist.", code="not_found", next_step="Download the model again."
            )
        return found

    def _require_space(self, size: int) -> None:
        """Raise LoadFailed when disk or memory cannot hold the merged model. `size` is that of the base model."""
        needed_memory, free_now = (
            2 * size + LIBRARY_BYTES,
            free_memory(),
        )  # the merged model, and what was written of it
        if needed_memory > free_now:
            raise LoadFailed(
                f"Merging needs about {needed_memory / 1e9:.1f} GB of memory; {free_now / 1e9:.1f} GB is free.",
                code="out_of_memory",
                next_step="Unload a model, or export the adapter instead.",
            )
        existing_folder = self._folder
        while not existing_folder.exists():
            existing_folder = existing_folder.parent
        free, needed = shutil.disk_usage(existing_folder).free, int(size * 1.05) + DISK_RESERVE_BYTES
        if needed > free:
            raise LoadFailed(
                f"The merged model needs {needed / 1e9:.2f} GB of disk; {free / 1e9:.2f} GB is free in "
                f"“{self._folder}”.",
                code="disk_full",
                next_step="Free some disk space, or export the adapter: it is much smaller.",
            )


async def run_to_completion(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run in a thread and wait for its end even when cancelled, because it writes into a folder of ours."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
