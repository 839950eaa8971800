"""`python -m trellis.reader`: one request as JSON on standard input, events as JSON lines on standard output.

`preview` looks at the first rows; `prepare` writes all prompts into a folder where each is found by its number.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import Invalid, TrellisError
from ..params import Dataset
from ..texts import PROMPT_LIMIT, storable
from . import files, hub
from .columns import column_of, prompt_in

LOOKED_AT = 20
"""Rows that are looked at to find the column."""
SHOWN = 2000
"""Characters of a prompt in a preview."""
MEMORY_LIMIT = 4_000_000_000
TELL_SECONDS = 0.2


def main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    request = json.load(sys.stdin)
    dataset = Dataset.model_validate(request["dataset"])
    path = Path(request["path"]) if request["path"] else None
    try:
        if request["do"] == "preview":
            say("preview", preview(dataset, path, request["count"]))
        else:
            say("prepared", prepare(dataset, path, Path(request["into"])))
    except TrellisError as error:
        say("failed", error.as_json())
    except MemoryError:
        say("failed", _failure("The file is too large to be read.", "out_of_memory", "Save it as JSON lines."))
    except OSError as error:
        say("failed", _failure(f"It could not be read or written: {error.strerror}.", "disk_write", "Check the disk."))


def preview(dataset: Dataset, path: Path | None, wanted: int) -> dict[str, Any]:
    """The first prompts, and what there is to choose from. Raises Invalid."""
    source, rows, total, exact = _open(dataset, path)
    first = list(itertools.islice(rows, LOOKED_AT))
    if not first:
        raise _empty()
    column = column_of(dataset.column, first)
    prompts = [text for text in (prompt_in(row, column) for row in first) if text]
    if dataset.rows and total is not None:
        total = min(total, dataset.rows)
    return {
        "samples": [text if len(text) <= SHOWN else f"{text[:SHOWN]}…" for text in prompts[:wanted]],
        "column": column[:SHOWN],
        "columns": [name[:100] for name in itertools.islice(dict.fromkeys(name for row in first for name in row), 100)],
        "split": source.split,
        "splits": source.splits,
        "subset": getattr(source, "subset", ""),
        "subsets": getattr(source, "subsets", []),
        "total": total,
        "exact": exact,
    }


def prepare(dataset: Dataset, path: Path | None, into: Path) -> dict[str, Any]:
    """Write `prompts.jsonl` (a JSON string each line) and `offsets.u64` (where each line begins). Raises Invalid."""
    read = 0

    def told(done: int) -> None:
        nonlocal read
        read = done

    source, rows, total, _ = _open(dataset, path, told)
    size = source.bytes if isinstance(source, files.Source) else None
    head = list(itertools.islice(rows, LOOKED_AT))
    if not head:
        raise _empty()
    column = column_of(dataset.column, head)
    offsets = array("Q")
    at = skipped = seen = 0
    spoken = time.monotonic()
    with (into / "prompts.jsonl").open("wb") as out:
        for row in itertools.islice(itertools.chain(head, rows), dataset.rows):
            seen += 1
            text = prompt_in(row, column)
            if not _usable(text):
                skipped += 1
                continue
            line = json.dumps(text, ensure_ascii=False).encode() + b"\n"
            out.write(line)
            offsets.append(at)
            at += len(line)
            if (now := time.monotonic()) - spoken > TELL_SECONDS:
                spoken = now
                wanted = min(total or 0, dataset.rows or total or 0)
                fraction = read / size if size and not dataset.rows else seen / wanted if wanted else 0.0
                say(
                    "progress",
                    {"rows": len(offsets), "fraction": min(fraction, 1.0), "bytes": read, "total_bytes": size},
                )
    if not offsets:
        raise _empty()
    if sys.byteorder == "big":
        offsets.byteswap()
    (into / "offsets.u64").write_bytes(offsets.tobytes())
    about = {"total": len(offsets), "skipped": skipped, "column": column, "split": source.split}
    (into / "about.json").write_text(json.dumps(about | {"dataset": dataset.model_dump(mode="json")}))
    return about


def _open(
    dataset: Dataset, path: Path | None, told: Any = lambda done: None
) -> tuple[files.Source | hub.HubSource, Iterator[files.Row], int | None, bool]:
    if path is None:
        there = hub.source_of(dataset)
        streamed, total = hub.rows(there)
        return there, streamed, total, total is not None
    source = files.source_of(path, dataset.split)
    return source, files.rows(source, told), *files.count(source)


def _usable(text: str) -> bool:
    try:
        return 0 < len(storable(text)) <= PROMPT_LIMIT
    except ValueError:
        return False


def _empty() -> Invalid:
    return Invalid(
        "There are no prompts in it.", code="empty",
        field="dataset.id", next_step="Choose a file, split or column with text in it.",
    )  # fmt: skip


def _failure(message: str, code: str, next_step: str) -> dict[str, Any]:
    return TrellisError(message, code=code, next_step=next_step, field="dataset.id").as_json()


def say(event: str, data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"event": event, "data": data}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
