"""What the Triton kernels share: places of sequences and chunks, rows of matrices, gates, a solve.

Sequence n of a packed call owns the chunk slots from ``cu_seqlens[n] // C + n`` on.
"""

import triton
import triton.language as tl

DECAY_NONE, DECAY_CONSTANT, DECAY_SCALAR, DECAY_GATE = 0, 1, 2, 3
LOG_ZERO = tl.constexpr(-60.0)  # exp of less counts as zero
EPS = tl.constexpr(1e-6)  # of the l2 norm


@triton.jit
def sequence(n, T, cu_seqlens, C: tl.constexpr):
    """First token, number of tokens and first chunk slot of sequence n."""
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1).to(tl.int64) - start).to(tl.int32)
        slot = start // C + n
    else:
        start = n.to(tl.int64) * T
        length = T
        slot = n.to(tl.int64) * tl.cdiv(T, C)
    return start, length, slot


@triton.jit
def chunk_of_slot(slot, T, cu_seqlens, sequence_of_slot, C: tl.constexpr):
    """First token of the chunk in this slot, and its number of tokens (0 in an unused slot)."""
    if cu_seqlens is not None:
        n = tl.load(sequence_of_slot + slot)
        start, length, first = sequence(n, T, cu_seqlens, C)
        offset = (slot - first).to(tl.int32) * C
    else:
        chunks = tl.cdiv(T, C)
        start = (slot // chunks).to(tl.int64) * T
        length = T
        offset = (slot % chunks).to(tl.int32) * C
    return start + offset, tl.maximum(tl.minimum(length - offset, C), 0)


@triton.jit
def softplus(x):
    """log(1 + e^x)."""
    # log1p without libdevice: exact where 1 + y rounds to 1, corrected elsewhere.
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * y / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def log_decays(
    log_decay, A_log, dt_bias, first, i, inside, head, HV: tl.constexpr, DECAY: tl.constexpr
):
    """Log decays of some tokens, zero outside."""
    if DECAY == 0:
        g = tl.where(inside, 0.0, 0.0)
    elif DECAY == 1:
        g = tl.load(log_decay + head).to(tl.float32) + tl.where(inside, 0.0, 0.0)
    else:
        g = tl.load(log_decay + first * HV + head + i * HV, mask=inside, other=0.0).to(tl.float32)
    if DECAY == 3:
        rate = tl.exp(tl.load(A_log + head).to(tl.float32))
        g = -rate * softplus(g + tl.load(dt_bias + head).to(tl.float32))
    # Comparisons, for maximum and minimum drop a NaN, and a gate that diverged has to show.
    return tl.where(inside, tl.where(g < LOG_ZERO, LOG_ZERO, g), 0.0)


@triton.jit
def write_strengths(
    beta, first, i, inside, head, HV: tl.constexpr, SIGMOID: tl.constexpr, DOUBLE: tl.constexpr
):
    """beta of some tokens, zero outside."""
    b = tl.load(beta + first * HV + head + i * HV, mask=inside, other=0.0).to(tl.float32)
    if SIGMOID:
        b = tl.sigmoid(b)
    if DOUBLE:
        b = 2.0 * b
    return tl.where(inside, b, 0.0)


@triton.constexpr_function
def divides(block, size):
    """Whether blocks of this length fill a dimension of this size."""
    return size % int(block.shape[0]) == 0


@triton.jit
def _within(inside, columns, WIDTH: tl.constexpr):
    """Rows inside, columns below WIDTH; blocks that divide WIDTH have no other columns."""
    if divides(columns, WIDTH):
        return inside[:, None]
    else:
        return inside[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def load_rows(pointer, first, stride, i, columns, inside, WIDTH: tl.constexpr):
    """Rows first + i, `stride` apart, of a matrix [tokens, WIDTH]; zero outside.

    Only the first row's place needs 64 bits; wider offsets for every element would fill registers.
    """
    return tl.load(
        pointer + first * stride + (i[:, None] * stride + columns[None, :]),
        mask=_within(inside, columns, WIDTH),
        other=0.0,
    )


@triton.jit
def store_rows(pointer, first, stride, i, columns, inside, values, WIDTH: tl.constexpr):
    """The counterpart of `load_rows`."""
    tl.store(
        pointer + first * stride + (i[:, None] * stride + columns[None, :]),
        values.to(pointer.dtype.element_ty),
        mask=_within(inside, columns, WIDTH),
    )


@triton.jit
def load_state(pointer, place, key, value, K: tl.constexpr, V: tl.constexpr):
    """The tile [key, value] of the state [K, V] at `place`, zero outside."""
    entries = pointer + place * K * V + (key[:, None] * V + value[None, :])
    if divides(key, K) and divides(value, V):
        return tl.load(entries)
    else:
        return tl.load(entries, mask=(key < K)[:, None] & (value < V)[None, :], other=0.0)


@triton.jit
def store_state(pointer, place, key, value, tile, K: tl.constexpr, V: tl.constexpr):
    """The counterpart of `load_state`."""
    entries = pointer + place * K * V + (key[:, None] * V + value[None, :])
    tile = tile.to(pointer.dtype.element_ty)
    if divides(key, K) and divides(value, V):
        tl.store(entries, tile)
    else:
        tl.store(entries, tile, mask=(key < K)[:, None] & (value < V)[None, :])


@triton.jit
def row_scale(x, L2: tl.constexpr):
    """What makes rows unit long: products are scaled by it, which spares a second copy of x."""
    if L2:
        wide = x.to(tl.float32)
        return tl.rsqrt(tl.sum(wide * wide, 1) + EPS)
    else:
        return tl.full([x.shape[0]], 1.0, tl.float32)


@triton.jit
def decay_matrix(G, C: tl.constexpr):
    """e^{G_i - G_j} for i >= j, else 0."""
    i = tl.arange(0, C)
    difference = G[:, None] - G[None, :]
    none = (i[:, None] < i[None, :]) | (difference <= LOG_ZERO)
    return tl.where(none, 0.0, tl.exp(tl.where(none | (difference > 0.0), 0.0, difference)))


@triton.jit
def decay_of(G):
    """e^G, zero below LOG_ZERO."""
    none = G <= LOG_ZERO
    return tl.where(none, 0.0, tl.exp(tl.where(none, 0.0, G)))


@triton.jit
def unit_lower_inverse(L, C: tl.constexpr):
    """(I + L)^-1 of a strictly lower triangular [C, C].

    Substitution row by row within blocks of 16. With D the inverse of the block diagonal and
    M = D (L - its diagonal blocks), the whole inverse is (I + M)^-1 D, and M^(C / 16) = 0.
    """
    BLOCKS: tl.constexpr = C // 16
    block = tl.arange(0, BLOCKS)
    r = tl.arange(0, 16)
    same = block[:, None, None, None] == block[None, None, :, None]  # [BLOCKS, 1, BLOCKS, 1]
    blocks = tl.reshape(L, (BLOCKS, 16, BLOCKS, 16))
    diagonal = tl.sum(tl.where(same, blocks, 0.0), 2)  # [BLOCKS, 16, 16]
    X = tl.where(r[:, None] == r[None, :], 1.0, 0.0)[None, :, :] + tl.zeros_like(diagonal)
    for i in range(1, 16):
        this = (r == i)[None, :, None]
        row = tl.sum(tl.where(this, diagonal, 0.0), 1)  # [BLOCKS, 16]
        X = tl.where(this, X - tl.sum(row[:, :, None] * X, 1)[:, None, :], X)
    D = tl.reshape(tl.where(same, X[:, :, None, :], 0.0), (C, C))
    if BLOCKS > 1:
        rest = tl.reshape(tl.where(same, 0.0, blocks), (C, C))
        M = tl.dot(D, rest)
        # (I + M)^-1 D = D - M D + M^2 D - ..., by Horner's rule.
        inverse = D
        for _ in range(BLOCKS - 1):
            inverse = D - tl.dot(M, inverse)
        D = inverse
    return D
