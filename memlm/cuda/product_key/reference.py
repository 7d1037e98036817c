"""The formulas as they are written: score every slot, sort, gather."""

import torch
from torch import Tensor


def product_key_select(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.product_key_select`; scores all n * n slots."""
    tokens, heads, _, n = *query.shape[:3], sub_keys.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    half_scores = torch.einsum("thpd,hpnd->thpn", query.to(dtype), sub_keys.to(dtype))
    scores, order = half_scores.sort(dim=-1, descending=True, stable=True)
    # [T, H, n, n] in the order of the half ranks, so that the stable sort settles equal sums.
    pairs = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(2)
    slots = (order[:, :, 0, :, None] * n + order[:, :, 1, None, :]).flatten(2)
    best, rank = pairs.sort(dim=-1, descending=True, stable=True)
    indices = slots.gather(-1, rank[..., :k])
    return indices.int(), best[..., :k].softmax(-1).view(tokens, heads, k)


def weighted_bag(indices: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """See `memlm.cuda.weighted_bag`; gathers all rows at once."""
    dtype = torch.promote_types(torch.promote_types(weights.dtype, values.dtype), torch.float32)
    rows = values.to(dtype)[indices.long()]  # [T, bag, V]
    return (weights.to(dtype)[..., None] * rows).sum(1).to(values.dtype)
