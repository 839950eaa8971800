"""Folders that are whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trellis.blobs import Blobs


def test_a_blob_is_there_when_its_block_has_ended(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "b")
    with blobs.writing("w1") as folder:
        (folder / "a").write_text("x")
        assert "w1" not in blobs
    assert "w1" in blobs
    assert (blobs.path("w1") / "a").read_text() == "x"
    assert [entry.name for entry in blobs.root.iterdir()] == ["w1"]


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "b")

    def fail() -> None:
        with blobs.writing("w1") as folder:
            (folder / "a").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(blobs.root.iterdir()) == []


def test_the_first_to_write_an_id_wins(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "b")
    with blobs.writing("w1") as slow:
        (slow / "a").write_text("slow")
        with blobs.writing("w1") as quick:
            (quick / "a").write_text("quick")
    assert (blobs.path("w1") / "a").read_text() == "quick"


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc", "a/b", "A", ".hidden", "a" * 200, "x\x00", "x\n"])
def test_what_is_not_an_id_names_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a blob id"):
        Blobs(tmp_path).path(name)


def test_what_a_dead_process_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".tmp-{dead.pid}-x").mkdir()
    (tmp_path / ".tmp-0-y").mkdir()
    (tmp_path / f".tmp-{os.getpid()}-z").mkdir()
    assert blobs.remove_leftovers() == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [f".tmp-{os.getpid()}-z"]


def test_a_damaged_blob_can_be_made_again(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    with blobs.writing("w1") as folder:
        (folder / "a").write_text("torn")
    blobs.discard("w1")
    assert "w1" not in blobs
    blobs.discard("w1")
    with blobs.writing("w1") as folder:
        (folder / "a").write_text("whole")
    assert (blobs.path("w1") / "a").read_text() == "whole"


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """The limit on file size stands for a disk that is full in mid-write."""
    code = f"""
import resource, signal
from pathlib import Path
from trellis.blobs import Blobs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
blobs = Blobs(Path({str(tmp_path)!r}))
try:
    with blobs.writing("w1") as folder:
        (folder / "a").write_bytes(bytes(100_000))
except OSError as error:
    print("refused", "w1" in blobs, [entry.name for entry in blobs.root.iterdir()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused False []"
