"""Rows that several processes hold together: each has a run of the columns (sequence parallelism).

Process r of n has the r-th of n equal runs of every row. Every function here is a collective: all
processes of the group call it in the same order, forward and backward.
"""

import dataclasses

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.nn import functional as collectives

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
        a gradient (numbers of tokens, positions) may be given as well.
        """
        if tensor.requires_grad and torch.is_grad_enabled():
            return collectives.all_gather(tensor, self.group)
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor.contiguous(), group=self.group)
        return tuple(found)
