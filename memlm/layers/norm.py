"""Root mean square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.cuda.rms_norm import native


class RMSNorm(nn.RMSNorm):
    """torch's, over the last dimension and with a weight; its backward pass is quick on a CPU.

    There torch makes the backward pass from that of every single operation, three times as long for
    256 channels. Outputs are torch's, bit by bit. On a GPU torch has a kernel for each pass.

    Args:
        channels: of the last dimension.
        eps: added to the mean of the squares.
        zero_centered: the gain is 1 + weight, and the weight starts at 0; computed in float32 at
            least, as in transformers.
    """

    zero_centered = False

    def __init__(self, channels: int, eps: float, zero_centered: bool = False):
        super().__init__(channels, eps)
        self.zero_centered = zero_centered
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A gain of 1."""
        super().reset_parameters()
        if self.zero_centered:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., channels] -> [..., channels]."""
        if self.zero_centered:
            wide = torch.promote_types(x.dtype, torch.float32)
            return _norm(x.to(wide), 1 + self.weight.to(wide), self.eps).to(x.dtype)
        return _norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", zero_centered=True" if self.zero_centered else "")


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if native.refusal(x, weight) is None:
        return native.rms_norm(x, weight, eps)
    plain = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    if x.device.type != "cpu" or not plain or not torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _Normed.apply(x, weight, eps)


class _Normed(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        channels = len(weight)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = squares.div_(channels).add_(ctx.eps).rsqrt_()
        product = (gradient * x).reshape(-1, channels)
        # Sums over rows and over channels as products with a vector.
        to_weight = scale.flatten() @ product
        inner = (product @ weight).view_as(scale)
        along = inner.mul_(scale.pow(3)).div_(-channels)
        to_x = (gradient * weight).mul_(scale).addcmul_(x, along)
        return to_x, to_weight, None
