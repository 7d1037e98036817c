"""Fast torch: two top-k of n instead of one of n * n, then only the pairs that can still win."""

from functools import lru_cache

import torch
from torch import Tensor

from memlm.cuda.ordered_topk import ordered_topk


def forward(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.product_key_select`; the pairs of the two half top-k follow a staircase."""
    n = sub_keys.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    # [H, 2, T, n]
    scores = query.to(dtype).permute(1, 2, 0, 3) @ sub_keys.to(dtype).transpose(-1, -2)
    values, order = ordered_topk(scores, k)  # [H, 2, T, k]
    first, second = (pair.to(query.device) for pair in _staircase(k))
    best, pair = ordered_topk(values[:, 0][..., first] + values[:, 1][..., second], k)
    slots = order[:, 0].gather(-1, first[pair]) * n + order[:, 1].gather(-1, second[pair])
    return slots.int().transpose(0, 1), best.softmax(-1).transpose(0, 1)


def backward(
    query: Tensor, sub_keys: Tensor, indices: Tensor, dscores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of query and sub_keys: those of all half scores, then two products."""
    dtype, n = dscores.dtype, sub_keys.shape[2]
    halves = torch.stack((indices // n, indices % n), 2)  # [T, H, 2, k]
    half_scores = dscores.new_zeros(*halves.shape[:3], n)
    half_scores.scatter_add_(-1, halves.long(), dscores[:, :, None].expand(halves.shape))
    half_scores = half_scores.permute(1, 2, 0, 3)  # [H, 2, T, n]
    dquery = half_scores @ sub_keys.to(dtype)
    dkeys = half_scores.transpose(-1, -2) @ query.to(dtype).permute(1, 2, 0, 3)
    return dquery.permute(2, 0, 1, 3), dkeys


@lru_cache
def _staircase(k: int) -> tuple[Tensor, Tensor]:
    """Pairs of half ranks (i, j) with (i + 1) * (j + 1) <= k, in lexicographic order.

    Every other pair has at least k pairs that are no worse and come earlier: all (i', j') with
    i' <= i and j' <= j. For k = 32 it leaves 119 of 1024 pairs.
    """
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    first, second = torch.tensor(pairs).unbind(1)
    return first.contiguous(), second.contiguous()
