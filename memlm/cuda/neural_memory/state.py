"""What a neural memory carries from one call to the next."""

import dataclasses
from collections.abc import Callable

from torch import Tensor

NORM_EPS = 1e-5  # of the layer norm inside the depth-2 memory


@dataclasses.dataclass
class NeuralMemoryState:
    """Constant size, exact at any cut of a sequence.

    Attributes:
        anchor: per layer ``[N, H, d_in, d_out]``, the weights at the start of the current chunk,
            where its gradients are taken.
        weights: the weights now.
        momentum: the momentum of the updates.
        offset: int64 ``[N]``, tokens of the current chunk seen so far.
    """

    anchor: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    offset: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "NeuralMemoryState":
        """Apply `function` to all weights and momenta (not to the offset)."""
        parts = (self.anchor, self.weights, self.momentum)
        return NeuralMemoryState(*(tuple(map(function, part)) for part in parts), self.offset)
