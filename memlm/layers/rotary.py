"""Rotary positions (Su et al., "RoFormer", arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotary_angles(
    position_ids: Tensor, channels: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of every channel, each [..., channels].

    Made for `transformers`' apply_rotary_pos_emb, which pairs channel i with i + channels / 2.

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
