"""The tiles of a neural memory of two layers as its Triton kernels take them."""

import dataclasses
import itertools

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.linear_recurrence.triton_problem import target_of
from memlm.cuda.neural_memory.gates import TileGates

GROUP = 8  # steps between two kept states
NEVER = 1 << 30  # as a number of steps

Layers = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The tiles as the kernels take them.

    q, k, v: ``[M, C, D]`` with D padded to a power of two. first_tiles: int64 ``[steps + 1]``, the
    first tile of every step; lengths: int32 ``[R]``, the tiles of every row.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: TileGates
    counts: list[int]
    starts: list[int]
    first_tiles: Tensor
    lengths: Tensor
    refresh_every: int
    channels: int
    hidden: int

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: TileGates,
        counts: list[int],
        refresh_every: int,
        hidden: int,
    ) -> "Problem":
        starts = [0, *itertools.accumulate(counts)]
        lengths = [sum(count > row for count in counts) for row in range(counts[0])]
        return cls(
            *(widened(x, width(q.shape[-1])) for x in (q, k, v)),
            TileGates(*(x.contiguous() for x in gates)),
            counts,
            starts,
            torch.tensor(starts, dtype=torch.int64, device=q.device),
            torch.tensor(lengths, dtype=torch.int32, device=q.device),
            refresh_every or NEVER,
            q.shape[-1],
            width(hidden),
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """C, D."""
        return self.q.shape[1], self.q.shape[2]

    @property
    def target(self) -> int:
        """Compute capability that decides sizes."""
        return target_of(self.q.device)

    def groups(self) -> list[tuple[int, int]]:
        """First step and end of every group of steps."""
        steps = len(self.counts)
        return [(first, min(first + GROUP, steps)) for first in range(0, steps, GROUP)]

    def wide_layers(self, layers: Layers) -> Layers:
        """New, dense, float32, with zero channels."""
        _, D = self.sizes
        first, second = layers
        return (
            widened(first.float(), D, self.hidden).clone(),
            widened(second.float(), self.hidden, D).clone(),
        )

    def true_layers(self, layers: Layers, hidden: int) -> Layers:
        """Without the channels that are padding."""
        first, second = layers
        return (
            first[:, : self.channels, :hidden].contiguous(),
            second[:, :hidden, : self.channels].contiguous(),
        )

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.q.dtype, device=self.q.device)


def width(size: int) -> int:
    """Channels with padding."""
    return max(16, triton.next_power_of_2(size))


def widened(x: Tensor, *sizes: int) -> Tensor:
    """Dense, with zeros up to these sizes of the last dimensions."""
    have = x.shape[-len(sizes) :]
    padding = [(0, size - old) for size, old in zip(sizes, have, strict=True)]
    padding = [p for pair in reversed(padding) for p in pair]
    return F.pad(x, padding) if any(padding) else x.contiguous()
