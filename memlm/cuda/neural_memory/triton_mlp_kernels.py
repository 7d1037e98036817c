"""Triton kernels of the neural memory of two layers, x + LN(gelu(x W1) W2): writes and reads.

Tiles of C slots as in gates.py, rows are tokens, [D, h] and [h, D] the weights; the gradients of a
tile are taken at its anchor A (the weights at its start, or older ones)::

    Z1 = K A1     X2 = gelu(Z1)     Z2 = X2 A2     N = LN(Z2) = (Z2 - mean) r
    U = 2 (K + N - V)     E2 = r (U - mean(U) - N mean(U N))     E1 = (E2 A2^T) gelu'(Z1)
    P1 = (Q K^T) o G      Z1q = beta Q W1 + f Q S1 - P1 E1       Xq = gelu(Z1q)
    P2 = (Xq X2^T) o G    Z2q = beta Xq W2 + f Xq S2 - P2 E2     O = Q + LN(Z2q)
    W1' = beta_end W1 + f_end S1 - K^T (g_end E1)     S1' = mu_end S1 - K^T (n E1)
    W2' = beta_end W2 + f_end S2 - X2^T (g_end E2)    S2' = mu_end S2 - X2^T (n E2)

Only the writes walk over the tiles; they leave every tile's W, S, X2, E1 and E2 for the reads,
which run side by side. The hidden channels are walked in slices of BH; only Z2, Z2q and Xq X2^T are
sums over slices. Weights are padded with zeros to D (a power of two) and to whole slices, which
stay zero; the layer norm divides by the true number of channels.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-5)  # of the layer norm


@triton.jit
def load_tile(pointer, place, row, column, WIDTH: tl.constexpr):
    """Entries [row, column] of a matrix with rows of WIDTH whose first entry is at `place`.

    Only the place needs 64 bits; wide offsets for every entry would fill registers.
    """
    return tl.load(pointer + place + (row[:, None] * WIDTH + column[None, :]))


@triton.jit
def store_tile(pointer, place, row, column, values, WIDTH: tl.constexpr):
    """The counterpart of `load_tile`."""
    entries = pointer + place + (row[:, None] * WIDTH + column[None, :])
    tl.store(entries, values.to(pointer.dtype.element_ty))


@triton.jit
def normal_density(z):
    """Density of the standard normal distribution."""
    return tl.exp(-0.5 * z * z) * 0.3989422804014327


@triton.jit
def normal_cdf(z):
    """Its distribution function, by Abramowitz and Stegun 7.1.26: off by less than 1.5e-7.

    The library's erf has a branch per number, which cuts a kernel into hundreds of blocks.
    """
    t = 1.0 / (1.0 + 0.23164190 * tl.abs(z))  # 0.3275911 / sqrt(2)
    series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    series = t * (0.254829592 + t * (-0.284496736 + t * series))
    tail = 0.5 * series * tl.exp(-0.5 * z * z)
    return tl.where(z < 0.0, tail, 1.0 - tail)


@triton.jit
def gelu(z):
    """z times the distribution function at z."""
    return z * normal_cdf(z)


@triton.jit
def gelu_slope(z):
    """Derivative of gelu."""
    return normal_cdf(z) + z * normal_density(z)


@triton.jit
def channel_mean(x, CHANNELS: tl.constexpr):
    """Mean over the true channels as a column; the others hold zeros."""
    return tl.sum(x, 1)[:, None] * (1.0 / CHANNELS)


@triton.jit
def real_channels(x, CHANNELS: tl.constexpr):
    """The same with zeros in the channels that are padding."""
    if x.shape[1] == CHANNELS:
        return x
    else:
        return tl.where(tl.arange(0, x.shape[1])[None, :] < CHANNELS, x, 0.0)


@triton.jit
def layer_norm(Z, CHANNELS: tl.constexpr):
    """Normalised rows N and the factor r (a column)."""
    centred = real_channels(Z - channel_mean(Z, CHANNELS), CHANNELS)
    r = tl.rsqrt(channel_mean(centred * centred, CHANNELS) + EPS)
    return centred * r, r


@triton.jit
def without_statistics(x, N, CHANNELS: tl.constexpr):
    """x - mean(x) - N mean(x N): r times this is the gradient through a layer norm."""
    along = channel_mean(x * N, CHANNELS)
    return real_channels(x - channel_mean(x, CHANNELS) - N * along, CHANNELS)


@triton.jit
def loss_gradient(keys, values, N):
    """U, the gradient of |K + N - V|^2 by N."""
    return 2.0 * (keys.to(tl.float32) + N - values.to(tl.float32))


@triton.jit
def anchor_moves(j, refresh_every):
    """Whether step j takes its anchor from the weights."""
    return (j > 0) & (j % refresh_every == 0)


@triton.jit(do_not_specialize=["first", "stop", "first_tile", "refresh_every"])
def mlp_write_kernel(
    k,
    v,
    g_end,
    n,
    beta_end,
    f_end,
    mu_end,
    starts,
    lengths,
    A1,
    A2,
    W1,
    W2,
    S1,
    S2,
    tile_W1,
    tile_W2,
    tile_S1,
    tile_S2,
    x2,
    e1,
    e2,
    normal,
    scale,
    first,
    stop,
    first_tile,
    refresh_every,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Walk steps `first` to `stop` of one row; A, W and S are read and overwritten.

    starts [steps + 1]: the first tile of every step; lengths [rows]: the number of a row's tiles.
    Of every tile, counted from `first_tile`: its state before it is written (tile_W, tile_S), X2,
    E1 and E2, and, unless they are None, N and r (`normal`, `scale`). RESIDENT: BH is HIDDEN, and
    W and S stay in registers; otherwise they are read and written slice by slice.
    """
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    state = row * (D * HIDDEN)
    i = tl.arange(0, C)
    d = tl.arange(0, D)
    low = k.dtype.element_ty
    if RESIDENT:
        c = tl.arange(0, BH)
        w1 = load_tile(W1, state, d, c, HIDDEN)
        s1 = load_tile(S1, state, d, c, HIDDEN)
        w2 = load_tile(W2, state, c, d, D)
        s2 = load_tile(S2, state, c, d, D)
    for j in range(first, tl.minimum(stop, length)):
        t = tl.load(starts + j) + row
        u = t - first_tile
        fresh = anchor_moves(j, refresh_every)
        anchor1 = tl.where(fresh, W1, A1)
        anchor2 = tl.where(fresh, W2, A2)
        if RESIDENT:
            if fresh:
                a1, a2 = w1.to(low), w2.to(low)
            else:
                a1 = load_tile(A1, state, d, c, HIDDEN).to(low)
                a2 = load_tile(A2, state, c, d, D).to(low)
        Z2 = tl.zeros([C, D], tl.float32)
        for h0 in range(0, HIDDEN, BH):
            if not RESIDENT:
                c = h0 + tl.arange(0, BH)
                a1 = load_tile(anchor1, state, d, c, HIDDEN).to(low)
                a2 = load_tile(anchor2, state, c, d, D).to(low)
            keys = load_tile(k, t * (C * D), i, d, D)
            Z2 = tl.dot(gelu(tl.dot(keys, a1)).to(low), a2, Z2)
        N, r = layer_norm(Z2, CHANNELS)
        keys = load_tile(k, t * (C * D), i, d, D)
        values = load_tile(v, t * (C * D), i, d, D)
        E2 = r * without_statistics(loss_gradient(keys, values, N), N, CHANNELS)
        store_tile(e2, u * (C * D), i, d, E2, D)
        if normal is not None:
            store_tile(normal, u * (C * D), i, d, N, D)
            tl.store(scale + u * C + i[:, None], r)
        tl.debug_barrier()  # what is stored is read again by other threads
        ge = tl.load(g_end + t * C + i)[:, None]
        ne = tl.load(n + t * C + i)[:, None]
        be, fe, me = tl.load(beta_end + t), tl.load(f_end + t), tl.load(mu_end + t)
        keep = fresh & ((refresh_every != 1) | (j == length - 1))
        for h0 in range(0, HIDDEN, BH):
            if not RESIDENT:
                c = h0 + tl.arange(0, BH)
                a1 = load_tile(anchor1, state, d, c, HIDDEN).to(low)
                a2 = load_tile(anchor2, state, c, d, D).to(low)
            keys = load_tile(k, t * (C * D), i, d, D)
            errors = load_tile(e2, u * (C * D), i, d, D)
            Z1 = tl.dot(keys, a1)
            X2 = gelu(Z1)
            E1 = tl.dot(errors, tl.trans(a2)) * gelu_slope(Z1)
            store_tile(x2, u * (C * HIDDEN), i, c, X2, HIDDEN)
            store_tile(e1, u * (C * HIDDEN), i, c, E1, HIDDEN)
            if not RESIDENT:
                w1 = load_tile(W1, state, d, c, HIDDEN)
                s1 = load_tile(S1, state, d, c, HIDDEN)
            store_tile(tile_W1, u * (D * HIDDEN), d, c, w1, HIDDEN)
            store_tile(tile_S1, u * (D * HIDDEN), d, c, s1, HIDDEN)
            if keep:
                store_tile(A1, state, d, c, w1, HIDDEN)
            w1 = w1 * be + s1 * fe
            w1 -= tl.dot(tl.trans(keys), (E1 * ge).to(low))
            s1 = s1 * me - tl.dot(tl.trans(keys), (E1 * ne).to(low))
            if not RESIDENT:
                store_tile(W1, state, d, c, w1, HIDDEN)
                store_tile(S1, state, d, c, s1, HIDDEN)
                w2 = load_tile(W2, state, c, d, D)
                s2 = load_tile(S2, state, c, d, D)
            store_tile(tile_W2, u * (D * HIDDEN), c, d, w2, D)
            store_tile(tile_S2, u * (D * HIDDEN), c, d, s2, D)
            if keep:
                store_tile(A2, state, c, d, w2, D)
            w2 = w2 * be + s2 * fe
            w2 -= tl.trans(tl.dot(tl.trans(errors), (X2 * ge).to(low)))
            s2 = s2 * me - tl.trans(tl.dot(tl.trans(errors), (X2 * ne).to(low)))
            if not RESIDENT:
                store_tile(W2, state, c, d, w2, D)
                store_tile(S2, state, c, d, s2, D)
        tl.debug_barrier()
    if RESIDENT:
        store_tile(W1, state, d, c, w1, HIDDEN)
        store_tile(S1, state, d, c, s1, HIDDEN)
        store_tile(W2, state, c, d, w2, D)
        store_tile(S2, state, c, d, s2, D)


