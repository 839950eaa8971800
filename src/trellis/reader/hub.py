"""Datasets on the Hugging Face hub as rows, streamed by the datasets library. Scripts are never run.

Address and token come from the environment that the library itself reads (HF_ENDPOINT, HF_TOKEN).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import Invalid, TrellisError, shorten
from ..params import Dataset
from .files import Row

R = TypeVar("R")


@dataclass(frozen=True)
class HubSource:
    """One split of one subset of a dataset, and what else there is."""

    id: str
    subset: str
    split: str
    subsets: list[str]
    splits: list[str]


def source_of(dataset: Dataset) -> HubSource:
    """The subset and split to read. Raises Invalid, which lists what there is."""
    import datasets

    subsets = _asked(dataset.id, lambda: list(datasets.get_dataset_config_names(dataset.id)))
    subset = _choose("subset", dataset.subset, subsets, "default")
    splits = _asked(dataset.id, lambda: [str(split) for split in datasets.get_dataset_split_names(dataset.id, subset)])
    return HubSource(dataset.id, subset, _choose("split", dataset.split, splits, "train"), subsets, splits)


def rows(source: HubSource) -> tuple[Iterator[Row], int | None]:
    """All rows, streamed, and how many the hub says there are."""
    import datasets

    stream = _asked(
        source.id, lambda: datasets.load_dataset(source.id, source.subset, split=source.split, streaming=True)
    )
    split = (stream.info.splits or {}).get(source.split)
    return _each(source, iter(stream)), int(split.num_examples) if split is not None and split.num_examples else None


def _each(source: HubSource, stream: Iterator[Any]) -> Iterator[Row]:
    while True:
        row = _asked(source.id, lambda: next(stream, None))
        if row is None:
            return
        yield row


def _choose(what: str, wanted: str, there: list[str], usual: str) -> str:
    chosen = wanted or (usual if usual in there else there[0] if len(there) == 1 else "")
    if chosen not in there:
        listed = ", ".join(f"“{shorten(name)}”" for name in there[:40])
        say = f"There is no {what} “{shorten(wanted)}”" if wanted else f"There are several {what}s"
        raise Invalid(f"{say}. The {what}s are {listed}.", field=f"dataset.{what}", next_step="Name one of them.")
    return chosen


def _asked(name: str, work: Callable[[], R]) -> R:
    """Ask the hub; its library's errors become ones that a person can be shown."""
    import datasets
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return work()
    except TrellisError:
        raise
    except GatedRepoError:
        raise _refused(name) from None
    except (datasets.exceptions.DatasetNotFoundError, RepositoryNotFoundError) as error:
        if "is a gated dataset" in str(error) or isinstance(error.__cause__, GatedRepoError):
            raise _refused(name) from None
        raise Invalid(
            f"There is no dataset “{shorten(name)}” on the hub, or it is private.", code="not_found",
            field="dataset.id", next_step="Check the name. A private one needs HF_TOKEN set when the studio starts.",
        ) from None  # fmt: skip
    except (
        datasets.exceptions.DataFilesNotFoundError,
        datasets.exceptions.DatasetGenerationError,
        ValueError,
    ) as error:
        raise Invalid(
            f"The dataset “{shorten(name)}” cannot be read: {shorten(error, 200)}", code="unreadable",
            field="dataset.id", next_step="Choose one with JSON, CSV, Parquet or text files.",
        ) from None  # fmt: skip
    except Exception as error:
        # The HTTP library under the hub's own has changed its name before, so its errors are known by their module.
        told = isinstance(error, (HfHubHTTPError, OfflineModeIsEnabled, OSError))
        if not told and not type(error).__module__.startswith("httpx"):
            raise
        raise TrellisError(
            f"The hub could not be reached for “{shorten(name)}”: {shorten(error, 160)}", code="network",
            field="dataset.id", next_step="Check the connection and try again, or use a file.",
        ) from None  # fmt: skip


def _refused(name: str) -> TrellisError:
    return TrellisError(
        f"The hub does not give “{shorten(name)}” to you.", code="permission_denied",
        field="dataset.id", next_step="Accept its terms on the hub, and start the studio with a token in HF_TOKEN.",
    )  # fmt: skip
