"""Exports: folders with an adapter or a merged model, made by jobs, listed, downloaded and deleted.

A folder is there whole or not at all.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from ... import __version__
from ...blobs import Blobs, fsync
from ...errors import Conflict, Invalid, NotFound, shorten
from ...messages import Progress
from ...workers.worker import Spawn
from ..jobs import Job, Jobs, timestamp
from ..models import Catalog
from ..steering import Node, Session, Sessions, drift_of
from .model_card import Kind, model_card
from .weight_files import WeightFiles, run_to_completion

MANIFEST_NAME = "trellis.json"
_EXPORT_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")


class Exports:
    """The exports in `folder`, one folder each."""

    def __init__(
        self, jobs: Jobs, steering: Sessions, catalog: Catalog, spawn: Spawn, weights: Blobs, folder: Path
    ) -> None:
        self._jobs = jobs
        self._steering = steering
        self._catalog = catalog
        self._weight_files = WeightFiles(catalog, spawn, weights, folder)
        self._names_in_progress: set[str] = set()
        self.folder = folder

    def sweep(self) -> None:
        """Remove half-written exports after a crash."""
        with suppress(FileNotFoundError):
            for work in self.folder.glob(".work-*"):
                shutil.rmtree(work, ignore_errors=True)

    async def start(
        self, session_id: str, kind: Kind, name: str, node_id: str | None = None, request: str | None = None
    ) -> Job:
        """Start an export. Raise Invalid for a bad name, Conflict for one that is taken."""
        session = await self._steering.session(session_id)
        node = session.node(node_id) if node_id else session.tree.head
        if not _EXPORT_NAME_PATTERN.fullmatch(name) or name.endswith((".", " ")):
            raise Invalid(
                f"name: “{shorten(name)}” isn't a valid folder name.",
                field="name",
                next_step="Use letters, digits, spaces and “.-_”, starting with a letter or digit.",
            )
        if not node.weights:
            raise Conflict(
                "The session is not ready yet.", code="offer_not_ready", next_step="Wait for the first answers."
            )
        body = {"session": session_id, "kind": kind, "name": name, "node": node.id}
        if request and (known_job := await self._jobs.find_row_by_request(request, "export")):
            if (known_job["body"]["session"], known_job["body"]["kind"], known_job["body"]["name"]) == (
                session_id,
                kind,
                name,
            ):
                body = known_job["body"]  # a repeated request: the head may have moved since
        elif name in self._names_in_progress or (self.folder / name).exists():
            raise Conflict(f"An export named “{name}” already exists.", code="exists", next_step="Choose another name.")
        return await self._jobs.start("export", body, lambda job: self._run(job, session, node, kind, name), request)

    async def list_exports(self) -> list[dict[str, Any]]:
        """Return all exports, newest first."""
        return await asyncio.to_thread(self._list)

    async def get(self, name: str) -> dict[str, Any]:
        """Raise NotFound."""
        return await asyncio.to_thread(self._read_manifest, name)

    async def delete(self, name: str) -> None:
        """Raise NotFound."""
        await self.get(name)

        def remove() -> None:
            trash_folder = self.folder / f".work-deleted-{uuid.uuid4().hex}"
            with suppress(FileNotFoundError):  # another request has deleted it
                (self.folder / name).rename(trash_folder)
            shutil.rmtree(trash_folder, ignore_errors=True)

        await asyncio.to_thread(remove)

    async def files(self, name: str) -> list[tuple[str, Path]]:
        """Return (name in the archive, file) for all files of an export. Raise NotFound."""
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
        job.report_progress(Progress(stage="reading", fraction=0.0, message="Loading the weights of this step"))
        work = self.folder / f".work-{job.id}"
        self._names_in_progress.add(name)
        try:
            async with session.nodes.hold_weights(node, verify=True):
                entry = await self._catalog.find(session.config.model)
                if kind == "adapter":
                    checks = await self._weight_files.write_adapter(job, session, node, entry, work)
                else:
                    checks = await self._weight_files.write_merged(job, session, node, entry, work)
                return await run_to_completion(self._publish, work, session, node, kind, name, checks)
        finally:
            self._names_in_progress.discard(name)
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, work, True))

    def _publish(
        self, work: Path, session: Session, node: Node, kind: Kind, name: str, checks: dict[str, Any]
    ) -> dict[str, Any]:
        """Write model card and manifest, rename the work folder to its name, and return the result of the job."""
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
            raise Conflict(f"An export named “{name}” already exists.", code="exists", next_step="Choose another name.")
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
                f"Export “{shorten(name)}” not found.", next_step="A session's Review page lists its exports."
            ) from None
        return manifest | {"path": str(self.folder / name)}