@triton.jit
def tile_of_program(starts, first):
    """Tile of the program (row, step - first), and whether the row has one at this step."""
    row = tl.program_id(0).to(tl.int64)
    j = first + tl.program_id(1)
    start = tl.load(starts + j)
    return start + row, row < tl.load(starts + j + 1) - start


@triton.jit
def read_slices(
    q,
    tile_W1,
    tile_W2,
    tile_S1,
    tile_S2,
    x2,
    e1,
    xq,
    slope,
    P1,
    b,
    fs,
    t,
    u,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
):
    """beta Xq W2 + f Xq S2 and Xq X2^T of a tile.

    `xq` and `slope` take Xq and gelu'(Z1q), unless they are None.
    """
    i = tl.arange(0, C)
    d = tl.arange(0, D)
    low = q.dtype.element_ty
    Z2q = tl.zeros([C, D], tl.float32)
    XX = tl.zeros([C, C], tl.float32)
    for h0 in range(0, HIDDEN, BH):
        c = h0 + tl.arange(0, BH)
        queries = load_tile(q, t * (C * D), i, d, D)
        Zq = b * tl.dot(queries, load_tile(tile_W1, u * (D * HIDDEN), d, c, HIDDEN))
        Zq += fs * tl.dot(queries, load_tile(tile_S1, u * (D * HIDDEN), d, c, HIDDEN))
        Zq -= tl.dot(P1, load_tile(e1, u * (C * HIDDEN), i, c, HIDDEN))
        Xq = gelu(Zq)
        if xq is not None:
            store_tile(xq, u * (C * HIDDEN), i, c, Xq, HIDDEN)
            store_tile(slope, u * (C * HIDDEN), i, c, gelu_slope(Zq), HIDDEN)
        Z2q = tl.dot((Xq * b).to(low), load_tile(tile_W2, u * (D * HIDDEN), c, d, D), Z2q)
        Z2q = tl.dot((Xq * fs).to(low), load_tile(tile_S2, u * (D * HIDDEN), c, d, D), Z2q)
        X2 = load_tile(x2, u * (C * HIDDEN), i, c, HIDDEN)
        XX = tl.dot(Xq.to(low), tl.trans(X2), XX)
    return Z2q, XX


