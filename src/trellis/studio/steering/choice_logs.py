"""Logs of choices as values: lessons in a file that is named by its content and never changes.

What is fitted to a log can be worked out again for as long as the log is there. It does not know where lessons come
from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from ...blobs import Blobs
from ...errors import Conflict
from ...messages import LOG_FILE, Lesson


class ChoiceLogs:
    """All choice logs of a studio."""

    def __init__(self, folder: Path) -> None:
        self._blobs = Blobs(folder)

    def write(self, lessons: Iterable[Lesson]) -> str:
        """Save lessons and return the id of the log. The same lessons in the same order are the same log."""
        lines = [lesson.model_dump_json().encode() + b"\n" for lesson in lessons]
        digest = hashlib.sha256()
        for line in lines:
            digest.update(line)
        log = f"l{digest.hexdigest()[:32]}"
        if log not in self._blobs:
            with self._blobs.writing(log) as folder, (folder / LOG_FILE).open("wb") as file:
                file.writelines(lines)
        return log

    def path(self, log: str) -> Path:
        return self._blobs.path(log)

    def read(self, log: str, indexes: Sequence[int]) -> list[Lesson]:
        """Return lessons of a log, in the given order. Raise Conflict if the log is gone."""
        last = max(indexes)
        try:
            with (self.path(log) / LOG_FILE).open(encoding="utf-8") as lines:
                lessons_by_index = {
                    number: Lesson.model_validate_json(line)
                    for number, line in enumerate(islice(lines, last + 1))
                    if number in indexes
                }
            return [lessons_by_index[number] for number in indexes]
        except (FileNotFoundError, KeyError):
            raise Conflict(
                "The training data of this branch no longer exists on disk.",
                code="log_missing",
                next_step="Go to an earlier step and start a new branch there.",
            ) from None

    def list_ids(self) -> list[str]:
        """Return the ids of all logs, and delete what a crash left incomplete."""
        self._blobs.remove_leftovers()
        return [place.name for place in self._blobs.root.glob("l*")]

    def discard(self, log: str) -> None:
        self._blobs.discard(log)


def move_refusals_last(lessons: Iterable[Lesson]) -> tuple[list[Lesson], int]:
    """Lessons with the refusals last, and how many come before these: what may be replayed stands in one piece."""
    all_lessons = list(lessons)
    teaching = [lesson for lesson in all_lessons if lesson.choice != "none"]
    return [*teaching, *(lesson for lesson in all_lessons if lesson.choice == "none")], len(teaching)


def without_tokens(lesson: Lesson) -> Lesson:
    """Return a lesson without the token ids of its model, so that any model can learn from it."""
    options = tuple(option.model_copy(update={"tokens": (), "logprob": 0.0}) for option in lesson.options)
    return lesson.model_copy(update={"options": options})
