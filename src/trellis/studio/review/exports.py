"""Taking the result away: an adapter that PEFT loads, or a model with the adapter merged in, each as a folder.

An adapter is copied; a merge runs in an engine of its own (engine/learning/merging.py), which may be cancelled and
proves its result. A folder is there whole or not at all.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from ... import __version__
from ...blobs import Blobs, fsync
from ...errors import Conflict, EngineError, Invalid, LoadFailed, NotFound, shorten
from ...memory_estimates import LIBRARIES
from ...messages import Merge, Merged, Plant, Progress
from ...params import Adapter
from ...safetensors_files import shapes_in
from ...workers.worker import Spawn, Worker
from ..jobs import Job, Jobs, timestamp
from ..models.catalog import Catalog, ModelEntry
from ..models.devices import free_memory
from ..steering.session import Session
from ..steering.sessions import Sessions
from ..steering.tree import Node, drift_of

P = ParamSpec("P")
R = TypeVar("R")
Kind = Literal["adapter", "merged"]
DISK_RESERVE_BYTES = 200_000_000
MANIFEST_NAME = "trellis.json"
_EXPORT_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")
PROBE_PROMPTS = ("Tell me about yourself.", "What is rain?", "How do I bake bread?", "Why is the sky blue?")
"""What a merged model is compared on, beside the session's own prompts."""


