"""Keys of one byte per channel."""

import torch
from torch import Tensor

from memlm.errors import UserError

LARGEST = 127


def quantize_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys as whole numbers of -127 .. 127 times a scale of their own: scale * int8 key.

    Every channel is off by at most half a scale, that is 1/254 of the key's largest channel.

    Args:
        keys: [..., M, D] floating point.

    Returns:
        keys: int8 [..., M, D].
        scales: float32 [..., M], largest channel / 127; 0 for a key of zeros. A key with an entry
            that is not finite gets a scale that is not finite either, and no search finds it.

    Raises:
        UserError: the keys are not floating point.
    """
    if not keys.is_floating_point():
        raise UserError(f"quantize_keys: keys are {keys.dtype}; they must be floating point")
    keys = keys.detach().float()
    if keys.shape[-1] == 0:
        return keys.to(torch.int8), keys.new_zeros(keys.shape[:-1])
    scales = keys.abs().amax(-1) / LARGEST
    # What 0 / 0 and infinity / infinity leave is no number that int8 has.
    whole = (keys / scales[..., None]).round().nan_to_num(0, 0, 0).clamp(-LARGEST, LARGEST)
    return whole.to(torch.int8), torch.where(scales.isfinite(), scales, torch.nan)
