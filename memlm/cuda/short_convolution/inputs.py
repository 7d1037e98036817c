"""The arguments of one call, checked, as every implementation gets them."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from memlm.cuda.boundaries import check_boundaries

L2_NORM_EPS = 1e-6


class Part(NamedTuple):
    """Consecutive output channels: heads of one size, of unit length where normalized."""

    heads: int
    head_dim: int
    normalize: bool = False

    @property
    def width(self) -> int:
        """Channels of the part."""
        return self.heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class Inputs:
    """See `short_convolution` for shapes and meaning; without a split there is one part."""

    x: Tensor
    weight: Tensor
    tail: Tensor
    cu_seqlens: Tensor | None
    silu: bool
    parts: tuple[Part, ...]

    @property
    def sequences(self) -> int:
        """N: sequences in the call."""
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def reach(self) -> int:
        """Earlier inputs that an output sees."""
        return self.weight.shape[2] - 1

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, else float32."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    def part_shapes(self) -> list[tuple[int, int, int, int]]:
        """[B, T, heads, head_dim] of every part."""
        B, T, _ = self.x.shape
        return [(B, T, part.heads, part.head_dim) for part in self.parts]

    def check(self) -> None:
        """Raise ValueError for shapes that do not fit together."""
        if self.x.ndim != 3 or not self.x.is_floating_point():
            raise ValueError(
                f"x is {self.x.dtype} {tuple(self.x.shape)}: expected floating point [B, T, D]"
            )
        B, T, D = self.x.shape
        weight = tuple(self.weight.shape)
        if len(weight) != 3 or weight[:2] != (D, 1) or weight[2] < 1:
            raise ValueError(f"weight is {weight}: expected [{D}, 1, W] with W at least 1")
        expected = (self.sequences, self.reach, D)
        if self.tail.shape != expected:
            raise ValueError(f"tail is {tuple(self.tail.shape)}, expected {expected}")
        if any(part.heads < 1 or part.head_dim < 1 for part in self.parts):
            raise ValueError(f"split is {self.parts}: heads and head_dim must be at least 1")
        width = sum(part.width for part in self.parts)
        if width != D:
            raise ValueError(f"split covers {width} channels, x has {D}")
        if self.cu_seqlens is not None:
            check_boundaries(self.cu_seqlens, B, T)
