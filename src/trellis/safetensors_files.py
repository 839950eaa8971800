"""Read safetensors files without the library, as untrusted input: names, shapes, finite values."""

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
"""What reading an untrusted file can raise."""


def read_header(file: Path, limit: int = MAX_HEADER_BYTES) -> dict[str, dict[str, Any]]:
    """Return a file's header: dtype, shape and data_offsets by tensor name. Raises one of READ_ERRORS."""
    if not file.is_file():
        raise ValueError("it is not a file")
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(limit, file.stat().st_size):
            raise ValueError("the header is larger than its file, or than any model's")
        header = json.loads(stream.read(length))
    return {name: about for name, about in header.items() if name != "__metadata__"}


def read_shapes(file: Path, limit: int = MAX_HEADER_BYTES) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a file by name. Raises one of READ_ERRORS."""
    shapes = {name: list(about["shape"]) for name, about in read_header(file, limit).items()}
    if not all(isinstance(side, int) and 0 <= side < 2**40 for shape in shapes.values() for side in shape):
        raise ValueError("a shape is not one")
    return shapes


CHUNK_BYTES = 1 << 18
"""Bytes checked at a time: few enough for the interpreter to run other threads in between."""


def all_finite(file: Path) -> bool:
    """Whether a file is complete and every F32 value in it is finite. Other types are not checked."""
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
    return math.isfinite(sum(values))  # float64 cannot overflow on so few float32 values
