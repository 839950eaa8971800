"""`python -m trellis.reader.pdf MOST`: a PDF on standard input, its text as JSON on standard output.

A process of its own, which may take so much memory and time and no more.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

MEMORY_LIMIT, CPU_SECONDS_LIMIT = 1_500_000_000, 30
MAX_PAGES = 2000


def main() -> None:
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS_LIMIT, CPU_SECONDS_LIMIT))
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    data = sys.stdin.buffer.read()
    json.dump(extract_text(data, int(sys.argv[1])), sys.stdout)


def extract_text(data: bytes, max_characters: int) -> dict[str, str]:
    """The text of a PDF, page by page, or what is the matter with it. One character too many is read, and no more."""
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            return {"problem": "is locked with a password"}
        if len(reader.pages) > MAX_PAGES:
            return {"problem": f"has {len(reader.pages)} pages; the limit is {MAX_PAGES}"}
        parts: list[str] = []
        length = 0
        for page in reader.pages:
            parts.append(page.extract_text().encode("utf-8", "replace").decode().strip())
            length += len(parts[-1]) + 2
            if length > max_characters:
                break
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError) as error:
        return {"problem": f"couldn't be read as a PDF ({type(error).__name__})"}
    except MemoryError:
        return {"problem": "needs too much memory to be read"}
    return {"text": "\n\n".join(part for part in parts if part)[: max_characters + 1]}


if __name__ == "__main__":
    main()
