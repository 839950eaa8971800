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
from ..options import Dataset
from . import files, hub
from .prompts import PromptReader
from .skipped import SkipReport, format_number

MAX_SAMPLED_ROWS, MAX_SAMPLED_HUB_ROWS = 20_000, 1000
"""Rows that are looked at, to find the column and to say in a preview what would be left out."""
PREVIEW_CHARACTERS = 2000
"""Characters of a prompt in a preview."""
MEMORY_LIMIT = 4_000_000_000
MAX_ROW_BYTES, MAX_PROMPT_BYTES = 1_000_000_000, 10_000_000_000
"""Bytes of rows, and of prompts, that are written, so that a small compressed file cannot fill the disk."""
PROGRESS_SECONDS = 0.2


def main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    request = json.load(sys.stdin)
    dataset = Dataset.model_validate(request["dataset"])
    path = Path(request["path"]) if request["path"] else None
    try:
        if request["do"] == "preview":
            emit("preview", preview(dataset, path, request["count"]))
        elif request["do"] == "rows":
            assert path
            emit("rows", write_rows(path, Path(request["into"]), request["most"]))
        else:
            emit("prepared", prepare(dataset, path, Path(request["into"])))
    except TrellisError as error:
        emit("failed", error.as_json())
    except MemoryError:
        emit("failed", _error_json("The file is too large to be read.", "out_of_memory", "Save it as JSON lines."))
    except RecursionError:
        emit("failed", _error_json("It is nested too deeply to be read.", "corrupt_file", "Choose another file."))
    except OSError as error:
        emit(
            "failed",
            _error_json(f"It could not be read or written: {error.strerror}.", "disk_write", "Check the disk."),
        )


def preview(dataset: Dataset, path: Path | None, count: int) -> dict[str, Any]:
    """Return the first prompts, the available columns and splits, and what would be skipped. Raise Invalid."""
    source = _open_source(dataset, path)
    max_sampled = MAX_SAMPLED_ROWS if path else MAX_SAMPLED_HUB_ROWS
    prompts = PromptReader(source.read_files(), dataset.column, max_sampled)
    most = min(max_sampled, dataset.rows or max_sampled)
    samples: list[str] = []
    found = 0
    for text in prompts.read(most):
        if text is not None:
            found += 1
            if len(samples) < count:
                samples.append(text if len(text) <= PREVIEW_CHARACTERS else f"{text[:PREVIEW_CHARACTERS]}…")
    is_complete = prompts.is_complete or most == dataset.rows
    if not found and is_complete:
        raise _no_prompts_error(prompts.skip_report)
    total, exact = (found, True) if is_complete else source.count_rows()
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
        **_skipped_summary(source, prompts.skip_report, is_complete),
    }


def prepare(dataset: Dataset, path: Path | None, output_dir: Path) -> dict[str, Any]:
    """Write `prompts.jsonl` (a JSON string each line) and `offsets.u64` (where each line starts). Raise Invalid."""
    source = _open_source(dataset, path)
    prompts = PromptReader(source.read_files(), dataset.column, MAX_SAMPLED_ROWS if path else MAX_SAMPLED_HUB_ROWS)
    size, total = source.total_bytes, None if source.total_bytes else source.count_rows()[0]
    offsets = array("Q")
    at = 0
    last_progress = time.monotonic()
    with (output_dir / "prompts.jsonl").open("wb") as out:
        for text in prompts.read(dataset.rows):
            if text is not None:
                line = json.dumps(text, ensure_ascii=False).encode() + b"\n"
                out.write(line)
                offsets.append(at)
                at += len(line)
                if at > MAX_PROMPT_BYTES:
                    raise Invalid(
                        f"There are more than {MAX_PROMPT_BYTES // 10**9} GB of prompts in it, which is the most that "
                        "can be read.",
                        field="dataset.rows", next_step="Take only its first rows, or split it.",
                    )  # fmt: skip
            if (now := time.monotonic()) - last_progress > PROGRESS_SECONDS:
                last_progress = now
                wanted = min(total or 0, dataset.rows or total or 0)
                read, seen = source.bytes_finished + prompts.bytes_read, prompts.skip_report.rows
                fraction = read / size if size and not dataset.rows else seen / wanted if wanted else 0.0
                emit(
                    "progress",
                    {"rows": len(offsets), "fraction": min(fraction, 1.0), "bytes": read, "total_bytes": size},
                )
    if not offsets:
        raise _no_prompts_error(prompts.skip_report)
    if sys.byteorder == "big":
        offsets.byteswap()
    (output_dir / "offsets.u64").write_bytes(offsets.tobytes())
    about = {
        "total": len(offsets), "column": prompts.column, "split": source.split,
        **_skipped_summary(source, prompts.skip_report, True)
    }  # fmt: skip
    (output_dir / "about.json").write_text(json.dumps(about | {"dataset": dataset.model_dump(mode="json")}))
    return about


def write_rows(path: Path, output_dir: Path, limit: int) -> dict[str, Any]:
    """Write `rows.jsonl`: the rows of a file as `[place, row]`, up to a limit. Raise Invalid."""
    source = files.open_local_source(path, "")
    last_progress = time.monotonic()
    count = 0
    with (output_dir / "rows.jsonl").open("wb") as out:
        for _, records in source.read_files():
            for record in records:
                count += 1
                if count > limit or out.tell() > MAX_ROW_BYTES:
                    what = f"{format_number(limit)} rows" if count > limit else f"{MAX_ROW_BYTES // 10**9} GB"
                    raise Invalid(
                        f"There are more than {what} in it, which is the most that can be read.",
                        field="dataset.id", next_step="Split the file.",
                    )  # fmt: skip
                out.write(json.dumps([record.location, record.row], default=_to_json_value).encode() + b"\n")
                if (now := time.monotonic()) - last_progress > PROGRESS_SECONDS:
                    last_progress = now
                    emit("progress", {"rows": count})
    return {"rows": count}


def _to_json_value(value: Any) -> Any:
    """A value of a Parquet file that JSON does not know."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8-sig")
        except UnicodeDecodeError:
            return None
    return str(value)


def _open_source(dataset: Dataset, path: Path | None) -> files.Source:
    return files.open_local_source(path, dataset.split) if path else hub.open_hub_source(dataset)


def _skipped_summary(source: files.Source, skip_report: SkipReport, is_complete: bool) -> dict[str, Any]:
    """Return what was skipped, as numbers and sentences."""
    notes = skip_report.sentences(is_complete)
    if unread := source.ignored_files:
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        files_are = "file in the folder is" if len(unread) == 1 else "files in the folder are"
        notes.append(f"{len(unread)} {files_are} not read: {', '.join(map(shorten, unread[:5]))}{more}.")
    return {**skip_report.as_json(), "notes": notes}


def _no_prompts_error(skip_report: SkipReport) -> Invalid:
    return Invalid(
        " ".join(["There are no prompts in it.", *skip_report.sentences()]), code="empty",
        field="dataset.id", next_step="Choose a file, split or column with text in it.",
    )  # fmt: skip


def _error_json(message: str, code: str, next_step: str) -> dict[str, Any]:
    return TrellisError(message, code=code, next_step=next_step, field="dataset.id").as_json()


def emit(event: str, data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"event": event, "data": data}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
