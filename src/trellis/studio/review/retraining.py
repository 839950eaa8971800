"""Learning from a whole log at once, as a job: a branch fitted afresh, a file of preferences, a branch's log on another
model. Each ends as a node of a tree, made from a log that is kept, so that it can be made again.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from ...errors import Conflict, Invalid, TrellisError
from ...messages import Choice, Lesson, Option, Progress, Prompt
from ..datasets.datasets import TABLE_SUFFIXES, Datasets
from ..jobs import Job, Jobs, key_reused_error
from ..steering.choice_logs import ChoiceLogs, move_refusals_last, without_tokens
from ..steering.choices import with_equal_options
from ..steering.session import Session
from ..steering.sessions import Sessions
from ..steering.tree import Node, Retraining, RetrainingKind
from .preference_files import MAX_LESSONS, ParsedPreferences, parse_preferences

KINDS = ("refit", "import", "replay")
MAX_EPOCHS = 50
MAX_BYTES = 200_000_000
MAX_ROWS = 200_000
TARGET_CHOICES = 160
"""Choices that are looked at in all, where a log is short: so many passes over it as make up these, eight at most."""


def default_epochs(count: int) -> int:
    """How many passes over a log of so many choices, where nobody says."""
    return max(1, min(8, round(TARGET_CHOICES / count)))


class RetrainingJobs:
    """Starts fits and follows them."""

    def __init__(self, jobs: Jobs, steering: Sessions, logs: ChoiceLogs, datasets: Datasets) -> None:
        self._jobs = jobs
        self._steering = steering
        self._logs = logs
        self._datasets = datasets

    async def retrain(
        self, session_id: str, node_id: str | None = None, epochs: int | None = None, request: str | None = None
    ) -> Job:
        """A fresh adapter from the whole log of the branch to a node (the head, where none is named). Raises NotFound,
        or Conflict where nothing was said yet."""
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
        """Learn from a file of preferences in the prompts folder, on from a node (the head). Raises Invalid."""
        if known_job := await self._find_job(request, "import", session_id):
            return known_job
        session = await self._steering.session(session_id)
        node = session.node(node_id) if node_id else session.tree.head
        path = await asyncio.to_thread(self._datasets.find_file, file, "file")
        if path.is_dir() or not path.name.lower().endswith(TABLE_SUFFIXES):
            raise Invalid(
                f"file: “{file}” is no table of choices.",
                field="file",
                next_step="Choose a file of JSON lines, JSON, CSV or Parquet with a choice in each row.",
            )
        if path.stat().st_size > MAX_BYTES:
            raise Invalid(
                f"file: “{file}” has {path.stat().st_size / 1e6:.0f} MB; {MAX_BYTES / 1e6:.0f} is the most.",
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
        """Learn from what was said of answers elsewhere, on from the head: a step of its own in the tree."""
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
        """The log of the branch to a node, learned by another base model in a new session of its own."""
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
        """The fits of a session, the newest first, as jobs."""
        jobs = await self._jobs.list(KINDS)
        return [job for job in jobs if session_id in (job["about"]["session"], job["about"]["origin"])]

    async def _find_job(self, request: str | None, kind: str, session_id: str) -> Job | None:
        """The job that this request began before. The log may have grown since; it is the same action all the same.
        Raises Conflict for a request that was used for something else."""
        job = await self._jobs.find_by_request(request, kind) if request else None
        if job and job.row["body"]["origin"] != session_id:
            raise key_reused_error(kind)
        return job

    async def _lessons_to(self, session: Session, node: Node) -> list[Lesson]:
        """All that was said on the way to a node. Raises Conflict where that is nothing."""
        lessons = await session.requests.lessons(session.tree.path(node.id))
        if not lessons:
            raise Conflict(
                "Nothing was said on this branch yet, so there is nothing to learn from.",
                code="empty_log",
                next_step="Choose some answers first.",
            )
        if len(lessons) > MAX_LESSONS:
            raise Conflict(
                f"The branch has {len(lessons)} choices; {MAX_LESSONS} is the most that can be learned from at once.",
                code="too_many",
                next_step="Choose an earlier step.",
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
        job.report_progress(Progress(stage="connecting", fraction=0.0, message="Waiting for the model"))
        await session.nodes.wait_until_initialized()
        parent = session.node(parent.id)
        async with session.nodes.hold_weights(parent):
            learned = await session.nodes.retrain(parent, retraining, job.report_progress)
            node = await session.nodes.add_retrained_node(parent, retraining, learned)
        return {
            "session": session.id, "node": node.id, "step": node.step, "lessons": retraining.lessons,
            "epochs": retraining.epochs, "metrics": learned.metrics.model_dump(mode="json"),
        }  # fmt: skip
