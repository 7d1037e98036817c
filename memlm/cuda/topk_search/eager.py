"""Fast torch: scores exist for one block of queries and keys at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.cuda.ordered_topk import ordered_topk
from memlm.cuda.topk_search.inputs import Positions, result_type

QUERY_BLOCK = 256
KEY_BLOCK = 4096  # of all rows together, but at least an eighth of it in each


def topk_search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str,
    valid: Tensor | None,
    positions: Positions | None,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.topk_search`; beside the queries as float32 or float64 and the results,
    memory is O(KEY_BLOCK * (QUERY_BLOCK + D))."""
    dtype = result_type(queries, keys)
    batch, tokens, _ = queries.shape
    queries = queries.to(dtype)
    if metric == "cosine":
        queries = F.normalize(queries, dim=-1)
    best = queries.new_full((batch, tokens, k), -torch.inf)
    indices = torch.full((batch, tokens, k), -1, device=queries.device)

    size = max(KEY_BLOCK // min(max(batch, 1), 8), 1)
    for start in range(0, keys.shape[1], size):
        block = slice(start, start + size)
        block_keys = keys[:, block].to(dtype)
        if scales is not None:
            block_keys = block_keys * scales[:, block, None].to(dtype)
        block_keys, offset = _prepare(block_keys, metric)
        for first_query in range(0, tokens, QUERY_BLOCK):
            rows = slice(first_query, first_query + QUERY_BLOCK)
            reach, visible = _visible(valid, positions, block, rows)
            found = _search_block(queries[:, rows], block_keys, offset, reach, visible, k)
            # Keys of earlier blocks stand first: among equal scores the lowest index wins.
            merged = torch.cat((best[:, rows], found[0]), -1)
            merged_indices = torch.cat((indices[:, rows], found[1] + start), -1)
            best[:, rows], order = ordered_topk(merged, k)
            indices[:, rows] = merged_indices.gather(-1, order)
    return best, indices.masked_fill_(best == -torch.inf, -1)


def _prepare(keys: Tensor, metric: str) -> tuple[Tensor, Tensor | None]:
    """Keys [B, D, m] and an offset [B, 1, m] so that score = q @ keys + offset."""
    if metric == "cosine":
        return F.normalize(keys, dim=-1).transpose(1, 2), None
    if metric == "l2":
        return 2 * keys.transpose(1, 2), -keys.square().sum(-1)[:, None]
    return keys.transpose(1, 2), None


def _visible(
    valid: Tensor | None,
    positions: Positions | None,
    block: slice,
    rows: slice,
) -> tuple[slice, Tensor | None]:
    """Which keys of a block a block of queries sees.

    Returns:
        reach: the run of keys within the block outside of which no query of any row sees a key;
            in a causal search it is half of them on average.
        visible: bool, broadcastable to [B, t, reach]; None when every key is visible.
    """
    if valid is None and positions is None:
        return slice(None), None
    candidates = True if valid is None else valid[:, None, block]
    if positions is not None:
        key_positions = positions[0][:, None, block]
        first, last = positions[1][:, rows, None], positions[2][:, rows, None]
        candidates = candidates & (key_positions >= first.amin(1, keepdim=True))
        candidates &= key_positions < last.amax(1, keepdim=True)
    hits = candidates.flatten(0, 1).any(0).nonzero()
    if not len(hits):
        return slice(0), None
    reach = slice(int(hits[0]), int(hits[-1]) + 1)
    visible = candidates[..., reach]
    if positions is not None:
        key_positions = key_positions[..., reach]
        visible = visible & (key_positions >= first) & (key_positions < last)
    return reach, visible


def _search_block(
    queries: Tensor,
    keys: Tensor,
    offset: Tensor | None,
    reach: slice,
    visible: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The best min(k, reach) keys: their scores and their indices within the block."""
    scores = queries @ keys[..., reach]
    if offset is not None:
        scores += offset[..., reach]
    scores.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    if visible is not None:
        scores.masked_fill_(~visible, -torch.inf)
    scores, indices = ordered_topk(scores, min(k, scores.shape[-1]))
    return scores, indices + (reach.start or 0)
