"""Long work that outlives the request that asked for it: one row, one topic of events, one task each."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from ..errors import Conflict, NotFound, TrellisError, shorten
from ..messages import Progress
from ..store import jobs as rows
from ..store.store import Store
from .hub import Hub, HubEvent

log = logging.getLogger(__name__)


class Job:
    """One piece of long work while it runs."""

    def __init__(self, hub: Hub, row: dict[str, Any]) -> None:
        self._hub = hub
        self.row = row
        self.progress_callbacks: list[Callable[[Progress], None]] = []
        self.task: asyncio.Task[None] | None = None
        self.failure: TrellisError | None = None

    @property
    def id(self) -> str:
        return str(self.row["id"])

    def report_progress(self, progress: Progress) -> None:
        """Say how far the work has come, to all who follow it."""
        self.row["progress"] = progress.model_dump(exclude={"type"})
        self._hub.publish(job_topic(self.id), "progress", self.row["progress"])
        for on_progress in self.progress_callbacks:
            on_progress(progress)


Work = Callable[[Job], Awaitable[dict[str, Any]]]


def key_reused_error(kind: str) -> Conflict:
    return Conflict(
        f"This Idempotency-Key was already used for another action: {kind}.",
        code="key_reused",
        next_step="Use a new key for each action.",
    )


def job_topic(job_id: str) -> str:
    return f"jobs/{job_id}"


class Jobs:
    """All jobs: the running ones in memory, every one in the store."""

    def __init__(self, store: Store, hub: Hub) -> None:
        self._store = store
        self._hub = hub
        self._running: dict[str, Job] = {}
        self._start_lock = asyncio.Lock()

    async def open(self) -> None:
        """Say of jobs that a crash cut off that they ended."""
        error = TrellisError("Interrupted: the server stopped.", code="interrupted", next_step="Start it again.")
        await self._store.write(rows.interrupt_jobs, error.as_json())

    async def close(self) -> None:
        for job in list(self._running.values()):
            if job.task:
                job.task.cancel()
        await asyncio.gather(*(job.task for job in self._running.values() if job.task), return_exceptions=True)

    async def start(self, kind: str, body: dict[str, Any], work: Work, request: str | None = None) -> Job:
        """Start work as a task of the studio. The same request id is one job. Raise Conflict for a request id that was
        used for something else."""
        async with self._start_lock:
            return await self._start(kind, body, work, request)

    async def _start(self, kind: str, body: dict[str, Any], work: Work, request: str | None) -> Job:
        if request and (row := await self._store.read(rows.job_by_request, request)):
            if (row["kind"], row["body"]) != (kind, body):
                raise key_reused_error(row["kind"])
            return self._running.get(row["id"]) or Job(self._hub, row)
        row = {
            "id": f"j{secrets.token_hex(8)}", "request": request, "kind": kind, "body": body, "state": "running",
            "progress": None, "result": None, "error": None, "created": time.time(),
        }  # fmt: skip
        await self._store.write(rows.add_job, row)
        job = Job(self._hub, row)
        self._running[job.id] = job
        job.task = asyncio.create_task(self._run(job, work), name=f"job {job.id}")
        await asyncio.sleep(0)  # a task that is cancelled before its first step would never say how it ended
        return job

    async def find_row_by_request(self, request: str, kind: str) -> dict[str, Any] | None:
        """The job that a request of this kind began before, if it did."""
        row = await self._store.read(rows.job_by_request, request)
        return row if row and row["kind"] == kind else None

    async def find_by_request(self, request: str, kind: str) -> Job | None:
        """Return the job that a request started before. Raise Conflict if it started one of another kind."""
        row = await self._store.read(rows.job_by_request, request)
        if row and row["kind"] != kind:
            raise key_reused_error(row["kind"])
        return (self._running.get(row["id"]) or Job(self._hub, row)) if row else None

    async def get(self, job_id: str) -> dict[str, Any]:
        """Return the job as the API shows it. Raise NotFound."""
        return job_json(await self._row(job_id))

    async def list(self, kinds: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The latest jobs, newest first; of some kinds, where these are named."""
        rows_found = await self._store.read(rows.list_jobs, kinds)
        return [job_json(self._running[row["id"]].row if row["id"] in self._running else row) for row in rows_found]

    async def delete_ended(self, job_ids: Sequence[str]) -> None:
        """Remove jobs that have ended from the list of jobs."""
        await self._store.write(rows.delete_jobs, [job_id for job_id in job_ids if job_id not in self._running])

    async def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a running job. Raise NotFound, or Conflict if it has ended."""
        row = await self._row(job_id)
        job = self._running.get(job_id)
        if job is None or job.task is None:
            raise Conflict(
                f"This job has already ended ({row['state']}).",
                code="job_ended",
                next_step="There is nothing to cancel.",
            )
        job.task.cancel()
        await asyncio.wait([job.task])
        return job_json(job.row)

    async def events(self, job_id: str, after: str | None) -> AsyncIterator[HubEvent]:
        """Progress, then how it ended; a job that has ended answers with its last event."""
        row = await self._row(job_id)
        if job_id not in self._running:
            yield HubEvent("0-0", *_last_event(row))
            return
        async for event in self._hub.subscribe(
            job_topic(job_id), after, lambda: ("progress", row["progress"] or _initial_progress())
        ):
            yield event

    async def _row(self, job_id: str) -> dict[str, Any]:
        if job_id in self._running:
            return self._running[job_id].row
        row = await self._store.read(rows.get_job, job_id)
        if row is None:
            raise NotFound(f"Job “{shorten(job_id)}” not found.", next_step="Jobs are listed at /api/jobs.")
        return row

    async def _run(self, job: Job, work: Work) -> None:
        try:
            result = await work(job)
            await self._finish(job, state="done", result=result)
        except asyncio.CancelledError:
            await asyncio.shield(self._finish(job, state="cancelled"))
        except TrellisError as error:
            job.failure = error
            await self._finish(job, state="failed", error=error.as_json())
        except Exception:
            log.exception("job %s failed", job.id)
            job.failure = TrellisError(
                "Something went wrong.", code="internal", next_step=f"Try again. Error ID {job.id} (see the log)."
            )
            await self._finish(job, state="failed", error=job.failure.as_json())

    async def _finish(self, job: Job, **values: Any) -> None:
        job.row |= values
        changes = {name: job.row[name] for name in ("state", "progress", "result", "error")}
        await self._store.write(rows.finish_job, job.id, changes)
        self._hub.publish(job_topic(job.id), *_last_event(job.row))
        self._hub.close_topic(job_topic(job.id))
        del self._running[job.id]


def job_json(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "kind": row["kind"],
        "state": row["state"],
        "progress": row["progress"] or _initial_progress(),
        "result": row["result"],
        "error": row["error"],
        "created": timestamp(row["created"]),
        "about": row["body"],
    }


def timestamp(seconds: float) -> str:
    """ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _initial_progress() -> dict[str, Any]:
    """Progress of a job that has not reported any: every field, as pages read them."""
    return Progress(stage="connecting", fraction=0.0, message="Starting").model_dump(exclude={"type"})


def _last_event(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    match row["state"]:
        case "done":
            return "done", {"result": row["result"]}
        case "failed":
            return "failed", {"error": row["error"]}
        case _:
            return "cancelled", {"result": row["result"]}
