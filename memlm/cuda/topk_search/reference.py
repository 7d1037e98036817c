"""The definition: score every pair, hide the invisible ones, sort."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def topk_search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str,
    valid: Tensor | None,
    positions: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.topk_search`; holds all scores [B, T, M]."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries, keys = queries.to(dtype), keys.to(dtype)
    if metric == "cosine":
        queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    scores = torch.einsum("btd,bmd->btm", queries, keys)
    if metric == "l2":
        scores = 2 * scores - keys.square().sum(-1)[:, None]
    visible = torch.ones_like(scores, dtype=torch.bool)
    if valid is not None:
        visible &= valid[:, None]
    if positions is not None:
        key_positions, first, last = positions
        visible &= key_positions[:, None] >= first[..., None]
        visible &= key_positions[:, None] < last[..., None]
    scores = scores.masked_fill(~visible, -torch.inf)
    scores, indices = scores.sort(dim=-1, descending=True, stable=True)
    missing = max(k - keys.shape[1], 0)
    scores = F.pad(scores[..., :k], (0, missing), value=-torch.inf)
    indices = F.pad(indices[..., :k], (0, missing), value=-1)
    return scores, indices.masked_fill(scores == -torch.inf, -1)
