"""`python -m trellis.reader`: one request as JSON on standard input, events as JSON lines on standard output.

`preview` looks at the first rows; `prepare` writes all prompts into a folder where each is found by its number; `rows`
writes the rows of a file as JSON lines, whatever its format, for those who want more of a row than its prompt.
"""

from __future__ import annotations

import json
import sys
import time
from array import array
from pathlib import Path
from typing import Any

from ..errors import Invalid, TrellisError, shorten
from ..params import Dataset
from . import files, hub
from .prompts import Prompts
from .skipped import Tally, number

LOOKED_AT, LOOKED_AT_ON_HUB = 20_000, 1000
"""Rows that are looked at, to find the column and to say in a preview what would be left out."""
SHOWN = 2000
"""Characters of a prompt in a preview."""
MEMORY_LIMIT = 4_000_000_000
MOST_WRITTEN, MOST_PREPARED = 1_000_000_000, 10_000_000_000
"""Bytes of rows, and of prompts, that are written, so that a small compressed file cannot fill the disk."""
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
        elif request["do"] == "rows":
            assert path
            say("rows", write_rows(path, Path(request["into"]), request["most"]))
        else:
            say("prepared", prepare(dataset, path, Path(request["into"])))
    except TrellisError as error:
        say("failed", error.as_json())
    except MemoryError:
        say("failed", _failure("The file is too large to be read.", "out_of_memory", "Save it as JSON lines."))
    except RecursionError:
        say("failed", _failure("It is nested too deeply to be read.", "corrupt_file", "Choose another file."))
    except OSError as error:
        say("failed", _failure(f"It could not be read or written: {error.strerror}.", "disk_write", "Check the disk."))


def preview(dataset: Dataset, path: Path | None, wanted: int) -> dict[str, Any]:
    """The first prompts, what there is to choose from, and what would be left out. Raises Invalid."""
    source = _open(dataset, path)
    looked_at = LOOKED_AT if path else LOOKED_AT_ON_HUB
    prompts = Prompts(source.parts(), dataset.column, looked_at)
    most = min(looked_at, dataset.rows or looked_at)
    samples: list[str] = []
    found = 0
    for text in prompts.read(most):
        if text is not None:
            found += 1
            if len(samples) < wanted:
                samples.append(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")
    whole = prompts.whole or most == dataset.rows
    if not found and whole:
        raise _empty(prompts.tally)
    total, exact = (found, True) if whole else source.count()
    if dataset.rows and total is not None:
        total = min(total, dataset.rows)
    return {
        "samples": samples,
        "column": shorten(prompts.column, 100),
        "columns": [shorten(name, 100) for name in prompts.columns[:100]],
        "split": source.split,
        "splits": source.splits,
        "subset": source.subset,
        "subsets": source.subsets,
        "total": total,
        "exact": exact,
        **_left_out(source, prompts.tally, whole),
    }


def prepare(dataset: Dataset, path: Path | None, into: Path) -> dict[str, Any]:
    """Write `prompts.jsonl` (a JSON string each line) and `offsets.u64` (where each line begins). Raises Invalid."""
    source = _open(dataset, path)
    prompts = Prompts(source.parts(), dataset.column, LOOKED_AT if path else LOOKED_AT_ON_HUB)
    size, total = source.bytes, None if source.bytes else source.count()[0]
    offsets = array("Q")
    at = 0
    spoken = time.monotonic()
    with (into / "prompts.jsonl").open("wb") as out:
        for text in prompts.read(dataset.rows):
            if text is not None:
                line = json.dumps(text, ensure_ascii=False).encode() + b"\n"
                out.write(line)
                offsets.append(at)
                at += len(line)
                if at > MOST_PREPARED:
                    raise Invalid(
                        f"There are more than {MOST_PREPARED // 10**9} GB of prompts in it, which is the most that can "
                        "be read.",
                        field="dataset.rows", next_step="Take only its first rows, or split it.",
                    )  # fmt: skip
            if (now := time.monotonic()) - spoken > TELL_SECONDS:
                spoken = now
                wanted = min(total or 0, dataset.rows or total or 0)
                read, seen = source.before + prompts.done, prompts.tally.rows
                fraction = read / size if size and not dataset.rows else seen / wanted if wanted else 0.0
                say(
                    "progress",
                    {"rows": len(offsets), "fraction": min(fraction, 1.0), "bytes": read, "total_bytes": size},
                )
    if not offsets:
        raise _empty(prompts.tally)
    if sys.byteorder == "big":
        offsets.byteswap()
    (into / "offsets.u64").write_bytes(offsets.tobytes())
    about = {
        "total": len(offsets), "column": prompts.column, "split": source.split, **_left_out(source, prompts.tally, True)
    }  # fmt: skip
    (into / "about.json").write_text(json.dumps(about | {"dataset": dataset.model_dump(mode="json")}))
    return about


def write_rows(path: Path, into: Path, most: int) -> dict[str, Any]:
    """Write `rows.jsonl`: each row of a file as `[place, row]`, `most` at the most. Raises Invalid."""
    source = files.source_of(path, "")
    spoken = time.monotonic()
    count = 0
    with (into / "rows.jsonl").open("wb") as out:
        for _, records in source.parts():
            for record in records:
                count += 1
                if count > most or out.tell() > MOST_WRITTEN:
                    what = f"{number(most)} rows" if count > most else f"{MOST_WRITTEN // 10**9} GB"
                    raise Invalid(
                        f"There are more than {what} in it, which is the most that can be read.",
                        field="dataset.id", next_step="Split the file.",
                    )  # fmt: skip
                out.write(json.dumps([record.place, record.row], default=_as_text).encode() + b"\n")
                if (now := time.monotonic()) - spoken > TELL_SECONDS:
                    spoken = now
                    say("progress", {"rows": count})
    return {"rows": count}


def _as_text(value: Any) -> Any:
    """A value of a Parquet file that JSON does not know."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8-sig")
        except UnicodeDecodeError:
            return None
    return str(value)


def _open(dataset: Dataset, path: Path | None) -> files.Source:
    return files.source_of(path, dataset.split) if path else hub.source_of(dataset)


def _left_out(source: files.Source, tally: Tally, whole: bool) -> dict[str, Any]:
    """What was left out, in numbers and in sentences."""
    notes = tally.sentences(whole)
    if unread := source.unread:
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        files_are = "file in the folder is" if len(unread) == 1 else "files in the folder are"
        notes.append(f"{len(unread)} {files_are} not read: {', '.join(map(shorten, unread[:5]))}{more}.")
    return {**tally.as_json(), "notes": notes}


def _empty(tally: Tally) -> Invalid:
    return Invalid(
        " ".join(["There are no prompts in it.", *tally.sentences()]), code="empty",
        field="dataset.id", next_step="Choose a file, split or column with text in it.",
    )  # fmt: skip


def _failure(message: str, code: str, next_step: str) -> dict[str, Any]:
    return TrellisError(message, code=code, next_step=next_step, field="dataset.id").as_json()


def say(event: str, data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"event": event, "data": data}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
