"""What a neural memory carries from one call to the next."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NORM_EPS = 1e-5  # of the layer norm inside a memory of two layers or more
Layers = tuple[Tensor, ...]


@dataclasses.dataclass
class NeuralMemoryState:
    """Constant size, exact at any cut of a sequence.

    A memory of two layers or more may have a gain on its layer norm, learned as the weights are:
    one more entry ``[N, H, D]`` behind those of the layers.

    Attributes:
        anchor: per layer ``[N, H, d_in, d_out]``, the weights at which gradients are taken; empty
            for the exact linear memory, which takes them at the weights themselves.
        weights: the weights now.
        momentum: the momentum of the updates.
        offset: int64 ``[N]``, tokens since the anchor was taken (since the chunk began where it
            never is).
    """

    anchor: Layers
    weights: Layers
    momentum: Layers
    offset: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "NeuralMemoryState":
        """Apply `function` to all weights and momenta (not to the offset)."""
        parts = (self.anchor, self.weights, self.momentum)
        return NeuralMemoryState(*(tuple(map(function, part)) for part in parts), self.offset)

    def refreshed(self, rows: Tensor) -> "NeuralMemoryState":
        """The weights taken as anchor where `rows` (bool ``[N]``) is true."""
        anchor = self.anchor
        if bool(rows.any()):
            anchor = tuple(
                torch.where(rows.view(-1, *[1] * (w.ndim - 1)), w, a)
                for w, a in zip(self.weights, anchor, strict=True)
            )
        return dataclasses.replace(self, anchor=anchor)

    @property
    def depth(self) -> int:
        """Layers of the memory, a gain not counted."""
        return sum(w.ndim == 4 for w in self.weights)


class RowStates(NamedTuple):
    """The states of the rows that a solver walks through, sequences times heads: per layer
    ``[rows, d_in, d_out]``, a gain as ``[rows, 1, D]``."""

    anchor: Layers
    weights: Layers
    momentum: Layers

    def rows(self, chosen: slice) -> "RowStates":
        """Those of some rows."""
        return RowStates(*(tuple(x[chosen] for x in layers) for layers in self))
