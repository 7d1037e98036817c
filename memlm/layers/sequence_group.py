"""Rows that several processes hold together: each has a run of the columns (sequence parallelism).

Process r of n has the r-th of n equal runs of every row. Every function here is a collective: all
processes of the group call it in the same order. Backward they are called in the reverse order,
since autograd runs what was made last first; so each has to be part of the graph on every process
or on none. Where a process has no use for what it gets, `tied` keeps it there.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from memlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class SequenceGroup:
    """The processes that hold the rows of a call together.

    Attributes:
        group: of torch.distributed; rank r holds the r-th run of columns.
    """

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def is_last(self) -> bool:
        """Whether this process has the last columns."""
        return self.rank == self.size - 1

    def columns(self, length: int) -> slice:
        """The columns of this process in rows of `length` tokens.

        Raises:
            UserError: when they cannot be shared equally.
        """
        if length % self.size:
            raise UserError(
                f"sequence parallelism: rows of {length} tokens cannot be shared equally by "
                f"{self.size} processes"
            )
        own = length // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def gather(self, columns: Tensor) -> Tensor:
        """Whole rows [B, T, ...] of every process's [B, T / size, ...], with gradient."""
        return torch.cat(self.all(columns), dim=1)

    def all(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """What `tensor` is on every process, by rank, all of one shape and type.

        The gradient of a process's own is the sum of what all processes send back. Tensors without
        a gradient (numbers of tokens, positions) may be given as well. Whether it needs a gradient
        has to be the same on all processes, and each has to use what it gets, or to `tied` it.
        """
        return _AllGather.apply(tensor, self.group)

    def from_previous(self, tensor: Tensor) -> Tensor:
        """What `tensor` is on the process before, of one shape and type; zeros on the first.

        Whether it needs a gradient has to be the same on all processes, and each has to use what
        it gets, or to `tied` it.
        """
        return _FromPrevious.apply(tensor, self)


def tied(tensor: Tensor, *others: Tensor) -> Tensor:
    """`tensor`, behind which the others are part of the graph, without an effect on it."""
    return _Tied.apply(tensor, *others)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype) for other in others]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Zeros rather than nothing: on a GPU, autograd runs what is given nothing in a thread of
        # its own, out of order.
        zeros = [gradient.new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.others]
        return gradient, *zeros


class _AllGather(torch.autograd.Function):
    """Every process's tensor. Backward the gradients meet where each tensor comes from."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        ctx.group = group
        tensor = tensor.contiguous()  # what is sent and what is found lie in the same order
        found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, tensor, group=group)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        parts = [gradient.contiguous() for gradient in gradients]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None


class _FromPrevious(torch.autograd.Function):
    """The tensor of the process before. Backward its gradient goes back there."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sequence: SequenceGroup) -> Tensor:
        ctx.sequence = sequence
        return _shift(tensor, sequence, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _shift(gradient, ctx.sequence, -1), None


def _shift(tensor: Tensor, sequence: SequenceGroup, step: int) -> Tensor:
    """What the process `step` ranks before has; zeros where there is none."""
    found, tensor = (
        torch.zeros_like(tensor, memory_format=torch.contiguous_format),
        tensor.contiguous(),
    )
    source, target = sequence.rank - step, sequence.rank + step
    exchanges = []
    if 0 <= target < sequence.size:
        exchanges.append(dist.P2POp(dist.isend, tensor, group=sequence.group, group_peer=target))
    if 0 <= source < sequence.size:
        exchanges.append(dist.P2POp(dist.irecv, found, group=sequence.group, group_peer=source))
    if exchanges and tensor.numel():
        for work in dist.batch_isend_irecv(exchanges):
            work.wait()
    return found
