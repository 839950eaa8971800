"""safetensors files that anyone may have written: whole or not, numbers or not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from trellis.safetensors_files import CHUNK_BYTES, all_finite


def write(file: Path, values: list[float], kind: str = "F32", shape: list[int] | None = None, cut: int = 0) -> Path:
    data = struct.pack(f"<{len(values)}f", *values)
    about = {"dtype": kind, "shape": shape or [len(values)], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": about}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[: len(data) - cut])
    return file


@pytest.mark.parametrize("rot", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, CHUNK_BYTES // 4 - 1, CHUNK_BYTES // 4, CHUNK_BYTES // 4 + 9])
def test_one_value_that_is_no_number_is_found(tmp_path: Path, rot: float, place: int) -> None:
    values = [3e38, -3e38] * (CHUNK_BYTES // 8 + 5)
    assert all_finite(write(tmp_path / "a", values))
    values[place] = rot
    assert not all_finite(write(tmp_path / "a", values))


def test_the_largest_numbers_are_numbers(tmp_path: Path) -> None:
    assert all_finite(write(tmp_path / "a", [3.4e38] * (CHUNK_BYTES // 4)))


def test_a_file_that_is_cut_off_or_lies_about_its_shape_is_not_whole(tmp_path: Path) -> None:
    assert not all_finite(write(tmp_path / "a", [1.0, 2.0], cut=1))
    assert not all_finite(write(tmp_path / "a", [1.0, 2.0], shape=[3]))
    assert not all_finite(tmp_path / "nothing")
    (tmp_path / "b").write_bytes(b"\x05\0\0\0\0\0\0\0{]abc")
    assert not all_finite(tmp_path / "b")


def test_other_types_are_not_looked_at(tmp_path: Path) -> None:
    assert all_finite(write(tmp_path / "a", [float("nan")], kind="I32"))
