"""Rotary positions (Su et al., "RoFormer", arXiv 2104.09864)."""

from typing import Any

import torch
from torch import Tensor


def rotary_angles(
    position_ids: Tensor, channels: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of every channel, each [..., channels].

    Channel i is paired with i + channels / 2, as in `rotate` and in transformers.

    Args:
        position_ids: int64 [...], position within the document.
        channels: even.
        theta: base of the frequencies, theta ** (-2 i / channels).
        dtype: of the result; the angles are float64, which holds any position.
    """
    # Computed from the positions of the call: a buffer of frequencies would be left uninitialised
    # by loading on the meta device.
    steps = torch.arange(0, channels, 2, device=position_ids.device, dtype=torch.float64)
    angles = position_ids[..., None] * theta ** (-steps / channels)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of channels of x [..., heads, channels] by the angles of `rotary_angles`.

    Args:
        x: queries or keys.
        cos, sin: [..., channels]; no gradient goes there.
    """
    return _Rotated.apply(x, cos.unsqueeze(-2), sin.unsqueeze(-2))


class _Rotated(torch.autograd.Function):
    """A rotation, whose backward pass turns the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _turn(gradient, *ctx.saved_tensors, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return turned
