"""The search in Triton: scores never reach memory, only the best key of every lane does.

A lane is every n-th key of a stretch of a store. The best keys of all lanes hold the k best, but
where a lane has two of them: the kernel also leaves a number that no other key of the lane exceeds,
and lanes where it is above the k-th result are looked through again (`triton_repair`).
"""

import torch
import triton
from torch import Tensor

from memlm.cuda.dispatch import capability, interpreting
from memlm.cuda.topk_search import eager
from memlm.cuda.topk_search.inputs import Positions
from memlm.cuda.topk_search.triton_kernels import lanes_kernel
from memlm.cuda.topk_search.triton_problem import PARTS, Queries, Store, Tiles
from memlm.cuda.topk_search.triton_repair import repair, scores_and_places

WORKSPACE = 1 << 27  # bytes that the lanes of the queries searched at a time may take
LANE_BYTES = 16


def topk_search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str,
    valid: Tensor | None,
    positions: Positions | None,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.topk_search`."""
    batch, tokens, _ = queries.shape
    scores = queries.new_full((batch, tokens, k), -torch.inf, dtype=torch.float32)
    indices = torch.full((batch, tokens, k), -1, device=queries.device)
    if scores.numel() == 0 or keys.shape[1] == 0:
        return scores, indices
    tiles = Tiles.choose(batch, tokens, *keys.shape[1:], k)
    store = Store.prepare(keys, metric, valid, positions, scales, tiles.block_n)
    most = max(1, WORKSPACE // (LANE_BYTES * tiles.lanes * tiles.block_m)) * tiles.block_m
    token_slice = min(tokens, most)
    row_slice = max(1, most // token_slice)
    for row in range(0, batch, row_slice):
        for token in range(0, tokens, token_slice):
            rows, block = slice(row, row + row_slice), slice(token, token + token_slice)
            bounds = None if positions is None else tuple(x[rows, block] for x in positions[1:])
            asked = Queries.prepare(queries[rows, block], keys.dtype, metric, bounds)
            stores = store.select(rows)
            found = repair(*launch(asked, stores, tiles), asked, stores, tiles, k)
            if found is None:
                given = [None if x is None else x[rows] for x in (valid, scales)]
                seen = None if positions is None else (positions[0][rows], *bounds)
                scores[rows, block], indices[rows, block] = eager.topk_search(
                    queries[rows, block], keys[rows], k, metric, given[0], seen, given[1]
                )
            else:
                scores[rows, block], indices[rows, block] = scores_and_places(found)
    return scores, indices


def launch(asked: Queries, store: Store, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """best and limit of every lane, int64 [B, T, lanes]: see `lanes_kernel`."""
    parts, batch, tokens, D = asked.parts.shape
    stored = store.keys.shape[1]
    best = torch.empty(batch, tokens, tiles.lanes, dtype=torch.int64, device=store.keys.device)
    limit = torch.empty_like(best)
    # Keys are multiplied in the queries' type, in as many parts as that takes.
    key_parts = 1 if asked.parts.dtype == torch.float16 else PARTS[store.keys.dtype]
    whole = parts == key_parts == 1
    card = capability(store.keys.device)
    channels = _channels(D, whole)
    # Two blocks per multiprocessor where nothing spills: one multiplies, the other compares.
    at_once = whole and channels == D and tiles.block_m == 128
    registers = 128 if at_once and card // 10 == 9 else 255
    # Cards that multiply out of registers have none left for a third stage.
    stages = 2 if channels < D and card // 10 not in (9, 10) else 3
    with torch.cuda.device_of(store.keys):
        lanes_kernel[(batch * tiles.splits * triton.cdiv(tokens, tiles.block_m),)](
            asked.parts,
            store.keys,
            store.factors,
            store.offsets,
            asked.factors,
            store.valid,
            store.key_positions,
            store.tile_bounds,
            asked.first,
            asked.last,
            _reach(asked, store, tiles),
            best,
            limit,
            tokens,
            stored,
            store.stride,
            tiles.splits,
            tiles.per_split,
            asked.parts.stride(0),
            D,
            store.twice,
            tiles.block_m,
            tiles.block_n,
            channels,
            parts,
            key_parts,
            WIDE=interpreting(),  # which cannot multiply bfloat16
            num_warps=tiles.warps,
            num_stages=stages,
            maxnreg=registers,
        )
    return best, limit


def _channels(D: int, whole: bool) -> int:
    """Channels multiplied at a time; whole: queries and keys have one part each."""
    most = (256 if D <= 256 else 64) if whole else 32
    for size in (256, 128, 64, 32, 16):
        if size <= most and D % size == 0:
            return size
    return min(most, 64, max(16, triton.next_power_of_2(D)))


def _reach(asked: Queries, store: Store, tiles: Tiles) -> Tensor | None:
    """The first and last tile + 1 of each split with keys that a query of a block may see.

    int32 [B, query blocks, splits, 2].
    """
    if store.tile_bounds is None:
        return None
    batch, tokens = asked.first.shape
    missing = -tokens % tiles.block_m
    padded = [
        torch.cat((x, x[:, -1:].expand(-1, missing)), 1).view(batch, -1, tiles.block_m)
        for x in (asked.first, asked.last)
    ]
    lowest, highest = store.tile_bounds[:, None].unbind(2)  # [B, 1, tiles]
    seen = (highest >= padded[0].amin(-1, True)) & (lowest < padded[1].amax(-1, True))
    filling = tiles.splits * tiles.per_split - seen.shape[-1]
    seen = torch.nn.functional.pad(seen, (0, filling)).unflatten(-1, (tiles.splits, -1))
    tile = torch.arange(tiles.splits * tiles.per_split, dtype=torch.int32, device=seen.device)
    tile = tile.view(tiles.splits, tiles.per_split)
    first = torch.where(seen, tile, 2**31 - 1).amin(-1)
    last = torch.where(seen, tile + 1, 0).amax(-1)
    return torch.stack((first, last), -1)
