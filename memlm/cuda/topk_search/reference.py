"""The definition: score every pair in float64, hide the invisible ones, sort."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.cuda.topk_search.inputs import Positions, result_type


def topk_search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str,
    valid: Tensor | None,
    positions: Positions | None,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.topk_search`; holds all scores [B, T, M], which are sorted as returned."""
    dtype = result_type(queries, keys)
    queries, keys = queries.double(), keys.double()
    if scales is not None:
        keys = keys * scales.double()[..., None]
    if metric == "cosine":
        queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    scores = torch.einsum("btd,bmd->btm", queries, keys)
    if metric == "l2":
        scores = 2 * scores - keys.square().sum(-1)[:, None]
    hidden = scores.isnan()
    if valid is not None:
        hidden |= ~valid[:, None]
    if positions is not None:
        key_positions, first, last = positions
        hidden |= key_positions[:, None] < first[..., None]
        hidden |= key_positions[:, None] >= last[..., None]
    scores = scores.masked_fill(hidden, -torch.inf).to(dtype)
    scores, indices = scores.sort(dim=-1, descending=True, stable=True)
    missing = max(k - keys.shape[1], 0)
    scores = F.pad(scores[..., :k], (0, missing), value=-torch.inf)
    indices = F.pad(indices[..., :k], (0, missing), value=-1)
    return scores, indices.masked_fill(scores == -torch.inf, -1)
