"""Triton kernels of the selection: the best half keys of every token, then the best pairs of them.

Whatever is ranked is one int64: in its upper half the score as an integer of the same order, in its
lower half the place, counted down. The numbers are all different, and to sort them is to sort by
score and then by lowest place.
"""

import triton
import triton.language as tl

from memlm.cuda.weighted_bag.triton_bag import push

LEAST = tl.constexpr(-(2**63))  # below the key of any score, a NaN's included
LAST = tl.constexpr(2**31 - 1)


@triton.jit
def sort_key(score, place):
    """The int64 of a float32 score at a place below 2^31; NaN is the best score, as in torch."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(score == 0, 0, bits)  # both zeros are equal
    bits = tl.where(score != score, LAST, bits)
    # The bits of negative numbers ascend as the numbers descend.
    ordered = bits ^ ((bits >> 31) & LAST)
    return (ordered.to(tl.int64) << 32) | (place ^ LAST).to(tl.int64)


@triton.jit
def score_of(key):
    """The score in a `sort_key`."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & LAST)).to(tl.float32, bitcast=True)


@triton.jit
def place_of(key):
    """The place in a `sort_key`."""
    return key.to(tl.int32) ^ LAST


@triton.jit
def _bit(DIMS: tl.constexpr, BIT: tl.constexpr):
    """One bit of a number's place in a hypercube of DIMS dimensions, the last of which is bit 0."""
    return tl.reshape(tl.arange(0, 2), [1] * (DIMS - BIT - 1) + [2] + [1] * BIT)


@triton.jit
def _exchange(cube, falling, DIMS: tl.constexpr, BIT: tl.constexpr):
    """Of each two numbers whose places differ in BIT, put the larger last, or first if falling.

    falling: 1 or 0, for all or by place.
    """
    other = tl.sum(cube, DIMS - 1 - BIT, keep_dims=True) - cube
    return tl.where((cube > other) != (_bit(DIMS, BIT) != falling), other, cube)


@triton.jit
def _merge(cube, falling, DIMS: tl.constexpr, STAGE: tl.constexpr):
    """Sort runs of 2^STAGE numbers, each of which first rises and then falls or the reverse."""
    for step in tl.static_range(STAGE):
        cube = _exchange(cube, falling, DIMS, STAGE - 1 - step)
    return cube


@triton.jit
def merge_rows(x, FALLING: tl.constexpr, LOG_ROWS: tl.constexpr, LOG_K: tl.constexpr):
    """Sort rows of int64 [2^LOG_ROWS, 2^LOG_K], each rising and then falling or the reverse."""
    cube = tl.reshape(x, [2] * (LOG_ROWS + LOG_K))
    cube = _merge(cube, FALLING, LOG_ROWS + LOG_K, LOG_K)
    return tl.reshape(cube, [2**LOG_ROWS, 2**LOG_K])


@triton.jit
def _half_runs(cube, DIMS: tl.constexpr, RUNS: tl.constexpr, LOG_K: tl.constexpr):
    """Half of 2^RUNS runs per row: of a rising and a falling run, the larger of each two numbers
    hold the best of both, and are sorted again."""
    cube = tl.max(cube, DIMS - 1 - LOG_K)
    if RUNS > 1:
        return _merge(cube, _bit(DIMS - 1, LOG_K), DIMS - 1, LOG_K)
    else:
        return _merge(cube, 1, DIMS - 1, LOG_K)


@triton.jit
def best_of_rows(x, LOG_ROWS: tl.constexpr, LOG_N: tl.constexpr, LOG_K: tl.constexpr):
    """The 2^LOG_K largest of each row of int64 [2^LOG_ROWS, 2^LOG_N], falling."""
    cube = tl.reshape(x, [2] * (LOG_ROWS + LOG_N))
    # Runs of 2^LOG_K, in turn rising and falling.
    for stage in tl.static_range(1, LOG_K + 1):
        if stage < LOG_N:
            cube = _merge(cube, _bit(LOG_ROWS + LOG_N, stage), LOG_ROWS + LOG_N, stage)
        else:
            cube = _merge(cube, 1, LOG_ROWS + LOG_N, stage)
    for i in tl.static_range(LOG_N - LOG_K):
        cube = _half_runs(cube, LOG_ROWS + LOG_N - i, LOG_N - LOG_K - i, LOG_K)
    return tl.reshape(cube, [2**LOG_ROWS, 2**LOG_K])


