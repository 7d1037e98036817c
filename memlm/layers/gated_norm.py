"""The normalisation behind a matrix memory: RMSNorm of each head, then a gate."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from memlm.cuda.rms_norm import native

GATE_ACTIVATIONS = {"silu": F.silu, "sigmoid": F.sigmoid}


class GatedRMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension, times activation(gate) where a gate is given.

    Norm before gate, as in RetNet (Sun et al., arXiv 2307.08621) and Gated DeltaNet.
    """

    def __init__(
        self, channels: int, eps: float, gate_activation: Literal["silu", "sigmoid"] = "silu"
    ):
        super().__init__(channels, eps)
        self.gate_activation = gate_activation

    def opening(self, gate: Tensor) -> Tensor:
        """What the normed values are multiplied by, shaped as the gate."""
        return GATE_ACTIVATIONS[self.gate_activation](gate)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [..., channels]; gate has as many elements and is viewed as x."""
        if native.refusal(x, self.weight) is None:
            return native.rms_norm(x, self.weight, self.eps, gate, self.gate_activation)
        normed = super().forward(x)
        return normed if gate is None else normed * self.opening(gate).view_as(normed)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gate_activation={self.gate_activation}"
