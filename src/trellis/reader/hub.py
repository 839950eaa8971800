"""Datasets on the Hugging Face hub as rows, streamed. Scripts are never run.

Text files (JSON, CSV, text) are parsed as local ones are, so that both come out the same; Parquet, archives and all
else by the datasets library. Address and token come from the environment that the library itself reads (HF_ENDPOINT,
HF_TOKEN).
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from ..errors import Invalid, TrellisError, shorten
from ..options import Dataset
from . import files
from .json_files import Record

R = TypeVar("R")
NEUTRAL_SETTINGS = {"name", "version", "data_dir", "data_files", "description", "features"}
"""Settings of a dataset's configuration that do not say how its files are parsed."""


@dataclass(frozen=True)
class HubFile:
    """One file of a dataset on the hub, read over the network as it is needed."""

    url: str
    name: str
    size: int

    def open(self) -> BinaryIO:
        from huggingface_hub import HfFileSystem

        return io.BufferedReader(HfFileSystem().open(self.url, "rb"))


@dataclass
class HubSource(files.Source):
    """One split of one subset of a dataset, and what else there is. Without files, the datasets library streams it."""

    id: str = ""

    def read_files(self) -> Iterator[tuple[str, Iterator[Record]]]:
        if not self.files:
            yield "", self._stream_records()
            return
        for name, records in super().read_files():
            yield name, self._with_hub_errors(records)

    def count_rows(self) -> tuple[int | None, bool]:
        """Number of rows according to the hub."""
        split = (self._load_stream().info.splits or {}).get(self.split)
        return (int(split.num_examples), True) if split is not None and split.num_examples else (None, False)

    def _load_stream(self) -> Any:
        import datasets

        return _call_hub(
            self.id, lambda: datasets.load_dataset(self.id, self.subset, split=self.split, streaming=True)
        )  # fmt: skip

    def _stream_records(self) -> Iterator[Record]:
        rows = self._with_hub_errors(
            iter(self._load_stream().decode(False))
        )  # pictures and sound stay the bytes that they are
        return (Record(row, f"row {number}", 0) for number, row in enumerate(rows, 1))

    def _with_hub_errors(self, rows: Iterator[R]) -> Iterator[R]:
        while True:
            row = _call_hub(self.id, lambda: next(rows, None))
            if row is None:
                return
            yield row


def open_hub_source(dataset: Dataset) -> HubSource:
    """Return subset and split to read. Raise Invalid, which lists those available."""
    import datasets

    subsets = _call_hub(dataset.id, lambda: list(datasets.get_dataset_config_names(dataset.id)))
    subset = _choose("subset", dataset.subset, subsets, "default")
    splits = _call_hub(
        dataset.id, lambda: [str(split) for split in datasets.get_dataset_split_names(dataset.id, subset)]
    )
    split = _choose("split", dataset.split, splits, "train")
    found = _call_hub(dataset.id, lambda: _text_files(dataset.id, subset, split))
    return HubSource(found, split, splits, subset=subset, subsets=subsets, id=dataset.id)


def _text_files(name: str, subset: str, split: str) -> list[HubFile]:
    """The files of a split, where all of them are text that we parse and nothing says to parse them otherwise."""
    import datasets
    from huggingface_hub import HfFileSystem

    config = datasets.load_dataset_builder(name, subset).config
    urls = [str(url) for url in (config.data_files or {}).get(split, [])]
    special = any(
        getattr(config, row.name) != row.default
        for row in dataclasses.fields(config)
        if row.name not in NEUTRAL_SETTINGS
    )
    if special or not all(url.startswith("hf://") and files.file_format(url) not in (None, "parquet") for url in urls):
        return []
    hub = HfFileSystem()
    return [HubFile(url, hub.resolve_path(url).path_in_repo, int(hub.info(url)["size"])) for url in urls]


def _choose(kind: str, requested: str, available: list[str], default: str) -> str:
    chosen = requested or (default if default in available else available[0] if len(available) == 1 else "")
    if chosen not in available:
        listed = ", ".join(f"“{shorten(name)}”" for name in available[:40])
        message = f"There is no {kind} “{shorten(requested)}”" if requested else f"There are several {kind}s"
        raise Invalid(f"{message}. The {kind}s are {listed}.", field=f"dataset.{kind}", next_step="Name one of them.")
    return chosen


def _call_hub(name: str, call: Callable[[], R]) -> R:
    """Ask the hub; its library's errors become ones that a person can be shown."""
    import datasets
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return call()
    except TrellisError:
        raise
    except GatedRepoError:
        raise _access_denied(name) from None
    except (datasets.exceptions.DatasetNotFoundError, RepositoryNotFoundError) as error:
        if "is a gated dataset" in str(error) or isinstance(error.__cause__, GatedRepoError):
            raise _access_denied(name) from None
        raise Invalid(
            f"There is no dataset “{shorten(name)}” on Hugging Face, or it is private.", code="not_found",
            field="dataset.id", next_step="Check the name. A private one needs HF_TOKEN set when the studio starts.",
        ) from None  # fmt: skip
    except (
        datasets.exceptions.DataFilesNotFoundError,
        datasets.exceptions.DatasetGenerationError,
        ValueError,
    ) as error:
        raise Invalid(
            f"The dataset “{shorten(name)}” can't be read: {shorten(error, 200)}", code="unreadable",
            field="dataset.id", next_step="Choose one with JSON, CSV, Parquet or text files.",
        ) from None  # fmt: skip
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise Invalid(
            f"The dataset “{shorten(name)}” needs a script of its own, which is not run.", code="unreadable",
            field="dataset.id", next_step="Choose one with JSON, CSV, Parquet or text files.",
        ) from None  # fmt: skip
    except Exception as error:
        # The HTTP library under the hub's own has changed its name before, so its errors are known by their module.
        is_known = isinstance(error, (HfHubHTTPError, OfflineModeIsEnabled, OSError))
        if not is_known and not type(error).__module__.startswith("httpx"):
            raise
        raise TrellisError(
            f"Can't reach Hugging Face for “{shorten(name)}”: {shorten(error, 160)}", code="network",
            field="dataset.id", next_step="Check the connection and try again, or use a file.",
        ) from None  # fmt: skip


def _access_denied(name: str) -> TrellisError:
    return TrellisError(
        f"You don't have access to “{shorten(name)}” on Hugging Face.", code="permission_denied",
        field="dataset.id", next_step="Accept its terms on Hugging Face, and start the studio with HF_TOKEN set.",
    )  # fmt: skip
