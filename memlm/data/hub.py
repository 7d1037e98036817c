"""Documents of datasets on the Hub (or in a folder), read as a whole or streamed."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from memlm.data.config import HubSource
from memlm.errors import UserError, nearest

_NAMED_PARTS = 5  # of the path of a prepared file: dataset, config, version, hash, file


def hub_documents(source: HubSource, seed: int) -> Iterator[str]:
    """Documents of a Hub dataset in its order, or through a seeded shuffle buffer.

    Raises UserError when the dataset, config, split or column cannot be found, and when a stream
    breaks off.
    """
    yield from HubReader(source, seed)


def find_revision(source: HubSource) -> str | None:
    """The commit that the dataset is at now; None for a local folder.

    Raises UserError when the Hub does not tell.
    """
    from huggingface_hub import HfApi

    if Path(source.dataset).exists():
        return None
    try:
        return HfApi().dataset_info(source.dataset).sha
    # Without a connection, an error of whatever HTTP library it has.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"source hub: cannot load {source.dataset!r} ({reason[0]})") from error


def prepared_files(source: HubSource) -> list[list[Any]]:
    """Name and size of the files that the library made of a dataset, which is loaded as a whole.

    The name holds the dataset, its config and a hash that changes with its files, but not where
    the library's cache is. Raises UserError as `hub_documents`.
    """
    reader = HubReader(source, 0)
    next(iter(reader), None)
    found = [Path(file["filename"]) for file in reader.dataset.cache_files]
    return [["/".join(path.parts[-_NAMED_PARTS:]), path.stat().st_size] for path in found]


class HubReader:
    """One reading of a Hub dataset, from its beginning or from where another one stood.

    Args:
        source: the dataset.
        seed: of the shuffle buffer.
        state: where to go on, as `state` gave it.
        revision: commit of the dataset; None = the newest.

    Raises UserError as `hub_documents`, once it is iterated.
    """

    def __init__(
        self,
        source: HubSource,
        seed: int,
        state: dict[str, Any] | None = None,
        revision: str | None = None,
    ) -> None:
        self.source, self.seed, self.revision = source, seed, revision
        self._start = state
        self.dataset: Any = None

    def __iter__(self) -> Iterator[str]:
        source = self.source
        rows = self._rows()
        first = next(rows, None)
        if first is None and self._start is None:
            raise UserError(f"source hub: {source.dataset!r} split {source.split!r} is empty")
        for number, row in enumerate(chain([] if first is None else [first], rows)):
            if number == 0:
                self._check_column(row)
            if isinstance(row[source.column], str):
                yield row[source.column]

    @property
    def state(self) -> dict[str, Any] | None:
        """Where the reading stands after the last document; None where that cannot be kept.

        A shuffle buffer's content belongs to no state that the library could give.
        """
        if self.dataset is None or not self.source.streaming or self.source.shuffle_buffer:
            return None
        return json.loads(json.dumps(self.dataset.state_dict()))

    def _rows(self) -> Iterator[dict[str, Any]]:
        import datasets
        import pyarrow

        source, count = self.source, 0
        try:
            dataset = datasets.load_dataset(
                source.dataset,
                source.config,
                split=source.split,
                streaming=source.streaming,
                revision=self.revision,
            )
            if source.shuffle_buffer and source.streaming:
                dataset = dataset.shuffle(seed=self.seed, buffer_size=source.shuffle_buffer)
            if self._start is not None:
                dataset.load_state_dict(self._start)
            self.dataset = dataset
            for row in dataset:
                count += 1
                yield row
        except UserError:
            raise
        except (
            ValueError,
            OSError,
            datasets.exceptions.DatasetsError,
            pyarrow.ArrowException,
        ) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            what = f"cannot read on after {count} rows of" if count else "cannot load"
            raise UserError(f"source hub: {what} {source.dataset!r} ({reason[0]})") from error

    def _check_column(self, row: dict[str, Any]) -> None:
        source = self.source
        if source.column not in row:
            hint = nearest(source.column, row) or f" (valid: {', '.join(row)})"
            raise UserError(f"source hub: {source.dataset!r} has no column {source.column!r}{hint}")
        value = row[source.column]
        if value is not None and not isinstance(value, str):
            raise UserError(
                f"source hub: {source.dataset!r}: column {source.column!r} holds "
                f"{type(value).__name__}, not strings"
            )
