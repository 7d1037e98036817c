"""Reads of a value table of which every process holds a part.

By columns (Berges et al. 2024, "Memory Layers at Scale", section 3.2) every process reads its part
of the channels for the tokens of all: indices, weights and sums travel. By rows every process asks
the others for the distinct rows that its tokens read: rows travel. Both leave the same sums, in
float32 bit by bit, as one process with the whole table.
"""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from memlm.cuda import PendingReads, Reads, gathered_dot, row_gradients, weighted_bag
from memlm.memory.exchange import all_counts, all_rows, exchange
from memlm.memory.value_table import ValueTable

By = Literal["columns", "rows"]


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How a table is divided, and how it is read then.

    Attributes:
        by: columns or rows.
        group: the processes that hold the table together.
        bounds: process r has the columns, or rows, bounds[r] to bounds[r + 1].
    """

    by: By
    group: dist.ProcessGroup
    bounds: tuple[int, ...]

    @torch.compiler.disable
    def bag(
        self, table: ValueTable, indices: Tensor, weights: Tensor, gate: Tensor | None = None
    ) -> Tensor:
        """`memlm.cuda.weighted_bag` of this process's tokens, of which there may be none.

        A collective of the group, as is its backward pass.
        """
        function = _WAYS[self.by][0]
        sums = function.apply(indices, weights, _local(table.weight), self, table.pending)
        if gate is None:
            return sums
        # A bag of one row: the same gate, to the last bit, as at the end of every other bag.
        own = torch.arange(len(sums), dtype=torch.int32, device=sums.device)[:, None]
        return weighted_bag(own, torch.ones_like(own, dtype=torch.float32), sums, gate)

    @torch.compiler.disable
    def dot(self, table: ValueTable, indices: Tensor, x: Tensor) -> Tensor:
        """`memlm.cuda.gathered_dot` of this process's tokens; a collective as `bag`."""
        function = _WAYS[self.by][1]
        return function.apply(indices, x, _local(table.weight), self, table.pending)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def sizes(self) -> list[int]:
        """Columns or rows of every process."""
        return [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]


# --- by columns: a token's sums are made by all processes ---


