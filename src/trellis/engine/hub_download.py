"""Download a model's files from the Hugging Face Hub: list them, fetch them with progress, resume after interruptions.

Endpoint and token come from the environment that huggingface_hub reads (HF_ENDPOINT, HF_TOKEN). It does not load
models.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from ..errors import LoadFailed, TrellisError
from ..messages import Progress
from ..model_checks import find_problems_before_weights
from ..model_files import inspect_folder

WANTED_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
          "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja", "chat_template*",
          "*.tiktoken", "*.model", "*.bpe", "*.spm", "tekken.json", "*processor_config.json", "LICENSE*", "NOTICE*",
          "USE_POLICY*", "README.md", "adapter_config.json", "quantize_config.json", "modules.json",
          "config_sentence_transformers.json"]  # fmt: skip
TEMPLATES_FOLDER = "additional_chat_templates/"
"""The only folder of a repository that belongs to a tokenizer."""
POLL_SECONDS = 0.1
CHUNK_BYTES = 1 << 18
"""Bytes written at a time: the most that a broken connection can lose."""
MIN_FREE_DISK_BYTES = 200_000_000
"""Disk space that a download leaves free."""


def completion_marker(cache: Path, repository: str, commit: str) -> Path:
    """Return the file that marks a commit as completely downloaded."""
    return cache / "complete" / f"{repository.replace('/', '--')}@{commit}.json"


def download(
    repository: str, revision: str, cache: Path, with_code: bool, timeout: float, may_download: bool = True
) -> Generator[Progress | None, None, Path]:
    """Return the folder of a repository at a revision, downloading what is missing. Without `may_download`, return the
    latest complete download. Raises LoadFailed."""
    revision = revision or "main"
    if complete := _complete_download(cache, repository, revision, with_code):
        return complete
    if not may_download:
        if complete := _latest_download(cache, repository, revision):
            return complete
        raise LoadFailed(
            f"The files of “{repository}” are no longer here.", code="not_found",
            next_step="Load it on the Models page to download them.",
        )  # fmt: skip
    yield Progress(stage="initializing", fraction=0.01, message=f"Looking up {repository} on Hugging Face")
    patterns = [*WANTED_FILES, "*.py"] if with_code else WANTED_FILES
    try:
        info = yield from _run_in_thread(timeout, "Hugging Face did not answer", _repository_info, repository, revision)
    except LoadFailed as error:
        latest = _latest_download(cache, repository, revision) if error.code in ("network", "timeout") else None
        if latest is None:
            raise
        return latest  # without the Hub, an earlier download is as good
    commit, sizes = str(info.sha), _files_to_download(info, patterns)
    if not any(name.endswith(".safetensors") for name in sizes):
        raise LoadFailed(
            f"“{repository}” has no safetensors files.",
            code="not_found",
            next_step="Choose a model with safetensors files. Other formats can contain code and are not loaded.",
        )
    if complete := _complete_download(cache, repository, commit, with_code):
        _mark_complete(cache, repository, commit, revision, complete, with_code)
        return complete
    total = sum(file.size for file in sizes.values())
    folder = cache / repository.replace("/", "--") / commit
    folder.mkdir(parents=True, exist_ok=True)
    downloaded_before = _folder_bytes(folder)
    _require_disk_space(cache, total - downloaded_before, repository)
    started, last_change, done = time.monotonic(), time.monotonic(), downloaded_before
    hashing = threading.Event()
    thread = _ResultThread(lambda: _download_files(repository, commit, sizes, folder, hashing, with_code))
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        now, found = time.monotonic(), _folder_bytes(folder)
        if found != done or hashing.is_set():  # no bytes arrive while a file is being hashed
            done, last_change = found, now
        if done < total and now - last_change > timeout:
            raise _timeout_error(f"The download of “{repository}” received nothing for {timeout:.0f} seconds.")
        rate = max(done - downloaded_before, 0) / max(now - started, 1e-6)
        yield Progress(
            stage="downloading",
            fraction=0.01 + 0.09 * min(done / max(total, 1), 1.0),
            message=f"Downloading {repository}" if done < total else f"Verifying {repository}",
            bytes=min(done, total),
            total_bytes=total,
            rate=rate,
            seconds_left=max(total - done, 0) / rate if rate else None,
        )
    thread.result(repository, revision)
    _mark_complete(cache, repository, commit, revision, folder, with_code)
    return folder


@dataclass(frozen=True)
class _HubFile:
    size: int
    sha256: str | None


def _download_files(
    repository: str, commit: str, files: dict[str, _HubFile], folder: Path, hashing: threading.Event, with_code: bool
) -> None:
    """Download every incomplete file from where it was interrupted. The Hub's own downloader starts a file over after a
    failure, so only its transfer function is used, with a part file that persists. Engines that want the same commit
    wait for each other. Small files come first: if they show that the model cannot be loaded, gigabytes are saved."""
    large = {name: about for name, about in files.items() if name.endswith(".safetensors")}
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _download_missing(repository, commit, {name: files[name] for name in files.keys() - large}, folder, hashing)
        for problem in find_problems_before_weights(inspect_folder(folder), with_code):
            raise problem.to_error()
        _download_missing(repository, commit, large, folder, hashing)


def _download_missing(
    repository: str, commit: str, files: dict[str, _HubFile], folder: Path, hashing: threading.Event
) -> None:
    headers = build_hf_headers()
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES  # the library's 10 MB chunks would be lost with every broken connection
    for name, about in files.items():
        whole, part = folder / name, folder / f"{name}.part"
        if whole.is_file() and whole.stat().st_size == about.size:
            continue
        part.parent.mkdir(exist_ok=True)
        part.touch()
        with part.open("r+b") as out:
            start = out.seek(0, os.SEEK_END)
            if start < about.size:
                url = hf_hub_url(repository, name, revision=commit)
                http_get(
                    url,
                    out,
                    resume_size=start,
                    headers=headers,
                    expected_size=about.size,
                    tqdm_class=_SilentProgressBar,
                )
            out.flush()
            os.fsync(out.fileno())
        hashing.set()
        is_intact = part.stat().st_size == about.size and about.sha256 in (
            None,
            _sha256(part) if about.sha256 else None,
        )
        hashing.clear()
        if not is_intact:
            part.unlink()
            raise LoadFailed(
                f"The file “{name}” of “{repository}” doesn't match its checksum on Hugging Face.",
                code="corrupt_file",
                next_step="Load it again. This file is downloaded again; the others are kept.",
            )
        part.rename(whole)


class _SilentProgressBar(tqdm):
    """The library's progress bar, disabled."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("name", None)
        super().__init__(*args, **(options | {"disable": True}))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _ResultThread(threading.Thread):
    """A thread with a result, or an error that can be shown to a person."""

    def __init__(self, work: Any) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._result: Any = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work()
        except Exception as error:  # noqa: BLE001 - raised again in the thread that asked
            self._error = error

    def result(self, repository: str, revision: str) -> Any:
        if self._error:
            raise _explain(self._error, repository, revision) from self._error
        return self._result


