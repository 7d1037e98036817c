"""Which rows of a step a process has, and whether it has them whole."""

import contextlib
import dataclasses
from collections.abc import Iterator

from torch import distributed as dist
from torch import nn

from memlm.layers.sequence_group import SequenceGroup
from memlm.training.feed import Batch

_OF_TARGETS = ("labels", "loss_groups", "sources")


@dataclasses.dataclass(frozen=True)
class RowShares:
    """The share of a process.

    Attributes:
        count: groups of processes that have rows of their own.
        number: of this process's group among them.
        group: the processes that hold its rows together; None = this one has whole rows.
    """

    count: int
    number: int
    group: SequenceGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the first of those with the same rows."""
        return self.group is None or self.group.rank == 0

    def own_targets(self, batch: Batch) -> Batch:
        """Rows with the targets of this process's columns only; a model takes the rest whole."""
        if self.group is None:
            return batch
        columns = self.group.columns(batch["labels"].shape[1])
        return {
            name: rows[:, columns] if name in _OF_TARGETS else rows for name, rows in batch.items()
        }


def share_rows(process: int, processes: int, together: int) -> RowShares:
    """How `processes` share the rows of a step; collective.

    Args:
        process: this one.
        processes: all; a multiple of `together`.
        together: processes, side by side, that hold each row together.
    """
    if together == 1:
        return RowShares(processes, process)
    groups = [
        dist.new_group(range(first, first + together)) for first in range(0, processes, together)
    ]
    number = process // together
    return RowShares(len(groups), number, SequenceGroup(groups[number]))


@contextlib.contextmanager
def whole_rows(model: nn.Module) -> Iterator[None]:
    """The model takes rows that this process alone has."""
    group = getattr(model, "sequence_group", None)
    if group is None:
        yield
        return
    model.set_sequence_group(None)
    try:
        yield
    finally:
        model.set_sequence_group(group)
