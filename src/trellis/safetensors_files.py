"""safetensors files, read without the library and without trust: names, shapes, and whether values are numbers."""

from __future__ import annotations

import json
import math
import struct
import sys
from array import array
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100 * 1024 * 1024

READ_ERRORS = (OSError, ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError, OverflowError,
              struct.error)  # fmt: skip
"""What reading a file that anyone may have written can raise."""


def read_header(file: Path, limit: int = MAX_HEADER_BYTES) -> dict[str, dict[str, Any]]:
    """What a file says of each tensor (dtype, shape, data_offsets). Raises one of UNREADABLE for what is not one."""
    if not file.is_file():
        raise ValueError("it is not a file")
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(limit, file.stat().st_size):
            raise ValueError("the header is larger than its file, or than any model's")
        header = json.loads(stream.read(length))
    return {name: about for name, about in header.items() if name != "__metadata__"}


def read_shapes(file: Path, limit: int = MAX_HEADER_BYTES) -> dict[str, list[int]]:
    """The shapes of the tensors in a file, by name. Raises one of UNREADABLE."""
    shapes = {name: list(about["shape"]) for name, about in read_header(file, limit).items()}
    if not all(isinstance(side, int) and 0 <= side < 2**40 for shape in shapes.values() for side in shape):
        raise ValueError("a shape is not one")
    return shapes


CHUNK_BYTES = 1 << 18
"""Bytes that are looked at in one go: few enough for the interpreter to serve other threads in between."""


def all_finite(file: Path) -> bool:
    """Whether a file is whole and every F32 value in it is a number. Other types are not looked at."""
    try:
        header = read_header(file)
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            for about in header.values():
                start, end = about["data_offsets"]
                if about["dtype"] == "F32" and math.prod(about["shape"]) * 4 != end - start:
                    return False
                stream.seek(8 + length + start)
                for begin in range(start, end, CHUNK_BYTES):
                    wanted = min(CHUNK_BYTES, end - begin)
                    piece = stream.read(wanted)
                    if len(piece) != wanted or (about["dtype"] == "F32" and not _chunk_is_finite(piece)):
                        return False
    except READ_ERRORS:
        return False
    return True


def _chunk_is_finite(chunk: bytes) -> bool:
    values = array("f")
    values.frombytes(chunk)
    if sys.byteorder == "big":
        values.byteswap()
    return math.isfinite(sum(values))  # in double precision, which no sum of so few leaves
