"""One gradient norm over everything that is trained."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from memlm.training.row_optimizer import RowOptimizer
from memlm.training.zero2 import ShardedAdamW


def clip_gradients(
    parameters: Iterable[Tensor], optimizers: Sequence[torch.optim.Optimizer], limit: float
) -> float:
    """Scale all gradients so that their norm is at most `limit`; the rows' reads count too.

    Args:
        parameters: those with gradients of their own.
        optimizers: the run's; each `RowOptimizer` among them has gradients of rows, and a
            `ShardedAdamW` those of its parameters.
        limit: the largest norm, inf to only measure it.

    Returns:
        The norm before.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    holders = [one for one in optimizers if isinstance(one, RowOptimizer | ShardedAdamW)]
    dense = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    dense = dense.full_tensor() if isinstance(dense, DTensor) else dense
    norm = math.sqrt(float(dense) ** 2 + sum(optimizer.squared_norm() for optimizer in holders))
    if norm > limit:  # not for NaN: such a step is not made
        factor = limit / (norm + 1e-6)
        if parameters:  # under ZeRO-2 none has a gradient of its own
            torch._foreach_mul_([parameter.grad for parameter in parameters], factor)
        for optimizer in holders:
            optimizer.scale_gradients(factor)
    return norm