def _run_in_thread(timeout: float, what: str, work: Any, repository: str, revision: str) -> Generator[None, None, Any]:
    thread = _ResultThread(lambda: work(repository, revision, timeout))
    started = time.monotonic()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        if time.monotonic() - started > timeout:
            raise _timeout_error(f"{what} for {timeout:.0f} seconds.")
        yield None
    return thread.result(repository, revision)


def _repository_info(repository: str, revision: str, timeout: float) -> Any:
    return HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=timeout)


def _files_to_download(info: Any, patterns: list[str]) -> dict[str, _HubFile]:
    """Return the files to download. Subfolders hold other formats of the same model."""
    files = {
        file.rfilename: _HubFile(int(file.size or 0), getattr(file.lfs, "sha256", None)) for file in info.siblings or []
    }
    return {
        name: about
        for name, about in files.items()
        if ("/" not in name and any(fnmatch(name, pattern) for pattern in patterns))
        or (
            name.startswith(TEMPLATES_FOLDER)
            and fnmatch(name.removeprefix(TEMPLATES_FOLDER), "[A-Za-z0-9_-]*.jinja")
            and "/" not in name.removeprefix(TEMPLATES_FOLDER)
        )
    }


def _complete_download(cache: Path, repository: str, commit: str, with_code: bool) -> Path | None:
    """Return the folder of a completely downloaded commit, with the model's code if it is needed."""
    try:
        about = json.loads(completion_marker(cache, repository, commit).read_text())
    except (OSError, ValueError):
        return None
    folder = Path(about["folder"])
    if with_code and not about.get("with_code"):
        return None
    return folder if (folder / "config.json").is_file() else None