@triton.jit(do_not_specialize=["first", "first_tile"])
def mlp_read_kernel(
    q,
    k,
    G,
    beta,
    f,
    starts,
    tile_W1,
    tile_W2,
    tile_S1,
    tile_S2,
    x2,
    e1,
    e2,
    o,
    first,
    first_tile,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
):
    """Outputs of one tile, from what `mlp_write_kernel` wrote."""
    t, here = tile_of_program(starts, first)
    if not here:
        return
    u = t - first_tile
    i = tl.arange(0, C)
    d = tl.arange(0, D)
    low = q.dtype.element_ty
    b = tl.load(beta + t * C + i)[:, None]
    fs = tl.load(f + t * C + i)[:, None]
    queries = load_tile(q, t * (C * D), i, d, D)
    keys = load_tile(k, t * (C * D), i, d, D)
    P1 = tl.dot(queries, tl.trans(keys)) * load_tile(G, t * (C * C), i, i, C)
    Z2q, XX = read_slices(
        q,
        tile_W1,
        tile_W2,
        tile_S1,
        tile_S2,
        x2,
        e1,
        None,
        None,
        P1.to(low),
        b,
        fs,
        t,
        u,
        D,
        HIDDEN,
        C,
        BH,
    )
    P2 = (XX * load_tile(G, t * (C * C), i, i, C)).to(low)
    errors = load_tile(e2, u * (C * D), i, d, D)
    Z2q -= tl.dot(P2, errors)
    N, _ = layer_norm(Z2q, CHANNELS)
    queries = load_tile(q, t * (C * D), i, d, D)
    store_tile(o, t * (C * D), i, d, queries.to(tl.float32) + N, D)
