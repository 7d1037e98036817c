"""Rotary positions (Su et al., "RoFormer", arXiv 2104.09864), also with stretched frequencies."""

import dataclasses
import functools
import types
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from memlm.errors import UserError, nearest, require_known

# Keys of each kind of scaling: those it must have, and those it may have.
_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
_BY_LENGTH = ("dynamic", "longrope")


def check_rope_scaling(scaling: dict[str, Any], theta: float) -> None:
    """Raise UserError for a `rope_scaling` that cannot work (see `AttentionConfig`)."""
    kind = scaling.get("rope_type")
    if kind in _BY_LENGTH:
        raise UserError(
            f"rope_scaling: the frequencies of {kind} depend on the length of the call, so a text "
            f"read in parts would differ; use {', '.join(_SCALINGS)}"
        )
    if kind not in _SCALINGS:
        what = "rope_type is missing" if kind is None else f"rope_type {kind!r} is unknown"
        raise UserError(
            f"rope_scaling: {what}{nearest(kind, _SCALINGS)} (valid: {', '.join(_SCALINGS)})"
        )
    required, optional = _SCALINGS[kind]
    require_known(scaling, ("rope_type", *required, *optional), f"rope_scaling of {kind}")
    missing = [key for key in required if scaling.get(key) is None]
    if missing:
        raise UserError(f"rope_scaling: {kind} needs {', '.join(missing)}")
    for key, value in scaling.items():
        if key == "rope_type" or (value is None and key in optional):
            continue
        if key == "truncate":
            if not isinstance(value, bool):
                raise UserError(f"rope_scaling: truncate must be true or false, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**63:
            raise UserError(f"rope_scaling: {key} must be a positive number, got {value!r}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise UserError("rope_scaling: high_freq_factor must be more than low_freq_factor")
    if kind == "yarn" and theta <= 1:
        raise UserError(f"rope_scaling: yarn needs a rope_theta above 1, got {theta}")


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
            frequencies, factor = _scaled_frequencies(self, position_ids.device)
        else:
            steps = torch.arange(
                0, self.channels, 2, device=position_ids.device, dtype=torch.float64
            )
            frequencies = self.theta ** (-steps / self.channels)
        angles = position_ids[..., None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if factor != 1:
            cos, sin = cos * factor, sin * factor
        return cos.to(dtype), sin.to(dtype)


@functools.lru_cache(maxsize=64)
def _scaled_frequencies(rotary: Rotary, device: torch.device) -> tuple[Tensor, float]:
    """float64 [channels / 2], radians per position, and the factor on cosine and sine."""
    scaling = dict(rotary.scaling)
    config = types.SimpleNamespace(
        rope_parameters={**scaling, "rope_theta": rotary.theta},
        head_dim=rotary.channels,
        hidden_size=rotary.channels,
        num_attention_heads=1,
        standardize_rope_params=lambda: None,  # they are
    )
    # Kept for later calls, so made as an ordinary tensor wherever the first one stands.
    with torch.inference_mode(False), torch.device("cpu"):
        frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
        return frequencies.double().to(device), factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of channels of x [..., heads, channels] by the angles of `Rotary.angles`.

    Args:
        x: queries or keys; channels behind those that are turned are left as they are.
        cos, sin: [..., turned channels]; no gradient goes there.
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
    channels = cos.shape[-1]
    half = channels // 2
    turned = x[..., :channels] * cos
    if channels < x.shape[-1]:
        turned = torch.cat([turned, x[..., channels:]], -1)
    turned[..., :half].addcmul_(x[..., half:channels], sin[..., :half], value=-direction)
    turned[..., half:channels].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return turned
