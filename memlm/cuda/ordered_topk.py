"""Top-k with a fixed order among equal scores, which torch.topk does not promise."""

import torch
from torch import Tensor


def ordered_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last dimension, best first; equal scores by lowest index.

    Only among scores of -inf (entries that nobody may choose) the order is left open.

    Args:
        scores: [..., M] floating point, M >= k.
        k: how many to keep.

    Returns:
        values [..., k] and indices [..., k] (int64).
    """
    # One more than asked: a tie between the last kept and the first dropped score shows too.
    values, indices = scores.topk(min(k + 1, scores.shape[-1]))
    equal = (values[..., 1:] == values[..., :-1]) & (values[..., 1:] > -torch.inf)
    values, indices = values[..., :k], indices[..., :k]
    tied = equal.any(-1)
    if tied.any():
        values, indices = values.clone(), indices.clone()
        values[tied], indices[tied] = _resolve(scores[tied], values[tied][:, -1:], k)
    return values, indices


def _resolve(scores: Tensor, threshold: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`ordered_topk` of rows [R, M] whose k-th largest value is `threshold` [R, 1]."""
    above = ~(scores <= threshold)  # written so that a NaN counts as above, as in torch.topk
    level = scores == threshold
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (level & (level.cumsum(-1) <= room))
    indices = chosen.nonzero()[:, 1].view(-1, k)  # exactly k a row, ascending
    values, order = scores.gather(-1, indices).sort(dim=-1, descending=True, stable=True)
    return values, indices.gather(-1, order)
