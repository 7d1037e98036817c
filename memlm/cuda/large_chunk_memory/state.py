"""What a large-chunk memory carries from one call to the next, and the step of its weights."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

# Muon's quintic iteration, x <- a x + b x x^T x + c (x x^T)^2 x (Jordan et al. 2024, "Muon").
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
NORM_EPS = 1e-12  # added to a squared norm


@dataclasses.dataclass
class LargeChunkMemoryState:
    """Constant size, exact at any cut of a sequence.

    Attributes:
        weights: W1 and W3 side by side ``[N, H, D, 2 h]``, and W2 ``[N, H, h, D]``: those that
            the current chunk began with.
        momentum: of the same shapes; not looked at without momentum.
        pending: the gradients of the current chunk so far, of the same shapes.
        gate_sum: sum of the momentum gates of the current chunk, ``[N, H]``; not looked at without
            momentum.
        offset: int64 ``[N]``, tokens of the current chunk seen so far, below its size.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    pending: tuple[Tensor, ...]
    gate_sum: Tensor
    offset: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "LargeChunkMemoryState":
        """Apply `function` to everything except the offset."""
        parts = (self.weights, self.momentum, self.pending)
        return LargeChunkMemoryState(
            *(tuple(map(function, part)) for part in parts), function(self.gate_sum), self.offset
        )


def orthogonal(x: Tensor) -> Tensor:
    """Bring the singular values of the matrices ``[*, m, n]`` near 1, keeping their vectors."""
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def channel_norm(w: Tensor) -> Tensor:
    """Norm of every output channel, ``[*, 1, d_out]``."""
    return (w.square().sum(-2, keepdim=True) + NORM_EPS).sqrt()