class _ColumnBag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        indices: Tensor,
        weights: Tensor,
        values: Tensor,
        sharding: Sharding,
        pending: PendingReads | None,
    ) -> Tensor:
        tokens = all_counts(len(indices), sharding.group, indices.device)
        indices = all_rows(indices, tokens, sharding.group)
        all_weights = all_rows(weights, tokens, sharding.group)
        ctx.save_for_backward(indices, all_weights, values)
        ctx.sharding, ctx.pending, ctx.tokens = sharding, pending, tokens
        return _own_tokens(weighted_bag(indices, all_weights, values), tokens, sharding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        indices, weights, values = ctx.saved_tensors
        dweights = dvalues = None
        dout = _own_columns(dout, ctx.tokens, ctx.sharding)
        if ctx.needs_input_grad[1]:
            partial = gathered_dot(indices, dout, values)
            dweights = _sum_of_own(partial, ctx.tokens, ctx.sharding).to(weights.dtype)
        if ctx.needs_input_grad[2]:
            dvalues = _table_gradient(Reads(indices, weights, dout), values, ctx.pending)
        return None, dweights, dvalues, None, None


class _ColumnDot(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        indices: Tensor,
        x: Tensor,
        values: Tensor,
        sharding: Sharding,
        pending: PendingReads | None,
    ) -> Tensor:
        tokens = all_counts(len(indices), sharding.group, indices.device)
        indices = all_rows(indices, tokens, sharding.group)
        x = _own_columns(x, tokens, sharding)
        ctx.save_for_backward(indices, x, values)
        ctx.sharding, ctx.pending, ctx.tokens = sharding, pending, tokens
        return _sum_of_own(gathered_dot(indices, x, values), tokens, sharding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        indices, x, values = ctx.saved_tensors
        dx = dvalues = None
        dout = all_rows(dout, ctx.tokens, ctx.sharding.group)
        if ctx.needs_input_grad[1]:
            sums = weighted_bag(indices, dout, values)
            dx = _own_tokens(sums, ctx.tokens, ctx.sharding).to(x.dtype)
        if ctx.needs_input_grad[2]:
            dvalues = _table_gradient(Reads(indices, dout, x), values, ctx.pending)
        return None, dx, dvalues, None, None


def _own_tokens(columns: Tensor, tokens: list[int], sharding: Sharding) -> Tensor:
    """All columns of the own tokens, from the own columns of all tokens."""
    own, width = tokens[sharding.rank], columns.shape[1]
    received = [own * size for size in sharding.sizes]
    sent = [count * width for count in tokens]
    parts = exchange(columns.flatten(), sent, received, sharding.group).split(received)
    columns = zip(parts, sharding.sizes, strict=True)
    return torch.cat([part.view(own, size) for part, size in columns], 1)


def _own_columns(x: Tensor, tokens: list[int], sharding: Sharding) -> Tensor:
    """The own columns of all tokens, from all columns of the own tokens."""
    width = sharding.sizes[sharding.rank]
    parts = torch.cat([part.flatten() for part in x.split(sharding.sizes, 1)])
    sent = [len(x) * size for size in sharding.sizes]
    received = [count * width for count in tokens]
    return exchange(parts, sent, received, sharding.group).view(-1, width)


def _sum_of_own(partial: Tensor, tokens: list[int], sharding: Sharding) -> Tensor:
    """The sum over the processes of what each has for the own tokens, [tokens, bag].

    A reduce-scatter of unequal parts, in one order with every backend.
    """
    own = tokens[sharding.rank]
    received = exchange(partial, tokens, [own] * len(tokens), sharding.group)
    return received.view(len(tokens), own, partial.shape[1]).sum(0)


# --- by rows: a token's sums are made by its process, from rows of all ---


class _RowBag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        indices: Tensor,
        weights: Tensor,
        values: Tensor,
        sharding: Sharding,
        pending: PendingReads | None,
    ) -> Tensor:
        rows, indices, ctx.fetched = _fetch(indices, values, sharding)
        ctx.save_for_backward(indices, weights, rows)
        ctx.pending, ctx.values = pending, values.detach()
        return weighted_bag(indices, weights, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        indices, weights, rows = ctx.saved_tensors
        dweights = dvalues = None
        dout = dout.contiguous()
        if ctx.needs_input_grad[1]:
            dweights = gathered_dot(indices, dout, rows).to(weights.dtype)
        if ctx.needs_input_grad[2]:
            reads = ctx.fetched.send_back(Reads(indices, weights, dout))
            dvalues = _table_gradient(reads, ctx.values, ctx.pending)
        return None, dweights, dvalues, None, None


class _RowDot(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        indices: Tensor,
        x: Tensor,
        values: Tensor,
        sharding: Sharding,
        pending: PendingReads | None,
    ) -> Tensor:
        rows, indices, ctx.fetched = _fetch(indices, values, sharding)
        ctx.save_for_backward(indices, x, rows)
        ctx.pending, ctx.values = pending, values.detach()
        return gathered_dot(indices, x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        indices, x, rows = ctx.saved_tensors
        dx = dvalues = None
        dout = dout.contiguous()
        if ctx.needs_input_grad[1]:
            dx = weighted_bag(indices, dout, rows).to(x.dtype)
        if ctx.needs_input_grad[2]:
            reads = ctx.fetched.send_back(Reads(indices, dout, x))
            dvalues = _table_gradient(reads, ctx.values, ctx.pending)
        return None, dx, dvalues, None, None


@dataclasses.dataclass(frozen=True)
class _Fetched:
    """Which rows were exchanged.

    Attributes:
        asked: rows that this process asked for, by their owner.
        given: rows of this process that the others asked for, by who did.
        rows: [sum(given)], numbers of those within this process's part.
    """

    asked: list[int]
    given: list[int]
    rows: Tensor
    group: dist.ProcessGroup

    def send_back(self, reads: Reads) -> Reads:
        """The gradients of the rows of this process, from reads of the fetched rows."""
        _, gradient = row_gradients([reads], sum(self.asked))  # every fetched row was read
        received = exchange(gradient, self.asked, self.given, self.group)
        return Reads.of_rows(self.rows, received)


def _fetch(indices: Tensor, values: Tensor, sharding: Sharding) -> tuple[Tensor, Tensor, _Fetched]:
    """The distinct rows that are read [U, V], and the reads as int32 rows of those."""
    group = sharding.group
    distinct, inverse = indices.unique(return_inverse=True)
    bounds = torch.tensor(sharding.bounds, device=indices.device, dtype=distinct.dtype)
    wanted = torch.searchsorted(distinct, bounds).diff()
    one = [1] * len(wanted)
    asked, given = torch.stack([wanted, exchange(wanted, one, one, group)]).tolist()
    rows = exchange(distinct, asked, given, group) - sharding.bounds[sharding.rank]
    fetched = exchange(values[rows.long()], given, asked, group)
    return fetched, inverse.int(), _Fetched(asked, given, rows, group)


# --- both ---

_WAYS: dict[str, tuple[type[torch.autograd.Function], type[torch.autograd.Function]]] = {
    "columns": (_ColumnBag, _ColumnDot),
    "rows": (_RowBag, _RowDot),
}


def _local(weight: DTensor) -> Tensor:
    """The part of this process; its gradients are still to be summed over copies of it."""
    gradients = [Partial() if p.is_replicate() else p for p in weight.placements]
    return weight.to_local(grad_placements=gradients)


def _table_gradient(reads: Reads, values: Tensor, pending: PendingReads | None) -> Tensor | None:
    """The gradient of the whole part, unless `pending` takes the reads."""
    if pending is not None:
        pending.add(reads)
        return None
    rows, gradient = row_gradients([reads], len(values))
    dense = gradient.new_zeros(values.shape).index_copy_(0, rows, gradient)
    return dense.to(values.dtype)
