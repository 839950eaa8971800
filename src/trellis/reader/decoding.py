"""Files as bytes and as text: compressed or not, in the encoding that their first bytes show.

It does not know what formats are in them.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import functools
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import Invalid, shorten

LINE_LIMIT = 16_000_000
"""Characters in one line; a longer one is not a prompt."""
CHUNK_BYTES = 1 << 18

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
OTHER_FORMATS = ((b"PK\x03\x04", "a zip archive, as Excel's .xlsx files are"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file"),
          (b"PAR1", "a Parquet file; let its name end in .parquet"), (b"ARROW1", "an Arrow file"),
          (b"SQLite format 3", "a database"), (b"%PDF-", "a PDF"))  # fmt: skip


class DataFile(Protocol):
    """A file that can be opened, wherever it is. `size` is in bytes, as stored."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def open(self) -> BinaryIO: ...


@dataclass(frozen=True)
class LocalFile:
    """A file on this computer. `name` is how a person knows it."""

    path: Path
    name: str

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def open(self) -> BinaryIO:
        return self.path.open("rb")


def corrupt_file_error(file: DataFile, what: str, next_step: str = "Correct the file, or choose another.") -> Invalid:
    return Invalid(
        f"“{file.name}” cannot be read: {what}.", code="corrupt_file", field="dataset.id", next_step=next_step
    )


class OpenedFile:
    """A file opened for one reading, from its start. It counts the stored bytes that were read."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self._raw = file.open()
        head = self._raw.read(16)
        self._raw.seek(0)
        self.compressed = True
        self.decompressed: Any = self._raw
        if head.startswith(b"\x1f\x8b"):
            self.decompressed = gzip.GzipFile(fileobj=self._raw)
        elif head.startswith(b"BZh"):
            self.decompressed = bz2.BZ2File(self._raw)
        elif head.startswith(b"\xfd7zXZ\x00"):
            self.decompressed = lzma.LZMAFile(self._raw)  # noqa: SIM115
        elif head.startswith(b"\x28\xb5\x2f\xfd"):
            import pyarrow

            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._raw, mode="r"), "zstd")
            self.decompressed = io.BufferedReader(stream)
        else:
            self.compressed = False
        if other := next((what for magic, what in OTHER_FORMATS if head.startswith(magic)), None):
            self._raw.close()
            raise corrupt_file_error(
                file, f"it is {other}", "Save it as CSV or JSON lines in UTF-8, or choose another file."
            )

    def __enter__(self) -> OpenedFile:
        return self

    def __exit__(self, *about: object) -> None:
        self._raw.close()

    @property
    def bytes_read(self) -> int:
        return 0 if self._raw.closed else self._raw.tell()

    @functools.cached_property
    def text(self) -> io.TextIOWrapper:
        """The text stream, line ends unchanged. Raise Invalid for a file that is clearly not text."""
        head = self.decompressed.peek(4)[:4]
        encoding = next((name for mark, name in ENCODINGS if head.startswith(mark)), "utf-8")
        if (
            encoding == "utf-8"
            and len(head) == 4
            and head[::2] != head[1::2]
            and b"\x00\x00" in (head[::2], head[1::2])
        ):
            raise corrupt_file_error(
                self.file, "it looks like UTF-16 without the mark at its beginning that says so", "Save it as UTF-8."
            )
        return io.TextIOWrapper(self.decompressed, encoding=encoding, newline="")


@contextlib.contextmanager
def translate_read_errors(file: DataFile) -> Iterator[None]:
    """Turn errors of reading a file into Invalid."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise _encoding_error(file, error) from None
    except PermissionError:
        raise Invalid(
            f"No permission to read “{file.name}”.", code="permission_denied",
            field="dataset.id", next_step="Give the studio's user read access.",
        ) from None  # fmt: skip
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _truncated_file_error(file, error) from None
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise
        raise _truncated_file_error(file, error) from None  # what bz2 and zstd raise


def _truncated_file_error(file: DataFile, error: Exception) -> Invalid:
    return corrupt_file_error(
        file, f"it is not a whole compressed file ({shorten(error, 100)})", "Copy or download the file again."
    )


def _encoding_error(file: DataFile, error: UnicodeDecodeError) -> Invalid:
    """Return where the text stops being valid in an encoding, by reading the file again."""
    where = ""
    with translate_read_errors(file), OpenedFile(file) as reopened:
        decoder = codecs.getincrementaldecoder(reopened.text.encoding)()
        line, column = 1, 1
        chunk = b"\x00"
        while chunk:
            chunk = reopened.decompressed.read(CHUNK_BYTES)
            try:
                line, column = _advance_position(line, column, decoder.decode(chunk, final=not chunk))
            except UnicodeDecodeError as found:
                line, column = _advance_position(
                    line, column, found.object[: found.start].decode(found.encoding, "replace")
                )
                where = f", first the byte 0x{found.object[found.start]:02X} in line {line}, column {column}"
                break
    named = "UTF-8" if error.encoding.startswith("utf-8") else error.encoding.upper()
    guess = "; it may be Latin-1 or Windows-1252, as older Windows programs write" if named == "UTF-8" else ""
    return corrupt_file_error(file, f"it is not {named} text{where}{guess}", "Save it as UTF-8, and choose it again.")


def _advance_position(line: int, column: int, text: str) -> tuple[int, int]:
    ends = text.count("\n")
    return line + ends, len(text) - text.rfind("\n") if ends else column + len(text)


def read_lines(
    file: DataFile, opened: OpenedFile, line_number: int = 0, limit: int | None = None
) -> Iterator[tuple[int, str]]:
    """Yield (number, line) for each line after `line_number`. Raise Invalid for a line without an end."""
    limit_or_default = limit or LINE_LIMIT
    while line := opened.text.readline(limit_or_default):
        line_number += 1
        if len(line) >= limit_or_default:
            raise corrupt_file_error(
                file, f"line {line_number} is longer than {limit_or_default // 1_000_000} million characters"
            )
        yield line_number, line
