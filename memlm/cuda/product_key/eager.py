"""Fast torch: two top-k of n instead of one of n * n, then only the pairs that can still win."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.cuda.ordered_topk import ordered_topk


def product_key_select(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.product_key_select`; the pairs of the two half top-k follow a staircase."""
    n = sub_keys.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        # [H, 2, T, n]
        scores = query.to(dtype).permute(1, 2, 0, 3) @ sub_keys.to(dtype).transpose(-1, -2)
    with torch.no_grad():
        values, order = ordered_topk(scores.detach(), k)  # [H, 2, T, k]
        first, second = (pair.to(query.device) for pair in _staircase(k))
        _, pair = ordered_topk(values[:, 0][..., first] + values[:, 1][..., second], k)
        # [H, 2, T, k]: the half keys i1 and i2 of the chosen slots
        halves = torch.stack(
            (order[:, 0].gather(-1, first[pair]), order[:, 1].gather(-1, second[pair])), 1
        )
        indices = (halves[:, 0] * n + halves[:, 1]).int()
    weights = scores.gather(-1, halves).sum(1).softmax(-1)  # [H, T, k]
    return indices.transpose(0, 1), weights.transpose(0, 1)


@lru_cache
def _staircase(k: int) -> tuple[Tensor, Tensor]:
    """Pairs of half ranks (i, j) with (i + 1) * (j + 1) <= k, in lexicographic order.

    Every other pair has at least k pairs that are no worse and come earlier: all (i', j') with
    i' <= i and j' <= j. For k = 32 it leaves 119 of 1024 pairs.
    """
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    first, second = torch.tensor(pairs).unbind(1)
    return first.contiguous(), second.contiguous()


def weighted_bag(indices: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """See `memlm.cuda.weighted_bag`; torch's embedding_bag with per-sample weights."""
    dtype = values.dtype
    if values.is_cuda and dtype in (torch.bfloat16, torch.float16):
        # The gradient of per-sample weights does not exist in low precision on the GPU.
        values = values.float()
    bags = F.embedding_bag(indices, values, per_sample_weights=weights.to(values.dtype), mode="sum")
    return bags.to(dtype)
