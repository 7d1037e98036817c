"""The state of a memory that is a matrix per head."""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from memlm.memory.base import MemoryState


@dataclasses.dataclass
class MatrixState(MemoryState):
    """recurrent: [B, heads, K, V], at least float32; zero before the first token."""

    recurrent: Tensor

    def reset(self, rows: Tensor | None = None) -> Self:
        if rows is None:
            return self._map(torch.zeros_like)
        return self._map(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0))


def zero_matrices(
    batch_size: int,
    sizes: tuple[int, int, int],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Zeros [batch_size, *sizes] in `dtype`, but never narrower than float32."""
    wide = torch.promote_types(dtype or torch.float32, torch.float32)
    return torch.zeros(batch_size, *sizes, device=device, dtype=wide)
