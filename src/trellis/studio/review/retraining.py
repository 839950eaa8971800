"""Retraining jobs: a fresh adapter for a branch, a preference file, a branch's log on another model.

Each ends as a node of a tree. Its lessons are stored, so that its weights can be recomputed.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from ...errors import Conflict, Invalid, TrellisError
from ...messages import Choice, Lesson, Option, Progress, Prompt
from ..datasets import TABLE_SUFFIXES, Datasets
from ..jobs import Job, Jobs, key_reused_error
from ..steering import (
    ChoiceLogs,
    Node,
    Retraining,
    RetrainingKind,
    Session,
    Sessions,
    move_refusals_last,
    with_equal_options,
    without_tokens,
)
from .preference_files import MAX_LESSONS, ParsedPreferences, parse_preferences

KINDS = ("refit", "import", "replay")
MAX_EPOCHS = 50
MAX_BYTES = 200_000_000
MAX_ROWS = 200_000
TARGET_CHOICES = 160
"""The choices seen in total on a short log: this many over as many epochs, at most eight."""


def default_epochs(count: int) -> int:
    """Return the default number of epochs for a log of this length."""
    return max(1, min(8, round(TARGET_CHOICES / count)))


class RetrainingJobs:
    """Starts and lists retraining jobs."""

    def __init__(self, jobs: Jobs, steering: Sessions, logs: ChoiceLogs, datasets: Datasets) -> None:
        self._jobs = jobs
        self._steering = steering
        self._logs = logs
        self._datasets = datasets

    async def retrain(
        self, session_id: str, node_id: str | None = None, epochs: int | None = None, request: str | None = None
    ) -> Job:
        """Train a fresh adapter on the log of a branch; the default is the head's. Raise NotFound, or Conflict for
        an empty log."""
        if known_job := await self._find_job(request, "refit", session_id):
            return known_job
        session = await self._steering.session(session_id)
        node = session.node(node_id) if node_id else session.tree.head
        lessons = await self._lessons_to(session, node)
        description = f"{session.name}, step {node.step}"
        return await self._start(session, session.tree.root, "refit", lessons, epochs, node.id, description, request)

    async def import_preferences(
        self,
        session_id: str,
        file: str,
        node_id: str | None = None,
        epochs: int | None = None,
        request: str | None = None,
    ) -> Job:
        """Train on a preference file of the prompts folder, starting at a node (default: the head). Raise Invalid."""
        if known_job := await self._find_job(request, "import", session_id):
            return known_job
        session = await self._steering.session(session_id)
        node = session.node(node_id) if node_id else session.tree.head
        path = await asyncio.to_thread(self._datasets.find_file, file, "file")
        if path.is_dir() or not path.name.lower().endswith(TABLE_SUFFIXES):
            raise Invalid(
                f"file: “{file}” isn't a supported file type.",
                field="file",
                next_step="Use JSON Lines, JSON, CSV or Parquet with one choice per row.",
            )
        if path.stat().st_size > MAX_BYTES:
            raise Invalid(
                f"file: “{file}” is {path.stat().st_size / 1e6:.0f} MB; the limit is {MAX_BYTES / 1e6:.0f} MB.",
                field="file",
                next_step="Split the file.",
            )
        try:
            async with self._datasets.rows(path, MAX_ROWS) as rows:
                parsed = await asyncio.to_thread(self._read_preferences, rows, session)
        except TrellisError as error:
            if error.field == "file":
                raise
            message = f"file: {error.message}"
            raise Invalid(message, field="file", code=error.code, next_step=error.next_step) from None
        return await self._start(
            session, node, "import", parsed.lessons, epochs, file, file, request, parsed.sentences()
        )  # fmt: skip

    async def learn_from_chat(
        self, session_id: str, prompt: str, options: tuple[Option, ...], choice: Choice, description: str, request: str
    ) -> Job:
        """Train on rated chat answers, starting at the head: a step of its own in the tree."""
        if known_job := await self._find_job(request, "import", session_id):
            return known_job
        session = await self._steering.session(session_id)
        lesson = Lesson(
            prompt=session.requests.prompt(prompt), options=options, choice=with_equal_options(choice, options),
            temperature=session.config.temperature,
        )  # fmt: skip
        return await self._start(
            session, session.tree.head, "import", [lesson], None, description, description, request
        )

    async def replay_on_model(
        self,
        session_id: str,
        model: str,
        node_id: str | None = None,
        epochs: int | None = None,
        request: str | None = None,
    ) -> Job:
        """Train another base model on the log of a branch, in a new session."""
        if known_job := await self._find_job(request, "replay", session_id):
            return known_job
        session = await self._steering.session(session_id)
        node = session.node(node_id) if node_id else session.tree.head
        lessons = [without_tokens(lesson) for lesson in await self._lessons_to(session, node)]
        config = session.config.model_dump(mode="json") | {
            "model": model, "learning_rate": None, "revision": "", "precision": "auto", "remote_code": False,
        }  # fmt: skip
        key = f"{request}-session" if request else None
        new_session = await self._steering.create(f"{session.name} on {model}"[:200], config, key)
        description = f"{session.name}, step {node.step}"
        return await self._start(
            new_session,
            new_session.tree.root,
            "replay",
            lessons,
            epochs,
            node.id,
            description,
            request,
            origin=session_id,
        )

    async def list_jobs(self, session_id: str) -> list[dict[str, Any]]:
        """Return the retraining jobs of a session, newest first."""
        jobs = await self._jobs.list(KINDS)
        return [job for job in jobs if session_id in (job["about"]["session"], job["about"]["origin"])]

    async def _find_job(self, request: str | None, kind: str, session_id: str) -> Job | None:
        """Return the job that a repeated request has started: it is the same action though the log may have grown.
        Raise Conflict for a request id that was used for something else."""
        job = await self._jobs.find_by_request(request, kind) if request else None
        if job and job.row["body"]["origin"] != session_id:
            raise key_reused_error(kind)
        return job

    async def _lessons_to(self, session: Session, node: Node) -> list[Lesson]:
        """Return the lessons on the way to a node. Raise Conflict where there are none."""
        lessons = await session.requests.lessons(session.tree.path(node.id))
        if not lessons:
            raise Conflict(
                "There are no choices on this branch yet.", code="empty_log", next_step="Choose some answers first."
            )
        if len(lessons) > MAX_LESSONS:
            raise Conflict(
                f"This branch has {len(lessons):,} choices; the limit for one training run is {MAX_LESSONS:,}.",
                code="too_many",
                next_step="Use an earlier step.",
            )
        return lessons

    def _read_preferences(self, rows: Path, session: Session) -> ParsedPreferences:
        def make_prompt(text: str, system: str) -> Prompt:
            prompt = session.requests.prompt(text)
            return prompt.model_copy(update={"system": system}) if system else prompt

        with rows.open(encoding="utf-8") as lines:
            located_rows = ((place, row) for place, row in map(json.loads, lines))
            return parse_preferences(located_rows, session.config.temperature, make_prompt)

    async def _start(
        self,
        session: Session,
        parent: Node,
        kind: RetrainingKind,
        lessons: list[Lesson],
        epochs: int | None,
        source: str,
        description: str,
        request: str | None,
        notes: list[str] | None = None,
        origin: str = "",
    ) -> Job:
        ordered, teaching_count = move_refusals_last(lessons)
        log = await asyncio.to_thread(self._logs.write, ordered)
        retraining = Retraining(
            fitted=log, kind=kind, lessons=len(ordered), teaching=teaching_count,
            epochs=epochs or default_epochs(len(ordered)),
            source=source,
        )  # fmt: skip
        body = {
            "session": session.id, "origin": origin or session.id, "parent": parent.id, "what": description,
            "fitted": retraining.model_dump(mode="json"), "notes": notes or [],
        }  # fmt: skip
        return await self._jobs.start(kind, body, lambda job: self._run(job, session, parent, retraining), request)

    async def _run(self, job: Job, session: Session, parent: Node, retraining: Retraining) -> dict[str, Any]:
        job.report_progress(Progress(stage="connecting", fraction=0.0, message="Loading the model"))
        await session.nodes.wait_until_initialized()
        parent = session.node(parent.id)
        async with session.nodes.hold_weights(parent):
            learned = await session.nodes.retrain(parent, retraining, job.report_progress)
            node = await session.nodes.add_retrained_node(parent, retraining, learned)
        return {
            "session": session.id, "node": node.id, "step": node.step, "lessons": retraining.lessons,
            "epochs": retraining.epochs, "metrics": learned.metrics.model_dump(mode="json"),
        }  # fmt: skip