class Exports:
    """`folder` holds a folder for each export."""

    def __init__(
        self, jobs: Jobs, steering: Sessions, catalog: Catalog, spawn: Spawn, weights: Blobs, folder: Path
    ) -> None:
        self._jobs = jobs
        self._steering = steering
        self._catalog = catalog
        self._spawn = spawn
        self._names_in_progress: set[str] = set()
        self._weights = weights
        self.folder = folder

    def sweep(self) -> None:
        """Remove what a crash left half written."""
        with suppress(FileNotFoundError):
            for work in self.folder.glob(".work-*"):
                shutil.rmtree(work, ignore_errors=True)

    async def start(
        self, session_id: str, kind: Kind, name: str, node_id: str | None = None, request: str | None = None
    ) -> Job:
        """Begin an export. Raises Invalid for a name that cannot be one, Conflict for one that is taken."""
        session = await self._steering.session(session_id)
        node = session.node(node_id) if node_id else session.tree.head
        if not _EXPORT_NAME_PATTERN.fullmatch(name) or name.endswith((".", " ")):
            raise Invalid(
                f"name: “{shorten(name)}” cannot be the name of a folder.",
                field="name",
                next_step="Use letters, digits, spaces and “.-_”, beginning with a letter or digit.",
            )
        if not node.weights:
            raise Conflict(
                "The session is not ready yet.", code="offer_not_ready", next_step="Wait for the first options."
            )
        body = {"session": session_id, "kind": kind, "name": name, "node": node.id}
        if request and (known_job := await self._jobs.find_row_by_request(request, "export")):
            if (known_job["body"]["session"], known_job["body"]["kind"], known_job["body"]["name"]) == (
                session_id,
                kind,
                name,
            ):
                body = known_job["body"]  # the head may have moved since; it is the same action all the same
        elif name in self._names_in_progress or (self.folder / name).exists():
            raise Conflict(f"There is an export “{name}” already.", code="exists", next_step="Choose another name.")
        return await self._jobs.start("export", body, lambda job: self._run(job, session, node, kind, name), request)

    async def list_exports(self) -> list[dict[str, Any]]:
        """What was exported, the newest first."""
        return await asyncio.to_thread(self._list)

    async def get(self, name: str) -> dict[str, Any]:
        """Raises NotFound."""
        return await asyncio.to_thread(self._read_manifest, name)

    async def delete(self, name: str) -> None:
        """Raises NotFound."""
        await self.get(name)

        def remove() -> None:
            trash_folder = self.folder / f".work-deleted-{uuid.uuid4().hex}"
            with suppress(FileNotFoundError):  # deleted twice at once is deleted
                (self.folder / name).rename(trash_folder)
            shutil.rmtree(trash_folder, ignore_errors=True)

        await asyncio.to_thread(remove)

    async def files(self, name: str) -> list[tuple[str, Path]]:
        """(name in the archive, file) of all that an export holds. Raises NotFound."""
        await self.get(name)
        root = self.folder / name
        return await asyncio.to_thread(
            lambda: [
                (f"{name}/{file.relative_to(root)}", file)
                for file in sorted(root.rglob("*"))
                if file.is_file() and not file.is_symlink()
            ]
        )

    async def _run(self, job: Job, session: Session, node: Node, kind: Kind, name: str) -> dict[str, Any]:
        job.report_progress(Progress(stage="reading", fraction=0.0, message="Getting the weights of this step"))
        work = self.folder / f".work-{job.id}"
        self._names_in_progress.add(name)
        try:
            async with session.nodes.hold_weights(node, verify=True):
                entry = await self._catalog.find(session.config.model)
                if kind == "adapter":
                    checks = await self._export_adapter(job, session, node, entry, work)
                else:
                    checks = await self._export_merged(job, session, node, entry, work)
                return await _run_to_completion(self._publish, work, session, node, kind, name, checks)
        finally:
            self._names_in_progress.discard(name)
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, work, True))

    async def _export_adapter(
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
            return {"tensors": len(shapes_in(tensors)), "same_as_in_the_session": is_identical}

        return await _run_to_completion(write)

    async def _export_merged(
        self, job: Job, session: Session, node: Node, entry: ModelEntry, work: Path
    ) -> dict[str, Any]:
        folder = await self._model_folder(session, entry)
        size = await asyncio.to_thread(lambda: sum(file.stat().st_size for file in folder.glob("*.safetensors")))
        self._require_space(max(size, 2 * entry.parameters))  # quantised weights are unpacked to 16 bits
        await asyncio.to_thread(self.folder.mkdir, parents=True, exist_ok=True)
        prompts = [session.prompts.at(place) for place in range(8)] if session.prompts else []
        probes = tuple(
            session.requests.prompt(text)
            for text in dict.fromkeys([session.config.control_prompt, *PROBE_PROMPTS, *prompts])
            if text
        )
        job.report_progress(Progress(stage="connecting", fraction=0.0, message="Starting an engine for the merge"))
        worker = await Worker.start(self._spawn)
        try:
            request = Merge(
                path=str(folder), weights=node.weights, into=str(work), probes=probes,
                root=session.tree.root.weights, remote_code=session.config.remote_code,
                plant=Plant(adapter=session.config.extract(Adapter), seed=session.config.seed),
            )  # fmt: skip
            async for event in worker.stream(request):
                if isinstance(event, Progress):
                    job.report_progress(event)
                elif isinstance(event, Merged):
                    return event.model_dump(exclude={"type", "files"}) | {"prompts": len(probes)}
        finally:
            await asyncio.shield(worker.stop(patience=0.2))
        raise EngineError("The merge ended without a result.", code="engine_error", next_step="Try again.")

    async def _model_folder(self, session: Session, entry: ModelEntry) -> Path:
        """Where the base model's files lie; those of a hub model are there once it has been loaded."""
        if not entry.repository:
            return entry.path
        found = await asyncio.to_thread(self._catalog.downloaded_folder, entry.repository, session.config.revision)
        if found is None:
            raise LoadFailed(
                f"The files of “{entry.id}” are not here any more.", code="not_found", next_step="Load the model again."
            )
        return found

    def _require_space(self, size: int) -> None:
        """Raises LoadFailed when disk or memory cannot hold the merged model, whose base has files of this size."""
        needed_memory, free_now = 2 * size + LIBRARIES, free_memory()  # the merged model, and what was written of it
        if needed_memory > free_now:
            raise LoadFailed(
                f"Merging needs about {needed_memory / 1e9:.1f} GB of memory, and {free_now / 1e9:.1f} GB are free.",
                code="out_of_memory",
                next_step="Unload models that are not needed, or export the adapter.",
            )
        existing_folder = self.folder
        while not existing_folder.exists():
            existing_folder = existing_folder.parent
        free, needed = shutil.disk_usage(existing_folder).free, int(size * 1.05) + DISK_RESERVE_BYTES
        if needed > free:
            raise LoadFailed(
                f"The merged model needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on the disk of "
                f"“{self.folder}”.",
                code="disk_full",
                next_step="Make room there, or export the adapter, which is far smaller.",
            )

    def _publish(
        self, work: Path, session: Session, node: Node, kind: Kind, name: str, checks: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the model card, name the folder, and say what is in it."""
        manifest = {
            "name": name, "kind": kind, "session": session.id, "session_name": session.name, "node": node.id,
            "step": node.step, "drift": drift_of(node, session.tree), "model": session.config.model,
            "revision": session.config.revision, "created": timestamp(time.time()), "version": __version__,
            "checks": checks,
        }  # fmt: skip
        (work / "README.md").write_text(model_card(session, node, kind, name, checks), encoding="utf-8")
        exported_files = sorted(file for file in work.rglob("*") if file.is_file())
        files = {str(file.relative_to(work)): file.stat().st_size for file in exported_files}
        manifest |= {"files": files, "bytes": sum(files.values())}
        (work / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1))
        for file in [*work.rglob("*"), work]:
            fsync(file)
        target = self.folder / name
        if target.exists():
            raise Conflict(f"There is an export “{name}” already.", code="exists", next_step="Choose another name.")
        work.rename(target)
        fsync(self.folder)
        return {"path": str(target), "name": name, "files": files, "bytes": manifest["bytes"], "checks": checks}

    def _list(self) -> list[dict[str, Any]]:
        manifests = []
        with suppress(FileNotFoundError):
            for folder in self.folder.iterdir():
                with suppress(NotFound):
                    manifests.append(self._read_manifest(folder.name))
        return sorted(manifests, key=lambda about: str(about["created"]), reverse=True)

    def _read_manifest(self, name: str) -> dict[str, Any]:
        try:
            if not _EXPORT_NAME_PATTERN.fullmatch(name):
                raise ValueError
            manifest: dict[str, Any] = json.loads((self.folder / name / MANIFEST_NAME).read_text())
            if not isinstance(manifest, dict) or not {"created", "session", "kind", "checks", "files", "bytes"} <= set(
                manifest
            ):
                raise ValueError
        except (OSError, ValueError):
            raise NotFound(
                f"There is no export “{shorten(name)}”.", next_step="Exports are listed on a session's review page."
            ) from None
        return manifest | {"path": str(self.folder / name)}


async def _run_to_completion(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run in a thread, and do not let go before it has ended, cancelled or not: it writes into a folder of ours."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def model_card(session: Session, node: Node, kind: Kind, name: str, checks: dict[str, Any]) -> str:
    """What a person who finds the folder must know, in the layout of the Hugging Face hub."""
    config, path = session.config, session.tree.path(node.id)
    learned = [each for each in path if each.has_learned]
    adapter = config.extract(Adapter)
    base = config.model if "/" in config.model else f"the model “{config.model}”"
    library = "peft" if kind == "adapter" else "transformers"
    on_hub = [f"base_model: {config.model}"] if "/" in config.model else []
    front_matter = ["---", f"library_name: {library}", *on_hub, "tags: [trellis, steering]", "---"]
    system = [f"> {line}" for line in config.system_prompt.splitlines()]
    system_prompt_lines = ["Said to the model before every prompt:", "", *system, ""] if system else []
    if kind == "adapter":
        load = [
            "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
            'base = AutoModelForCausalLM.from_pretrained("path or name of the base model")',
            f'model = PeftModel.from_pretrained(base, "{name}")',
        ]  # fmt: skip
        checks_text = f"{checks.get('tensors', 0)} tensors, the same bytes as in the session."
    else:
        load = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ]  # fmt: skip
        checks_text = (
            f"Written in {checks.get('dtype')}, read again, and compared with base and adapter on "
            f"{checks.get('tokens')} tokens of answers to {checks.get('prompts')} prompts. The log-probabilities "
            f"differ by {checks.get('mean_difference', 0):.2g} nats on average and "
            f"{checks.get('largest_difference', 0):.2g} at most; the likeliest token is the same in "
            f"{checks.get('agreement', 0):.1%} of all places. Generation settings, the tokens that end an answer "
            f"({', '.join(map(str, checks.get('ends', ()))) or 'none'}), chat templates and tokenizer are the base's; "
            f"{checks.get('conversations', 0)} conversations are written in the same words."
        )
    lines = [
        *front_matter, "", f"# {name}", "",
        f"Grown from {base} by hand with Trellis {__version__}: {len(learned)} choices between "
        f"answers, each learned at once. Session “{' '.join(session.name.split())}”, step {node.step}, drift "
        f"{drift_of(node, session.tree):.2%}.", "",
        "## Use", "", "```python", *load, "```", "",
        *system_prompt_lines,
        "## How it was grown", "",
        f"- Base: `{config.model}`" + (f", revision `{config.revision}`" if config.revision else ""),
        *(
            [f"- Grown on a base rounded to {config.precision}: on the whole one it answers a little differently"]
            if config.precision in ("8-bit", "4-bit") else []
        ),
        f"- Adapter: LoRA, rank {adapter.lora_rank}, alpha {adapter.lora_alpha}, dropout {adapter.lora_dropout}, on "
        f"{adapter.target_modules}",
        f"- Learning: {config.learning_method}, rate {config.learning_rate}, KL strength {config.kl_beta}",
        f"- Answers were drawn at temperature {config.temperature}, top-p {config.top_p}, min-p {config.min_p}", "",
        "## Checked", "", checks_text, "",
        "The licence of the base model holds for this too.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def stream_zip(files: list[tuple[str, Path]], chunk_size: int = 1 << 18) -> Iterator[bytes]:
    """A zip of files as it is made: stored and not compressed, since weights do not compress. Bounded memory."""
    import zipfile

    buffer = _ZipBuffer()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for name, file in files:
            info = zipfile.ZipInfo.from_file(file, name)
            with archive.open(info, "w", force_zip64=True) as entry, file.open("rb") as source:
                while chunk := source.read(chunk_size):
                    entry.write(chunk)
                    yield buffer.pop()
            yield buffer.pop()
    yield buffer.pop()


class _ZipBuffer:
    """A file that can only be written to, and is emptied as it grows."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._chunks.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        return

    def pop(self) -> bytes:
        taken, self._chunks = b"".join(self._chunks), []
        return taken
