"""Triton kernels of the loss: logits exist tile by tile, in registers.

A tile has BLOCK_M tokens and BLOCK_V entries of the vocabulary. Rows past the end of a matrix are
read as its last row, which costs no mask; what comes of them is left out where it is used.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """tanh of float32, without libdevice; exact to a few 2^-24 of 1."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def _tile_of(pid, token_tiles, vocabulary_tiles, GROUP: tl.constexpr):
    """Token tile and vocabulary tile of a program.

    GROUP token tiles come together: what programs at work at the same time read fits the L2 cache.
    """
    group = pid // (GROUP * vocabulary_tiles)
    place = pid % (GROUP * vocabulary_tiles)
    size = tl.minimum(token_tiles - group * GROUP, GROUP)
    return group * GROUP + place % size, place // size


@triton.jit
def _logits(
    hidden,
    weight,
    m,
    v,
    tokens,
    softcap,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The tile (m, v) of the logits, float32 [BLOCK_M, BLOCK_V]; -inf beyond the vocabulary.

    Only the first rows' places need 64 bits.
    """
    d = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_V)
    row = tl.minimum(tl.arange(0, BLOCK_M), tokens - 1 - m * BLOCK_M)
    entry = column
    if V % BLOCK_V != 0:
        entry = tl.minimum(column, V - 1 - v * BLOCK_V)
    hidden += m.to(tl.int64) * (BLOCK_M * D)
    weight += tl.full([], BLOCK_V * D, tl.int64) * v
    hidden_offset = row[:, None] * D + d[None, :]
    weight_offset = entry[:, None] * D + d[None, :]
    x = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            a = tl.load(hidden + start + hidden_offset)
            b = tl.load(weight + start + weight_offset)
        else:
            inside = (start + d < D)[None, :]
            a = tl.load(hidden + start + hidden_offset, mask=inside, other=0.0)
            b = tl.load(weight + start + weight_offset, mask=inside, other=0.0)
        x = tl.dot(a, tl.trans(b), x, input_precision=PRECISION)
    if softcap is not None:
        x = softcap * _tanh(x * (1.0 / softcap))
    if V % BLOCK_V != 0:
        x = tl.where((v * BLOCK_V + column < V)[None, :], x, -float("inf"))
    return x


@triton.jit(do_not_specialize=["tokens", "per_split", "ignore_index"])
def forward_kernel(
    hidden,
    weight,
    targets,
    log_sums,
    chosen,
    tokens,
    per_split,
    softcap,
    ignore_index,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log_sums [splits, tokens], log-sum-exp over `per_split` tiles; chosen [tokens], the targets'
    logits; both float32.

    A program has one token tile and one split. A target outside the vocabulary leaves `chosen` as
    it was, and token tiles without a target leave everything.
    """
    token_tiles = tl.cdiv(tokens, BLOCK_M)
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    m, split = _tile_of(tl.program_id(0), token_tiles, tl.cdiv(TILES, per_split), GROUP)
    first = m.to(tl.int64) * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    live = i < tokens - m * BLOCK_M
    target = tl.load(targets + first + i, mask=live, other=0)
    live = live & (target != ignore_index)
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    # A target is compared with the columns of a tile; 32 bits hold every vocabulary.
    target = tl.where(live, target, -1).to(tl.int32)
    column = tl.arange(0, BLOCK_V)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    found = tl.zeros([BLOCK_M], tl.float32)
    begin = split * per_split
    end = tl.minimum(begin + per_split, TILES)
    for v in range(begin, end):
        x = _logits(
            hidden, weight, m, v, tokens, softcap, D, V, BLOCK_M, BLOCK_V, BLOCK_D, PRECISION
        )
        is_target = (target - v * BLOCK_V)[:, None] == column[None, :]
        found += tl.sum(tl.where(is_target, x, 0.0), 1)
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
        top = higher
    tl.store(log_sums + split.to(tl.int64) * tokens + first + i, top + tl.log(total), mask=live)
    here = (target >= begin * BLOCK_V) & (target < tl.minimum(end * BLOCK_V, V))
    tl.store(chosen + first + i, found, mask=live & here)


@triton.jit(do_not_specialize=["tokens", "first_m", "first_v", "token_tiles", "vocabulary_tiles"])
def gradient_kernel(
    hidden,
    weight,
    targets,
    log_sum,
    factors,
    live_tiles,
    gradients,
    tokens,
    first_m,
    first_v,
    token_tiles,
    vocabulary_tiles,
    softcap,
    z_loss,
    least,
    D: tl.constexpr,
    V: tl.constexpr,
    KNOWN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """gradients [token_tiles * BLOCK_M, vocabulary_tiles * BLOCK_V], of the logits in the tiles
    from (first_m, first_v) on, times the tokens' factors if WEIGHTED.

    live_tiles, uint8 [all token tiles, all vocabulary tiles]: 0 where a tile has no target and no
    gradient of `least` or more; its place in `gradients` is then left as it was. It is read if
    KNOWN, else written. factors, float32 [tokens]: 0 for tokens that do not count.
    """
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    local_m, local_v = _tile_of(tl.program_id(0), token_tiles, vocabulary_tiles, GROUP)
    m, v = first_m + local_m, first_v + local_v
    flag = live_tiles + m.to(tl.int64) * TILES + v
    if KNOWN:
        alive = tl.load(flag).to(tl.int32)
        if alive == 0:
            return
    first = m.to(tl.int64) * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    inside = i < tokens - m * BLOCK_M
    factor = tl.load(factors + first + i, mask=inside, other=0.0)
    counts = factor != 0
    if not KNOWN:
        alive = tl.max(counts.to(tl.int32), 0)
        if alive == 0:
            tl.store(flag, 0)
            return
    x = _logits(hidden, weight, m, v, tokens, softcap, D, V, BLOCK_M, BLOCK_V, BLOCK_D, PRECISION)
    lse = tl.load(log_sum + first + i, mask=inside, other=0.0)
    target = tl.load(targets + first + i, mask=counts, other=-1).to(tl.int32) - v * BLOCK_V
    dx = tl.exp(x - lse[:, None]) * (1.0 + 2.0 * z_loss * lse)[:, None]
    if softcap is not None:
        capped = x * (1.0 / softcap)
        if V % BLOCK_V != 0:
            capped = tl.where(x == -float("inf"), 0.0, capped)
        slope = 1.0 - capped * capped
        dx *= slope
    dx = tl.where(counts[:, None], dx, 0.0)
    if not KNOWN:
        # What is not a number is not below.
        alive = tl.max(tl.where(tl.abs(dx) < least, 0, 1))
        alive |= tl.max(((target >= 0) & (target < BLOCK_V)).to(tl.int32))
        tl.store(flag, alive)
        if alive == 0:
            return
    is_target = target[:, None] == tl.arange(0, BLOCK_V)[None, :]
    if softcap is not None:
        dx -= tl.where(is_target, slope, 0.0)
    else:
        dx -= tl.where(is_target, 1.0, 0.0)
    if WEIGHTED:
        dx *= factor[:, None]
    width = vocabulary_tiles * BLOCK_V
    place = gradients + local_m.to(tl.int64) * BLOCK_M * width + local_v * BLOCK_V
    offset = i[:, None] * width + tl.arange(0, BLOCK_V)[None, :]
    tl.store(place + offset, dx.to(gradients.dtype.element_ty))


# The lists are those of a chunk, which begin anywhere.
@triton.jit(
    do_not_specialize=["rows", "matrix_rows", "width", "tiles", "parts"],
    do_not_specialize_on_alignment=["tile_lists", "tile_counts"],
)
def product_kernel(
    gradients,
    matrix,
    tile_lists,
    tile_counts,
    factors,
    output,
    rows,
    matrix_rows,
    width,
    tiles,
    parts,
    D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """output [parts, rows, D], whose sum is gradients @ matrix, or gradients^T @ matrix if
    TRANSPOSED.

    A program has BLOCK_R rows, BLOCK_N columns and one of the parts, equally many steps of the sum.

    Only the tiles of TILE_K in tile_lists [row tiles, tiles], the first tile_counts [row tiles] of
    them, are added up. gradients: rows of `width` tiles, see `gradient_kernel`. matrix:
    [matrix_rows, D]. factors, float32: of each row [rows], or of all [1] if TRANSPOSED.
    """
    # Programs that run at the same time share rows of gradients, and go through the same tiles.
    columns: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile_row = tl.program_id(0) // (columns * parts)
    part = tl.program_id(0) // columns % parts
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    if TRANSPOSED:
        stride = width * BLOCK_R
        offset = k[:, None] * stride + r[None, :]
        gradients += tile_row.to(tl.int64) * BLOCK_R
    else:
        stride = width * TILE_K
        offset = r[:, None] * stride + k[None, :]
        gradients += tile_row.to(tl.int64) * BLOCK_R * stride
    tile_lists += tile_row.to(tl.int64) * tiles
    STEPS: tl.constexpr = TILE_K // BLOCK_K
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    steps = tl.load(tile_counts + tile_row) * STEPS
    length = tl.cdiv(steps, parts)
    begin = tl.minimum(part * length, steps)
    # Read a step ahead, so that no load waits for another one.
    tile = tl.load(tile_lists + tl.minimum(begin // STEPS, tiles - 1))
    for step in range(begin, tl.minimum(begin + length, steps)):
        at = tile * TILE_K + step % STEPS * BLOCK_K
        tile = tl.load(tile_lists + tl.minimum((step + 1) // STEPS, tiles - 1))
        if TRANSPOSED:
            a = tl.trans(tl.load(gradients + at.to(tl.int64) * stride + offset))
        else:
            a = tl.load(gradients + at + offset)
        row = tl.minimum(k, matrix_rows - 1 - at)
        source = matrix + at.to(tl.int64) * D + (row[:, None] * D + n[None, :])
        if D % BLOCK_N == 0:
            b = tl.load(source)
        else:
            b = tl.load(source, mask=(n < D)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    first = tile_row * BLOCK_R
    inside = r < rows - first
    if TRANSPOSED:
        total *= tl.load(factors)
    else:
        total *= tl.load(factors + first + r, mask=inside, other=0.0)[:, None]
    mask = inside[:, None]
    if D % BLOCK_N != 0:
        mask = mask & (n < D)[None, :]
    first_place = (part.to(tl.int64) * rows + first) * D
    place = output + first_place + (r[:, None] * D + n[None, :])
    tl.store(place, total.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["numbers", "parts"])
def sum_kernel(sums, output, numbers, parts, BLOCK: tl.constexpr):
    """output [numbers] = the sum of sums [parts, numbers], float32, added up in their order.

    Parts are made for few programs only, so that 32 bits hold every place.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(0, parts):
        total += tl.load(sums + part * numbers + at, mask=inside, other=0.0)
    tl.store(output + at, total.to(output.dtype.element_ty), mask=inside)
