"""Triton kernels of the search: the best key of every lane, and how good its second may be.

A lane is one column of the key tiles that a program goes through: every BLOCK_N-th key of a split.
Whatever is ranked is an int64 that orders by score and then by lowest index, see `sort_key`.
"""

import triton
import triton.language as tl

from memlm.cuda.product_key.triton_kernels import LEAST, sort_key
from memlm.cuda.weighted_bag.triton_bag import push


@triton.jit(do_not_specialize=["stored", "stride"])
def norms_kernel(
    keys, norms, stored, stride, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """norms [B, stored]: squared lengths of keys; stores lie `stride` keys apart."""
    blocks = tl.cdiv(stored, ROWS)
    store = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks * ROWS
    row = block + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    base = keys + (store * stride + block) * D
    offset = tl.arange(0, ROWS)[:, None] * D + channel[None, :]
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = (row < stored)[:, None] & (start + channel < D)[None, :]
        x = tl.load(base + start + offset, mask=inside, other=0).to(tl.float32)
        total += tl.sum(x * x, 1)
    tl.store(norms + store * stored + row, total, mask=row < stored)


@triton.jit
def _query_parts(base, stride, mask, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """A tile of each part of the queries."""
    tiles = ()
    for part in tl.static_range(PARTS):
        tile = tl.load(base + part * stride, mask=mask, other=0)
        if WIDE:
            tile = tile.to(tl.float32)
        tiles = push(tiles, tile)
    return tiles


@triton.jit
def _key_parts(base, mask, dtype: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """A tile of keys as parts of another type that add up to it."""
    tile = tl.load(base, mask=mask, other=0)
    if tile.dtype == tl.int8:
        tile = tile.to(tl.float32)  # the interpreter makes no bfloat16 of whole numbers
    tiles = ()
    if PARTS == 1:
        part = tile.to(dtype)
        if WIDE:
            part = part.to(tl.float32)
        tiles = push(tiles, part)
    else:
        rest = tile.to(tl.float32)
        for _ in tl.static_range(PARTS):
            part = rest.to(dtype)
            rounded = part.to(tl.float32)
            rest -= rounded
            if WIDE:
                part = rounded
            tiles = push(tiles, part)
    return tiles


@triton.jit
def _dot(queries, keys, score, QUERY_PARTS: tl.constexpr, KEY_PARTS: tl.constexpr):
    """score + queries . keys; of parts with 8 bits each, products beyond the 24th bit are left
    out."""
    for a in tl.static_range(QUERY_PARTS):
        for b in tl.static_range(KEY_PARTS):
            if a + b < 3:
                score = tl.dot(queries[a], keys[b], score, input_precision="ieee")
    return score


@triton.jit(do_not_specialize=["tokens", "stored", "stride", "splits", "per_split", "query_stride"])
def lanes_kernel(
    queries,
    keys,
    factors,
    offsets,
    row_factors,
    valid,
    key_positions,
    tile_bounds,
    first,
    last,
    reach,
    best,
    limit,
    tokens,
    stored,
    stride,
    splits,
    per_split,
    query_stride,
    D: tl.constexpr,
    TWICE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_PARTS: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """best and limit, int64 [B, tokens, splits, BLOCK_N]: for every lane its best key, and a number
    that no other key of the lane exceeds; LEAST where there is none.

    A program has BLOCK_M queries of a store and a split of its keys, `per_split` tiles of BLOCK_N.
    score = (2 if TWICE) * row_factors[query] * factors[key] * (query . key) + offsets[key]

    queries: [QUERY_PARTS, B, tokens, D], parts `query_stride` apart, in the type that is
    multiplied. keys: [B, stored, D], stores `stride` keys apart. factors, offsets: float32
    [B, stored], row_factors: float32 [B, tokens], valid: bool [B, stored], or None each.
    key_positions [B, stored], first, last [B, tokens], int64: see `topk_search`; with them come
    tile_bounds [B, 2, tiles], the lowest and highest position in each tile, and reach, int32
    [B, query blocks, splits, 2], the first and last tile + 1 with keys that a query may see.
    WIDE multiplies in float32.
    """
    # Programs that run at the same time have the same keys.
    blocks = tl.cdiv(tokens, BLOCK_M)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % splits
    store = tl.program_id(0) // (blocks * splits)
    wide_store = store.to(tl.int64)
    t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = t < tokens
    row = wide_store * tokens + t
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    tiles = tl.cdiv(stored, BLOCK_N)
    begin = split * per_split
    end = tl.minimum(begin + per_split, tiles)

    query_base = queries + (wide_store * tokens + block * BLOCK_M) * D
    query_offset = tl.arange(0, BLOCK_M)[:, None] * D + d[None, :]
    query_stride = query_stride.to(tl.int64)
    key_base = keys + wide_store * stride * D
    key_offset = n[None, :] * D + d[:, None]
    of_key = wide_store * stored
    tile_size = tl.full([], BLOCK_N * D, tl.int64)
    dtype: tl.constexpr = queries.dtype.element_ty
    WHOLE: tl.constexpr = D <= BLOCK_D  # all channels at once: the queries stay where they are
    EVEN: tl.constexpr = D % BLOCK_D == 0
    if WHOLE:
        query_mask = live[:, None]
        if not EVEN:
            query_mask = query_mask & (d < D)[None, :]
        query_tiles = _query_parts(
            query_base + query_offset, query_stride, query_mask, QUERY_PARTS, WIDE
        )
    if row_factors is not None:
        row_factor = tl.load(row_factors + row, mask=live, other=0)
    if key_positions is not None:
        low = tl.load(first + row, mask=live, other=0)
        high = tl.load(last + row, mask=live, other=0)
        # From here to there, all queries see a key; those that are none ask for nothing.
        all_low = tl.max(tl.where(live, low, -(2**63)), 0)
        all_high = tl.min(tl.where(live, high, 2**63 - 1), 0)
        bounds = tile_bounds + wide_store * 2 * tiles
        reach += ((wide_store * blocks + block) * splits + split) * 2
        begin_at = tl.load(reach)
        end = tl.load(reach + 1)
    else:
        begin_at = begin

    top = tl.full([BLOCK_M, BLOCK_N], -float("inf"), tl.float32)
    second = tl.full([BLOCK_M, BLOCK_N], -float("inf"), tl.float32)
    top_tile = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for tile in range(begin_at, end):
        key = tile * BLOCK_N + n
        known = key < stored
        tile_base = key_base + tile_size * tile
        score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if WHOLE:
            key_mask = known[None, :]
            if not EVEN:
                key_mask = key_mask & (d < D)[:, None]
            key_tiles = _key_parts(tile_base + key_offset, key_mask, dtype, KEY_PARTS, WIDE)
            score = _dot(query_tiles, key_tiles, score, QUERY_PARTS, KEY_PARTS)
        else:
            for start in range(0, D, BLOCK_D):
                query_mask = live[:, None]
                key_mask = known[None, :]
                if not EVEN:
                    query_mask = query_mask & (start + d < D)[None, :]
                    key_mask = key_mask & (start + d < D)[:, None]
                query_tiles = _query_parts(
                    query_base + start + query_offset, query_stride, query_mask, QUERY_PARTS, WIDE
                )
                key_tiles = _key_parts(
                    tile_base + start + key_offset, key_mask, dtype, KEY_PARTS, WIDE
                )
                score = _dot(query_tiles, key_tiles, score, QUERY_PARTS, KEY_PARTS)
        if TWICE:
            score = 2 * score
        if row_factors is not None:
            score = score * row_factor[:, None]
        if factors is not None:
            factor = tl.load(factors + of_key + key, mask=known, other=0)
            score = score * factor[None, :]
        # Added, not chosen: one operation per score, and not on the unit that compares.
        if offsets is not None:
            offset = tl.load(offsets + of_key + key, mask=known, other=-float("inf"))
        else:
            offset = tl.where(known, 0.0, -float("inf"))
        if valid is not None:
            shown = tl.load(valid + of_key + key, mask=known, other=0)
            offset = tl.where(shown != 0, offset, -float("inf"))
        score = score + offset[None, :]
        if key_positions is not None:
            lowest = tl.load(bounds + tile)
            highest = tl.load(bounds + tiles + tile)
            if (lowest < all_low) | (highest >= all_high):
                place = tl.load(key_positions + of_key + key, mask=known, other=0)
                seen = (place[None, :] >= low[:, None]) & (place[None, :] < high[:, None])
                score = tl.where(seen, score, -float("inf"))
        # A NaN is never better than anything.
        better = score > top
        second = tl.where(better, top, tl.where(score > second, score, second))
        top = tl.where(better, score, top)
        top_tile = tl.where(better, tile, top_tile)

    at = ((wide_store * tokens + block * BLOCK_M) * splits + split) * BLOCK_N
    target = tl.arange(0, BLOCK_M)[:, None] * (splits * BLOCK_N) + n[None, :]
    index = top_tile * BLOCK_N + n[None, :]
    found = tl.where(top == -float("inf"), LEAST, sort_key(top, index))
    tl.store(best + at + target, found, mask=live[:, None])
    # A second that equals the first comes later, others may be any of the lane.
    bound = tl.where(second == top, index + BLOCK_N, begin * BLOCK_N + n[None, :])
    others = tl.where(second == -float("inf"), LEAST, sort_key(second, bound))
    tl.store(limit + at + target, others, mask=live[:, None])
