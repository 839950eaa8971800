"""Immutable folders named by id, written completely or not at all: temporary folder, fsync, rename.

It does not know what the folders hold.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ID = re.compile(r"[0-9a-z][0-9a-z_-]{0,127}")


class Blobs:
    """Folders under one root. A visible folder is complete, whatever was killed when."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, blob_id: str) -> Path:
        """Return the path of an id's folder, existing or not. Raises ValueError for an invalid id."""
        if not _ID.fullmatch(blob_id):
            raise ValueError(f"not a blob id: {blob_id[:80]!r}")
        return self.root / blob_id

    def __contains__(self, blob_id: str) -> bool:
        return self.path(blob_id).is_dir()

    @contextmanager
    def writing(self, blob_id: str) -> Iterator[Path]:
        """Yield a temporary folder that becomes the blob when the block ends, and is removed if it raises.

        If two write the same id, the first to finish wins: the content is the same by definition.
        """
        target = self.path(blob_id)
        temporary = self.temporary_folder()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    fsync(file)
            fsync(temporary)
            try:
                temporary.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
            fsync(self.root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def temporary_folder(self) -> Path:
        """Create a temporary folder, which the caller removes; after a crash, `remove_leftovers` does."""
        self.root.mkdir(parents=True, exist_ok=True)
        work = self.root / f".tmp-{os.getpid()}-{uuid.uuid4().hex}"
        work.mkdir()
        return work

    def discard(self, blob_id: str) -> None:
        """Remove a damaged folder at once, so that it can be written again. Does nothing if there is none."""
        path = self.path(blob_id)
        aside = self.root / f".tmp-0-{uuid.uuid4().hex}"
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside, ignore_errors=True)

    def remove_leftovers(self) -> int:
        """Remove temporary folders of processes that have ended. Returns their number."""
        removed = 0
        for work in self.root.glob(".tmp-*"):
            owner = work.name.split("-")[1]
            if not (owner.isdigit() and _is_running(int(owner))):
                shutil.rmtree(work, ignore_errors=True)
                removed += 1
        return removed


def _is_running(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