def _latest_download(cache: Path, repository: str, revision: str) -> Path | None:
    """Return the latest download of a branch or tag."""
    found: list[tuple[float, Path]] = []
    for file in (cache / "complete").glob(f"{repository.replace('/', '--')}@*.json"):
        about = json.loads(file.read_text())
        if about["revision"] == revision and Path(about["folder"]).is_dir():
            found.append((file.stat().st_mtime, Path(about["folder"])))
    return max(found)[1] if found else None


def _mark_complete(cache: Path, repository: str, commit: str, revision: str, folder: Path, with_code: bool) -> None:
    marker_file = completion_marker(cache, repository, commit)
    marker_file.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "repository": repository,
        "commit": commit,
        "revision": revision,
        "folder": str(folder),
        "with_code": with_code,
    }
    part = marker_file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(about))
    part.replace(marker_file)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a part file that has just been renamed
            total += file.stat().st_size if file.is_file() else 0
    return total


def _require_disk_space(folder: Path, needed: int, repository: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed + MIN_FREE_DISK_BYTES > free:
        raise LoadFailed(
            f"“{repository}” needs {needed / 1e9:.2f} GB in “{folder}”, but only {free / 1e9:.2f} GB are free.",
            code="disk_full",
            next_step="Free up disk space, or start the studio with another --save-dir.",
        )


def _timeout_error(message: str) -> LoadFailed:
    return LoadFailed(
        message, code="timeout",
        next_step="Check the connection or raise TRELLIS_HUB_TIMEOUT, then load again. The partial download is kept.",
    )  # fmt: skip


def _explain(error: Exception, repository: str, revision: str) -> TrellisError:
    """Translate an error of the Hub's library to a LoadFailed with a code."""
    if isinstance(error, TrellisError):
        return error
    if isinstance(error, GatedRepoError) or _status_code(error) in (401, 403):
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            return _repository_missing(repository)
        return LoadFailed(
            f"You don't have access to “{repository}” on Hugging Face.", code="permission_denied",
            next_step="Accept its terms on Hugging Face and start the studio with HF_TOKEN set to a token with access.",
        )  # fmt: skip
    if isinstance(error, RevisionNotFoundError):
        return LoadFailed(
            f"“{repository}” has no revision “{revision}”.", code="not_found",
            next_step="Use a branch, tag or full commit listed on its Hugging Face page.", field="revision",
        )  # fmt: skip
    if isinstance(error, RepositoryNotFoundError):
        return _repository_missing(repository)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LoadFailed(
            f"The disk is full: “{repository}” could not be downloaded completely.", code="disk_full",
            next_step="Free up disk space and load again. The partial download is kept.",
        )  # fmt: skip
    if "timed out" in str(error).lower() or "timeout" in type(error).__name__.lower():
        return _timeout_error(f"Hugging Face did not answer in time for “{repository}”.")
    status = f" (status {_status_code(error)})" if _status_code(error) else ""
    if isinstance(error, (HfHubHTTPError, LocalEntryNotFoundError, OSError)) or "httpx" in type(error).__module__:
        return LoadFailed(
            f"Can't reach Hugging Face for “{repository}”{status}: {_reason(error)}.",
            code="network",
            next_step="Check the connection and load again. The partial download is kept.",
        )  # fmt: skip
    return LoadFailed(
        f"“{repository}” could not be downloaded: {type(error).__name__}: {str(error)[:200]}", code="network",
        next_step="Load it again. The partial download is kept.",
    )  # fmt: skip


def _reason(error: Exception) -> str:
    """Return the first line of an error, without the errno prefix."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[Errno -?\d+\] ", "", line)[:200].rstrip(".")


def _repository_missing(repository: str) -> LoadFailed:
    return LoadFailed(
        f"There is no model “{repository}” on Hugging Face, or it is private.", code="not_found",
        next_step="Check the name. A private model needs HF_TOKEN set when the studio starts.",
    )  # fmt: skip


def _status_code(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
