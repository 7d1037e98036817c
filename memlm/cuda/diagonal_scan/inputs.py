"""The arguments of one call, checked, as every implementation gets them."""

import dataclasses

import torch
from torch import Tensor

from memlm.cuda.boundaries import check_boundaries


@dataclasses.dataclass(frozen=True)
class Inputs:
    """See `diagonal_scan` for shapes and meaning; the initial state is always given."""

    a: Tensor
    b: Tensor
    initial_state: Tensor
    cu_seqlens: Tensor | None

    @property
    def sequences(self) -> int:
        """N: sequences in the call."""
        return self.b.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the computation and of states: float64 where a or b is, else float32."""
        return state_dtype(self.a, self.b)

    def check(self) -> None:
        """Raise ValueError for shapes that do not fit together."""
        check_tokens(self.a, self.b)
        B, T, D = self.b.shape
        if self.cu_seqlens is not None:
            check_boundaries(self.cu_seqlens, B, T)
        expected = (self.sequences, D)
        if self.initial_state.shape != expected:
            raise ValueError(
                f"initial_state is {tuple(self.initial_state.shape)}, expected {expected}"
            )


def state_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """float64 where a or b is float64, else float32."""
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def check_tokens(a: Tensor, b: Tensor) -> None:
    """Raise ValueError unless a and b are floating point of one shape [B, T, D]."""
    if b.ndim != 3 or not b.is_floating_point():
        raise ValueError(f"b is {b.dtype} {tuple(b.shape)}: expected floating point [B, T, D]")
    if a.shape != b.shape or not a.is_floating_point():
        raise ValueError(
            f"a is {a.dtype} {tuple(a.shape)}: expected floating point {tuple(b.shape)}, as b"
        )
