"""The formulas as they are written: score every slot, sort."""

import torch
from torch import Tensor


def forward(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
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


def backward(
    query: Tensor, sub_keys: Tensor, indices: Tensor, dscores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of query and sub_keys: a score is the sum of two products."""
    tokens, heads, n = *query.shape[:2], sub_keys.shape[2]
    halves = torch.stack((indices // n, indices % n), 2)
    dquery = torch.zeros_like(query, dtype=dscores.dtype)
    dkeys = torch.zeros_like(sub_keys, dtype=dscores.dtype)
    for t in range(tokens):
        for h in range(heads):
            for p in (0, 1):
                for i, ds in zip(halves[t, h, p].tolist(), dscores[t, h], strict=True):
                    dquery[t, h, p] += ds * sub_keys[h, p, i]
                    dkeys[h, p, i] += ds * query[t, h, p]
    return dquery, dkeys
