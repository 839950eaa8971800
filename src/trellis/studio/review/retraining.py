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
from ..datasets.datasets import TABLES, Datasets
from ..jobs import Job, Jobs, key_reused
from ..steering.choice_logs import Logs, teaching_first, told_in_words
from ..steering.choices import including_equals
from ..steering.session import Session
from ..steering.sessions import Steering
from ..steering.tree import Fitted, FittedKind, Node
from .preference_files import MOST_LESSONS, Read, lessons_from

KINDS = ("refit", "import", "replay")
MOST_EPOCHS = 50
MOST_BYTES = 200_000_000
MOST_ROWS = 200_000
STEPS = 160
"""Choices that are looked at in all, where a log is short: so many passes over it as make up these, eight at most."""


def epochs_for(count: int) -> int:
    """How many passes over a log of so many choices, where nobody says."""
    return max(1, min(8, round(STEPS / count)))


class Fits:
    """Starts fits and follows them."""

    def __init__(self, jobs: Jobs, steering: Steering, logs: Logs, datasets: Datasets) -> None:
        self._jobs = jobs
        self._steering = steering
        self._logs = logs
        self._datasets = datasets

    async def refit(
        self, session_id: str, node_id: str | None = None, epochs: int | None = None, request: str | None = None
    ) -> Job:
        """A fresh adapter from the whole log of the branch to a node (the head, where none is named). Raises NotFound,
        or Conflict where nothing was said yet."""
        if known := await self._known(request, "refit", session_id):
            return known
        session = await self._steering.session(session_id)
        node = session.node(node_id) if node_id else session.tree.head
        lessons = await self._said(session, node)
        what = f"{session.name}, step {node.step}"
        return await self._start(session, session.tree.root, "refit", lessons, epochs, node.id, what, request)

    async def take_in(
        self,
        session_id: str,
        file: str,
        node_id: str | None = None,
        epochs: int | None = None,
        request: str | None = None,
    ) -> Job:
        """Learn from a file of preferences in the prompts folder, on from a node (the head). Raises Invalid."""
        if known := await self._known(request, "import", session_id):
            return known
        session = await self._steering.session(session_id)
        node = session.node(node_id) if node_id else session.tree.head
        place = await asyncio.to_thread(self._datasets.file, file, "file")
        if place.is_dir() or not place.name.lower().endswith(TABLES):
            raise Invalid(
                f"file: “{file}” isn't a supported file type.",
                field="file",
                next_step="Use JSON Lines, JSON, CSV or Parquet with one choice per row.",
            )
        if place.stat().st_size > MOST_BYTES:
            raise Invalid(
                f"file: “{file}” is {place.stat().st_size / 1e6:.0f} MB; the limit is {MOST_BYTES / 1e6:.0f} MB.",
                field="file",
                next_step="Split the file.",
            )
        try:
            async with self._datasets.rows(place, MOST_ROWS) as rows:
                read = await asyncio.to_thread(self._read, rows, session)
        except TrellisError as error:
            if error.field == "file":
                raise
            said = f"file: {error.message}"
            raise Invalid(said, field="file", code=error.code, next_step=error.next_step) from None
        return await self._start(
            session, node, "import", read.lessons, epochs, file, file, request, read.sentences()
        )  # fmt: skip

    async def teach(
        self, session_id: str, prompt: str, options: tuple[Option, ...], choice: Choice, what: str, request: str
    ) -> Job:
        """Learn from what was said of answers elsewhere, on from the head: a step of its own in the tree."""
        if known := await self._known(request, "import", session_id):
            return known
        session = await self._steering.session(session_id)
        lesson = Lesson(
            prompt=session.prompt_of(prompt), options=options, choice=including_equals(choice, options),
            temperature=session.config.temperature,
        )  # fmt: skip
        return await self._start(session, session.tree.head, "import", [lesson], None, what, what, request)

    async def replay(
        self,
        session_id: str,
        model: str,
        node_id: str | None = None,
        epochs: int | None = None,
        request: str | None = None,
    ) -> Job:
        """The log of the branch to a node, learned by another base model in a new session of its own."""
        if known := await self._known(request, "replay", session_id):
            return known
        session = await self._steering.session(session_id)
        node = session.node(node_id) if node_id else session.tree.head
        lessons = [told_in_words(lesson) for lesson in await self._said(session, node)]
        config = session.config.model_dump(mode="json") | {
            "model": model, "learning_rate": None, "revision": "", "precision": "auto", "remote_code": False,
        }  # fmt: skip
        key = f"{request}-session" if request else None
        new = await self._steering.create(f"{session.name} on {model}"[:200], config, key)
        what = f"{session.name}, step {node.step}"
        return await self._start(
            new, new.tree.root, "replay", lessons, epochs, node.id, what, request, origin=session_id
        )

    async def of(self, session_id: str) -> list[dict[str, Any]]:
        """The fits of a session, the newest first, as jobs."""
        fits = await self._jobs.list(KINDS)
        return [job for job in fits if session_id in (job["about"]["session"], job["about"]["origin"])]

    async def _known(self, request: str | None, kind: str, session_id: str) -> Job | None:
        """The job that this request began before. The log may have grown since; it is the same action all the same.
        Raises Conflict for a request that was used for something else."""
        job = await self._jobs.known(request, kind) if request else None
        if job and job.row["body"]["origin"] != session_id:
            raise key_reused(kind)
        return job

    async def _said(self, session: Session, node: Node) -> list[Lesson]:
        """All that was said on the way to a node. Raises Conflict where that is nothing."""
        lessons = await session.lessons(node)
        if not lessons:
            raise Conflict(
                "There are no choices on this branch yet.",
                code="empty_log",
                next_step="Choose some answers first.",
            )
        if len(lessons) > MOST_LESSONS:
            raise Conflict(
                f"This branch has {len(lessons):,} choices; the limit for one training run is {MOST_LESSONS:,}.",
                code="too_many",
                next_step="Use an earlier step.",
            )
        return lessons

    def _read(self, rows: Path, session: Session) -> Read:
        def prompt_of(text: str, system: str) -> Prompt:
            prompt = session.prompt_of(text)
            return prompt.model_copy(update={"system": system}) if system else prompt

        with rows.open(encoding="utf-8") as lines:
            placed = ((place, row) for place, row in map(json.loads, lines))
            return lessons_from(placed, session.config.temperature, prompt_of)

    async def _start(
        self,
        session: Session,
        parent: Node,
        kind: FittedKind,
        lessons: list[Lesson],
        epochs: int | None,
        source: str,
        what: str,
        request: str | None,
        notes: list[str] | None = None,
        origin: str = "",
    ) -> Job:
        ordered, teaching = teaching_first(lessons)
        log = await asyncio.to_thread(self._logs.write, ordered)
        fitted = Fitted(
            fitted=log, kind=kind, lessons=len(ordered), teaching=teaching, epochs=epochs or epochs_for(len(ordered)),
            source=source,
        )  # fmt: skip
        body = {
            "session": session.id, "origin": origin or session.id, "parent": parent.id, "what": what,
            "fitted": fitted.model_dump(mode="json"), "notes": notes or [],
        }  # fmt: skip
        return await self._jobs.start(kind, body, lambda job: self._run(job, session, parent, fitted), request)

    async def _run(self, job: Job, session: Session, parent: Node, fitted: Fitted) -> dict[str, Any]:
        job.progress(Progress(stage="connecting", fraction=0.0, message="Loading the model"))
        await session.planted()
        parent = session.node(parent.id)
        async with session.holding(parent):
            learned = await session.fit(parent, fitted, job.progress)
            node = await session.graft(parent, fitted, learned)
        return {
            "session": session.id, "node": node.id, "step": node.step, "lessons": fitted.lessons,
            "epochs": fitted.epochs, "metrics": learned.metrics.model_dump(mode="json"),
        }  # fmt: skip
