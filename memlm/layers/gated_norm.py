"""The normalisation behind a matrix memory: RMSNorm of each head, then a SiLU gate."""

from torch import Tensor, nn
from torch.nn import functional as F


class GatedRMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension, times silu(gate) where a gate is given.

    Norm before gate, as in RetNet (Sun et al., arXiv 2307.08621) and Gated DeltaNet.
    """

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [..., channels]; gate has as many elements and is viewed as x."""
        normed = super().forward(x)
        return normed if gate is None else normed * F.silu(gate).view_as(normed)
