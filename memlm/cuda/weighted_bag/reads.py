"""What reads of a table leave for its gradient, and the order in which the gradient is summed."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Reads:
    """A table's gradient before it is summed: row indices[t, b] gets weights[t, b] * grad[t].

    It is as small as the activations, however large the table and however often rows repeat.

    Attributes:
        indices: integer [T, bag].
        weights: [T, bag].
        grad: [T, V].
    """

    indices: Tensor
    weights: Tensor
    grad: Tensor

    @classmethod
    def of_rows(cls, rows: Tensor, gradient: Tensor) -> "Reads":
        """A gradient [U, V] of the rows [U] as it is."""
        ones = torch.ones(len(rows), 1, device=rows.device, dtype=torch.float32)
        return cls(rows[:, None], ones, gradient)

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.weights.nbytes + self.grad.nbytes


class PendingReads:
    """The reads of a table since its last update, in the order of the backward passes.

    Given to `weighted_bag`, it takes the gradient of the table, which autograd then does not see.
    When the reads would be larger than the gradient of the whole table they are summed to a
    gradient of the rows that were read.

    Args:
        num_rows: rows of the table.
    """

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self.reads: list[Reads] = []

    def add(self, reads: Reads) -> None:
        self.reads.append(reads)
        dense = 4 * self.num_rows * reads.grad.shape[1]
        if len(self.reads) > 1 and self.nbytes > dense:
            from memlm.cuda.weighted_bag import row_gradients

            self.reads = [Reads.of_rows(*row_gradients(self.reads, self.num_rows))]

    def take(self) -> list[Reads]:
        """All reads; none are left."""
        reads, self.reads = self.reads, []
        return reads

    @property
    def nbytes(self) -> int:
        return sum(reads.nbytes for reads in self.reads)


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Reads sorted by row: gradient[u] is the sum of weights[r] * grads[sources[r]] over
    starts[u] <= r < starts[u + 1], in this order.

    Attributes:
        rows: int64 [U], the rows that were read, ascending.
        starts: int64 [U + 1].
        sources: int64 [R], rows of `grads`.
        weights: [R].
        grads: [S, V].
    """

    rows: Tensor
    starts: Tensor
    sources: Tensor
    weights: Tensor
    grads: Tensor


def join(reads: Sequence[Reads]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All reads one after another: rows [R], sources int64 [R], weights [R] and grads [S, V]."""
    rows = torch.cat([part.indices.flatten() for part in reads])
    weights = torch.cat([part.weights.flatten() for part in reads])
    sources, before = [], 0
    for part in reads:
        tokens, bag = part.indices.shape
        token = torch.arange(before, before + tokens, device=rows.device)
        sources.append(token.repeat_interleave(bag))
        before += tokens
    grads = reads[0].grad if len(reads) == 1 else torch.cat([part.grad for part in reads])
    return rows, torch.cat(sources), weights, grads


def plan_rows(reads: Sequence[Reads]) -> RowPlan:
    """Sort the reads by row, those of a row in the order in which they were made."""
    rows, sources, weights, grads = join(reads)
    rows, order = rows.sort(stable=True)
    rows, counts = rows.unique_consecutive(return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return RowPlan(rows.long(), starts, sources[order], weights[order], grads)
