"""Rotary positions (Su et al., "RoFormer", arXiv 2104.09864), also with stretched frequencies."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from memlm.layers.rope_scaling import scaled_frequencies


@dataclasses.dataclass(frozen=True)
class Rotary:
    """What turns the channels of a head.

    Attributes:
        channels: how many are turned, the first ones of a head; even.
        theta: base of the frequencies, theta ** (-2 i / channels).
        scaling: how these are stretched, the items of `AttentionConfig.rope_scaling`.
    """

    channels: int
    theta: float
    scaling: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def scaled(cls, channels: int, theta: float, scaling: dict[str, Any] | None) -> "Rotary":
        """With the scaling as configured; `default` is none."""
        if scaling is None or scaling["rope_type"] == "default":
            return cls(channels, theta)
        return cls(channels, theta, tuple(sorted(scaling.items())))

    def angles(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angle of every turned channel, each [..., channels].

        Channel i is paired with i + channels / 2, as in `rotate` and in transformers. Both are
        multiplied by the attention factor of the scaling, where it has one.

        Args:
            position_ids: int64 [...], position within the document.
            dtype: of the result; the angles are float64, which holds any position.
        """
        # Computed from the positions of the call: a buffer of frequencies would be left
        # uninitialised by loading on the meta device.
        factor = 1.0
        if self.scaling:
            frequencies, factor = scaled_frequencies(
                self.channels, self.theta, self.scaling, position_ids.device
            )
        else:
            frequencies = _frequencies(self.channels, self.theta, position_ids.device)
        angles = position_ids[..., None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if factor != 1:
            cos, sin = cos * factor, sin * factor
        return cos.to(dtype), sin.to(dtype)


@functools.lru_cache(maxsize=64)
def _frequencies(channels: int, theta: float, device: torch.device) -> Tensor:
    """float64 [channels / 2], radians per position."""
    # Kept for later calls, so made as an ordinary tensor wherever the first one stands.
    with torch.inference_mode(False):
        steps = torch.arange(0, channels, 2, device=device, dtype=torch.float64)
        return theta ** (-steps / channels)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of channels of x [..., heads, channels] by the angles of `Rotary.angles`.

    Args:
        x: queries or keys; channels behind those that are turned are left as they are.
        cos, sin: [..., turned channels]; no gradient goes there.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return _Rotated.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin, 1)


def rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and keys [B, T, heads, channels]; without gradients a few tokens are
    turned as one tensor, since every operation takes as long as another then."""
    if torch.is_grad_enabled() or query.shape[1] > 1 or cos.shape[-1] < query.shape[-1]:
        return rotate(query, cos, sin), rotate(key, cos, sin)
    both, half = torch.cat([query, key], -2), query.shape[-1] // 2
    first, second = both.split([half, half], -1)
    turned = (both * cos.unsqueeze(-2)).addcmul_(
        torch.cat([second.neg(), first], -1), sin.unsqueeze(-2)
    )
    return turned.split([query.shape[-2], key.shape[-2]], -2)


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
    channels = cos.shape[-1]
    half = channels // 2
    turned = x[..., :channels] * cos
    if channels < x.shape[-1]:
        turned = torch.cat([turned, x[..., channels:]], -1)
    turned[..., :half].addcmul_(x[..., half:channels], sin[..., :half], value=-direction)
    turned[..., half:channels].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return turned