@triton.jit(do_not_specialize=["count"])
def split_kernel(x, parts, count, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Three bfloat16 parts [3, rows, WIDTH] of rows [rows, D] that add up to float32 numbers.

    count: rows times WIDTH; channels from D on are zero.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = (place % WIDTH).to(tl.int32)
    inside = (place < count) & (channel < D)
    rest = tl.load(x + place // WIDTH * D + channel, mask=inside, other=0).to(tl.float32)
    for part in tl.static_range(3):
        rounded = rest.to(tl.bfloat16)
        tl.store(parts + part * count.to(tl.int64) + place, rounded, mask=place < count)
        rest -= rounded.to(tl.float32)


@triton.jit
def _load_parts(x, stride, mask, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """A tile of each part."""
    tiles = ()
    for part in tl.static_range(PARTS):
        tile = tl.load(x + part * stride, mask=mask, other=0)
        if WIDE:
            tile = tile.to(tl.float32)
        tiles = push(tiles, tile)
    return tiles


@triton.jit(do_not_specialize=["tokens", "query_stride"])
def halves_kernel(
    query,
    keys,
    scores,
    places,
    tokens,
    query_stride,
    LISTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERY_PARTS: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    LOG_TOKENS: tl.constexpr,
    LOG_N: tl.constexpr,
    LOG_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """scores and places [tokens, LISTS, CHUNKS, 2^LOG_K]: the best half keys of chunks, sorted.

    There are LISTS lists, two per head, of N half keys in CHUNKS chunks. A program has 2^LOG_TOKENS
    tokens and one chunk, of which it scores 2^LOG_N half keys at a time. Where a chunk has fewer
    half keys than there is room for, the others have the place LAST.

    query: [QUERY_PARTS, tokens, LISTS, WIDTH], parts `query_stride` apart; keys: [KEY_PARTS, LISTS,
    N, WIDTH]. WIDE multiplies in float32.
    """
    BLOCK_N: tl.constexpr = 2**LOG_N
    K: tl.constexpr = 2**LOG_K
    # Programs that run at the same time have the same tokens.
    row = tl.program_id(0) % LISTS
    chunk = tl.program_id(0) // LISTS % CHUNKS
    block = tl.program_id(0) // (LISTS * CHUNKS)
    t = block * 2**LOG_TOKENS + tl.arange(0, 2**LOG_TOKENS)
    live = (t < tokens)[:, None]
    at = t.to(tl.int64)[:, None] * LISTS + row
    d = tl.arange(0, BLOCK_D)
    query += at * WIDTH + d[None, :]
    keys += row.to(tl.int64) * (N * WIDTH) + d[:, None]
    query_stride = query_stride.to(tl.int64)
    best = tl.full([2**LOG_TOKENS, K], LEAST, tl.int64)  # rising
    LENGTH: tl.constexpr = (N + CHUNKS * BLOCK_N - 1) // (CHUNKS * BLOCK_N) * BLOCK_N
    for first in range(0, LENGTH, BLOCK_N):
        place = chunk * LENGTH + first + tl.arange(0, BLOCK_N)
        known = (place < N)[None, :]
        score = tl.zeros([2**LOG_TOKENS, BLOCK_N], tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            tokens_parts = _load_parts(query + start, query_stride, live, QUERY_PARTS, WIDE)
            source = keys + place[None, :] * WIDTH + start
            keys_parts = _load_parts(source, LISTS * N * WIDTH, known, KEY_PARTS, WIDE)
            # Of three parts with 8 bits each, products beyond the 24th bit are left out.
            for a in tl.static_range(QUERY_PARTS):
                for b in tl.static_range(KEY_PARTS):
                    if a + b < 3:
                        score = tl.dot(
                            tokens_parts[a], keys_parts[b], score, input_precision="ieee"
                        )
        key = tl.where(known, sort_key(score, place[None, :]), LEAST)
        found = best_of_rows(key, LOG_TOKENS, LOG_N, LOG_K)
        # A falling and a rising run: the larger of each two are the best of both.
        best = tl.where(found > best, found, best)
        best = merge_rows(best, 0, LOG_TOKENS, LOG_K)
    best = merge_rows(best, 1, LOG_TOKENS, LOG_K)
    target = (at * CHUNKS + chunk) * K + tl.arange(0, K)[None, :]
    tl.store(scores + target, score_of(best), mask=live)
    tl.store(places + target, place_of(best), mask=live)


@triton.jit
def chunks_kernel(
    scores,
    places,
    best_scores,
    best_places,
    LOG_COUNT: tl.constexpr,
    LOG_K: tl.constexpr,
):
    """The best half keys of whole lists, [rows, 2^LOG_K], from all of their chunks,
    [rows, 2^LOG_COUNT]; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    source = row * 2**LOG_COUNT + tl.arange(0, 2**LOG_COUNT)
    place = tl.load(places + source)
    key = tl.where(place == LAST, LEAST, sort_key(tl.load(scores + source), place))
    best = tl.reshape(best_of_rows(key, 0, LOG_COUNT, LOG_K), [2**LOG_K])
    target = row * 2**LOG_K + tl.arange(0, 2**LOG_K)
    tl.store(best_scores + target, score_of(best))
    tl.store(best_places + target, place_of(best))


@triton.jit
def _ranks(pair, TOP: tl.constexpr):
    """Half ranks (i, j) of the pairs with (i + 1) (j + 1) <= TOP, numbered in lexicographic order.

    Every other pair has TOP pairs that are no worse and come earlier.
    """
    i = pair * 0
    begin = pair * 0
    start = 0
    for length in tl.static_range(1, TOP):
        start += TOP // length
        later = pair >= start
        i = tl.where(later, length, i)
        begin = tl.where(later, start, begin)
    return i, pair - begin


@triton.jit(do_not_specialize=["rows"])
def pairs_kernel(
    scores,
    places,
    indices,
    weights,
    rows,
    N: tl.constexpr,
    TOP: tl.constexpr,
    PAIRS: tl.constexpr,
    LOG_ROWS: tl.constexpr,
    LOG_PAIRS: tl.constexpr,
    LOG_K: tl.constexpr,
):
    """indices and weights [rows, TOP] from what `halves_kernel` left for the 2 lists of each row.

    A row is a token and a head.
    """
    K: tl.constexpr = 2**LOG_K
    row = tl.program_id(0) * 2**LOG_ROWS + tl.arange(0, 2**LOG_ROWS)
    live = (row < rows)[:, None]
    at = row.to(tl.int64)[:, None]
    first = at * 2 * K
    pair = tl.arange(0, 2**LOG_PAIRS)
    i, j = _ranks(pair, TOP)
    known = live & (pair < PAIRS)[None, :]
    score = tl.load(scores + first + i[None, :], mask=known, other=0)
    score += tl.load(scores + first + K + j[None, :], mask=known, other=0)
    key = tl.where(known, sort_key(score, pair[None, :]), LEAST)
    best = best_of_rows(key, LOG_ROWS, LOG_PAIRS, LOG_K)
    column = tl.arange(0, K)[None, :]
    chosen = live & (column < TOP)
    score = score_of(best)
    # The best score is the first; what is not a number makes all weights such.
    top = tl.sum(tl.where(column == 0, score, 0), 1)
    weight = tl.where(column < TOP, tl.exp(score - top[:, None]), 0)
    weight /= tl.sum(weight, 1)[:, None]
    i, j = _ranks(place_of(best), TOP)
    slot = tl.load(places + first + i, mask=chosen, other=0) * N
    slot += tl.load(places + first + K + j, mask=chosen, other=0)
    target = at * TOP + column
    tl.store(indices + target, slot, mask=chosen)
    tl.store(weights + target, weight, mask=chosen)
