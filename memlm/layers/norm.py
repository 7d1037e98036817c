"""Normalisations without weights."""

from torch import Tensor


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension."""
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()
