"""The prompt reader as the web process sees it: one process per request, killed when nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from ..errors import Invalid, TrellisError, shorten
from ..options import Dataset

MAX_LINE_BYTES = 32 * 1024 * 1024


class Reader:
    """Starts `python -m trellis.reader`. `cache` is the cache folder of the Hub's library."""

    def __init__(self, cache: Path, timeout: float) -> None:
        self._cache = cache
        self._working_folder = cache / "empty"  # the library takes a subfolder here for a dataset of that name
        self._timeout = timeout

    async def preview(self, dataset: Dataset, path: Path | None, count: int = 3) -> dict[str, Any]:
        """Return the first prompts, the columns, splits and subsets. Raises Invalid or another TrellisError."""
        return await self._final_event(dataset, path, {"do": "preview", "count": count}, lambda data: None)

    async def prepare(
        self, dataset: Dataset, path: Path | None, into: Path, on_progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Write all prompts into a folder. Raises like `preview`."""
        return await self._final_event(dataset, path, {"do": "prepare", "into": str(into)}, on_progress)

    async def rows(self, path: Path, into: Path, limit: int) -> int:
        """Write the rows of a file as JSON lines into a folder; returns their number. Raises like `preview`."""
        dataset = Dataset(source="file", id=path.name)
        found = await self._final_event(
            dataset, path, {"do": "rows", "into": str(into), "most": limit}, lambda data: None
        )
        return int(found["rows"])

    async def _final_event(
        self,
        dataset: Dataset,
        path: Path | None,
        request: dict[str, Any],
        on_progress: Callable[[dict[str, Any]], None],
    ) -> dict[str, Any]:
        body = request | {"dataset": dataset.model_dump(mode="json"), "path": str(path) if path else ""}
        async with contextlib.aclosing(self._events(body)) as events:
            async for event, data in events:
                if event == "progress":
                    on_progress(data)
                elif event == "failed":
                    raise _error_from(data)
                else:
                    return data
        raise TrellisError(
            "The reader of prompts ended without an answer.", code="reader_died",
            field="config.dataset.id",
            next_step="Try again. If it comes back, the file may be broken or far too large.",
        )  # fmt: skip

    async def _read_line(self, output: asyncio.StreamReader, body: dict[str, Any]) -> bytes:
        """Return the next line, empty at the end. Raises TrellisError if the reader is silent for too long."""
        try:
            async with asyncio.timeout(self._timeout):
                return await output.readline()
        except TimeoutError:
            raise _timeout_error(body["dataset"]["id"], self._timeout) from None
        except ValueError:
            return b""

    async def _events(self, body: dict[str, Any]) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        self._working_folder.mkdir(parents=True, exist_ok=True)
        environment = {
            "HF_HOME": str(self._cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "USE_TORCH": "0",  # the Hub's library would import torch, which takes seconds and is not needed
            "USE_TF": "0",
            "USE_JAX": "0",
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "trellis.reader", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL, limit=MAX_LINE_BYTES, env=environment | dict(os.environ),
            cwd=self._working_folder,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(body).encode())
            process.stdin.close()
            while line := await self._read_line(process.stdout, body):
                event = json.loads(line)
                yield event["event"], event["data"]
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _timeout_error(name: str, seconds: float) -> TrellisError:
    return TrellisError(
        f"Nothing was heard of “{shorten(name)}” for {seconds:.0f} seconds.", code="timeout",
        field="config.dataset.id", next_step="Check the connection and try again, or use a file.",
    )  # fmt: skip


def _error_from(data: dict[str, Any]) -> TrellisError:
    field = f"config.{data['field']}" if data["field"] else None
    if "fields" in data:
        fields = [{"field": f"config.{entry['field']}", "message": entry["message"]} for entry in data["fields"]]
        return Invalid(data["message"], next_step=data["next_step"], field=field, code=data["code"], fields=fields)
    return TrellisError(data["message"], next_step=data["next_step"], field=field, code=data["code"])
