"""Rows of the next step, prepared while the current one is computed."""

from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from memlm.data import PackedDataset

Batch = dict[str, Tensor]


def read_batch(dataset: PackedDataset, rows: range) -> Batch:
    """Rows by number, int64 [rows, length] each.

    Of several sources, `sources` has the number of its own at every place.
    """
    batch = dataset.batch(rows)
    if len(dataset.source_names) > 1:
        sources = dataset.sources_of(rows)
        batch["sources"] = sources[:, None].expand_as(batch["labels"])
    return batch


class RowFeed:
    """The rows one process needs, step by step.

    Step s of the whole run takes the global rows s * rows .. (s + 1) * rows - 1 of its dataset;
    process p of n takes the p-th of n equal slices, so the data of a step depends neither on the
    number of processes nor on where a run was interrupted.

    Args:
        dataset: rows of this stage.
        rows: rows of one step over all processes.
        process, processes: this process and their number; `rows` is a multiple of `processes`.
    """

    def __init__(self, dataset: PackedDataset, rows: int, process: int = 0, processes: int = 1):
        self.dataset = dataset
        self.rows = rows
        self.share = rows // processes
        self.first = process * self.share
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._pending: tuple[int, Future[Batch]] | None = None

    def get(self, step: int) -> Batch:
        """The rows of `step`, int64 [rows / processes, length] each; starts on the next step's.

        See `read_batch`.
        """
        pending, self._pending = self._pending, None
        if pending is None or pending[0] != step:
            pending = (step, self._executor.submit(self._read, step))
        batch = pending[1].result()
        self._pending = (step + 1, self._executor.submit(self._read, step + 1))
        return batch

    def close(self) -> None:
        """Stop preparing rows."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> Batch:
        start = step * self.rows + self.first
        return read_batch(self.dataset, range(start, start + self.share))
