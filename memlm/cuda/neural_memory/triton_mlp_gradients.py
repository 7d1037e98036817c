"""Triton kernels of the gradients of the neural memory of two layers (triton_mlp_kernels.py).

With x~ the gradient of x, Gamma-like products written out, and LN(Z) = N with the factor r::

    p(x) = x - mean(x) - N mean(x N)          N~ -> Z~ = r p(N~)

Reads, of every tile by itself (`mlp_read_gradient_kernel`)::

    Z2q~ = r_q p_q(O~)       H2 = Z2q~ E2^T       H1 = Z1q~ E1^T
    Xq~ = beta (Z2q~ W2^T) + f (Z2q~ S2^T) - (H2 o G) X2       Z1q~ = Xq~ gelu'(Z1q)
    Q~ = O~ + beta (Z1q~ W1^T) + f (Z1q~ S1^T) - (H1 o G) K
    G~ = -tril(H2 o (Xq X2^T) + H1 o (Q K^T))
    beta~ = <Z2q~, Xq W2> + <Z1q~ W1^T, Q>       f~ = <Z2q~, Xq S2> + <Z1q~ S1^T, Q>
    E2~ = -P2^T Z2q~    X2~ = -(H2 o G)^T Xq    E1~ = -P1^T Z1q~    K~ = -(H1 o G)^T Q

Writes, from the last tile to the first (`mlp_reverse_kernel`), adding to what the reads left::

    E1~ -= g_end (K W1'~) + n (K S1'~)           E2~ -= g_end (X2 W2'~) + n (X2 S2'~)
    g_end~ = -<K W1'~, E1> - <X2 W2'~, E2>       n~ = -<K S1'~, E1> - <X2 S2'~, E2>
    K~ -= (g_end E1) W1'~^T + (n E1) S1'~^T      X2~ -= g_end (E2 W2'~^T) + n (E2 S2'~^T)
    Y~ = E1~ gelu'(Z1)                           E2~ += Y~ A2
    U~ = r p(E2~)    K~ += 2 U~    V~ = -2 U~
    N~ = 2 U~ - r (E2~ mean(U N) + U mean(E2~ N))
    Z2~ = r p(N~) - r N mean(E2~ E2)             X2~ += Z2~ A2^T
    Z1~ = E1~ (E2 A2^T) gelu''(Z1) + X2~ gelu'(Z1)     K~ += Z1~ A1^T
    A1~ = K^T Z1~                                A2~ = Y~^T E2 + X2^T Z2~
    W1~ = beta_end W1'~ + (beta Q)^T Z1q~        S1~ = f_end W1'~ + mu_end S1'~ + (f Q)^T Z1q~
    W2~ = beta_end W2'~ + (beta Xq)^T Z2q~       S2~ = f_end W2'~ + mu_end S2'~ + (f Xq)^T Z2q~
    beta_end~ = <W'~, W>    f_end~ = <W'~, S>    mu_end~ = <S'~, S>    (over both layers)

A~ is added to the W~ of the tile whose weights the anchor was taken from.
"""

import triton
import triton.language as tl

from memlm.cuda.neural_memory.triton_mlp_kernels import (
    anchor_moves,
    channel_mean,
    gelu_slope,
    layer_norm,
    load_tile,
    loss_gradient,
    normal_density,
    read_slices,
    store_tile,
    tile_of_program,
    without_statistics,
)


@triton.jit(do_not_specialize=["first", "first_tile"])
def mlp_read_gradient_kernel(
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
    do,
    dq,
    dG,
    dbeta,
    df,
    xq,
    dz1q,
    dz2q,
    dk,
    dx2,
    de1,
    de2,
    first,
    first_tile,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
):
    """Gradients through the reads of one tile.

    Written for all tiles: dq, dG, dbeta, df; for those from `first_tile` on: Xq, Z1q~, Z2q~ and
    the shares of K~, X2~, E1~ and E2~.
    """
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
    P1 = P1.to(low)
    # dz1q holds gelu'(Z1q) until the second walk over the slices.
    from_W, from_S, XX = read_slices(
        q,
        tile_W1,
        tile_W2,
        tile_S1,
        tile_S2,
        x2,
        e1,
        xq,
        dz1q,
        P1,
        b,
        fs,
        t,
        u,
        D,
        HIDDEN,
        C,
        BH,
    )
    gates = load_tile(G, t * (C * C), i, i, C)
    P2 = (XX * gates).to(low)
    errors = load_tile(e2, u * (C * D), i, d, D)
    N, r = layer_norm(b * from_W + fs * from_S - tl.dot(P2, errors), CHANNELS)
    dout = load_tile(do, t * (C * D), i, d, D).to(tl.float32)
    dZ2q = r * without_statistics(dout, N, CHANNELS)
    db = tl.sum(dZ2q * from_W, 1)
    dfs = tl.sum(dZ2q * from_S, 1)
    dZ = dZ2q.to(low)
    store_tile(dz2q, u * (C * D), i, d, dZ, D)
    store_tile(de2, u * (C * D), i, d, -tl.dot(tl.trans(P2), dZ), D)
    H2 = tl.dot(dZ, tl.trans(errors))
    store_tile(dG, t * (C * C), i, i, H2 * XX, C)
    H2 = (H2 * gates).to(low)
    tl.debug_barrier()  # what is stored is read again by other threads

    H1 = tl.zeros([C, C], tl.float32)
    to_W = tl.zeros([C, D], tl.float32)
    to_S = tl.zeros([C, D], tl.float32)
    for h0 in range(0, HIDDEN, BH):
        c = h0 + tl.arange(0, BH)
        dZ = load_tile(dz2q, u * (C * D), i, d, D)
        dXq = b * tl.dot(dZ, tl.trans(load_tile(tile_W2, u * (D * HIDDEN), c, d, D)))
        dXq += fs * tl.dot(dZ, tl.trans(load_tile(tile_S2, u * (D * HIDDEN), c, d, D)))
        dXq -= tl.dot(H2, load_tile(x2, u * (C * HIDDEN), i, c, HIDDEN))
        slope = load_tile(dz1q, u * (C * HIDDEN), i, c, HIDDEN).to(tl.float32)
        dZ1q = (dXq * slope).to(low)
        store_tile(dz1q, u * (C * HIDDEN), i, c, dZ1q, HIDDEN)
        Xq = load_tile(xq, u * (C * HIDDEN), i, c, HIDDEN)
        store_tile(dx2, u * (C * HIDDEN), i, c, -tl.dot(tl.trans(H2), Xq), HIDDEN)
        store_tile(de1, u * (C * HIDDEN), i, c, -tl.dot(tl.trans(P1), dZ1q), HIDDEN)
        H1 = tl.dot(dZ1q, tl.trans(load_tile(e1, u * (C * HIDDEN), i, c, HIDDEN)), H1)
        W1 = load_tile(tile_W1, u * (D * HIDDEN), d, c, HIDDEN)
        S1 = load_tile(tile_S1, u * (D * HIDDEN), d, c, HIDDEN)
        to_W = tl.dot(dZ1q, tl.trans(W1), to_W)
        to_S = tl.dot(dZ1q, tl.trans(S1), to_S)
    queries = load_tile(q, t * (C * D), i, d, D)
    keys = load_tile(k, t * (C * D), i, d, D)
    wide = queries.to(tl.float32)
    tl.store(dbeta + t * C + i, db + tl.sum(to_W * wide, 1))
    tl.store(df + t * C + i, dfs + tl.sum(to_S * wide, 1))
    scores = load_tile(dG, t * (C * C), i, i, C) + H1 * tl.dot(queries, tl.trans(keys))
    store_tile(dG, t * (C * C), i, i, tl.where(i[:, None] >= i[None, :], -scores, 0.0), C)
    H1 = (H1 * load_tile(G, t * (C * C), i, i, C)).to(low)
    dout = load_tile(do, t * (C * D), i, d, D).to(tl.float32)
    store_tile(dq, t * (C * D), i, d, dout + b * to_W + fs * to_S - tl.dot(H1, keys), D)
    store_tile(dk, u * (C * D), i, d, -tl.dot(tl.trans(H1), queries), D)


@triton.jit
def pass_to_anchor(dA, place, row, column, gradient, dW, fresh, kept, WIDTH: tl.constexpr):
    """dW with a tile's anchor gradient where the anchor is W, else dW; dA sums what is left over.

    kept: whether dA holds anything yet.
    """
    if kept:
        gradient += load_tile(dA, place, row, column, WIDTH)
    if fresh:
        dW += gradient
        if kept:
            store_tile(dA, place, row, column, tl.zeros_like(gradient), WIDTH)
    else:
        store_tile(dA, place, row, column, gradient, WIDTH)
    return dW


@triton.jit(do_not_specialize=["first", "stop", "first_tile", "refresh_every"])
def mlp_reverse_kernel(
    q,
    k,
    v,
    beta,
    f,
    g_end,
    n,
    beta_end,
    f_end,
    mu_end,
    starts,
    lengths,
    first_A1,
    first_A2,
    tile_W1,
    tile_W2,
    tile_S1,
    tile_S2,
    x2,
    e1,
    e2,
    normal,
    scale,
    xq,
    dz1q,
    dz2q,
    dk_read,
    dx2,
    de1,
    de2,
    dz2,
    dA1,
    dA2,
    dW1,
    dW2,
    dS1,
    dS2,
    dk,
    dv,
    dg_end,
    dn,
    dbeta_end,
    df_end,
    dmu_end,
    first,
    stop,
    first_tile,
    refresh_every,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
):
    """Walk steps `stop` to `first` of one row backwards; dA, dW and dS are read and overwritten.

    first_A: the anchor before step `first`. dx2, de1, de2, dk_read: the shares of the reads;
    de1, e1 and dz2 pass values between the two walks over the slices.
    """
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    state = row * (D * HIDDEN)
    i = tl.arange(0, C)
    d = tl.arange(0, D)
    low = k.dtype.element_ty
    end = tl.minimum(stop, length)
    for back in range(0, end - first):
        j = end - 1 - back
        t = tl.load(starts + j) + row
        u = t - first_tile
        fresh = anchor_moves(j, refresh_every)
        kept = (refresh_every != 1) | (j == length - 1)
        anchor_step = j - j % refresh_every
        moved = (anchor_step >= first) & (anchor_step > 0)
        anchor_tile = tl.load(starts + tl.where(moved, anchor_step, j)) + row - first_tile
        anchor1 = tl.where(moved, tile_W1 + anchor_tile * (D * HIDDEN), first_A1 + state)
        anchor2 = tl.where(moved, tile_W2 + anchor_tile * (D * HIDDEN), first_A2 + state)
        ge = tl.load(g_end + t * C + i)[:, None]
        ne = tl.load(n + t * C + i)[:, None]

        written_W = tl.zeros([C, D], tl.float32)
        written_S = tl.zeros([C, D], tl.float32)
        through = tl.zeros([C, D], tl.float32)
        dK = load_tile(dk_read, u * (C * D), i, d, D)
        dge = tl.zeros([C], tl.float32)
        dne = tl.zeros([C], tl.float32)
        for h0 in range(0, HIDDEN, BH):
            c = h0 + tl.arange(0, BH)
            hidden = u * (C * HIDDEN)
            keys = load_tile(k, t * (C * D), i, d, D)
            E1 = load_tile(e1, hidden, i, c, HIDDEN).to(tl.float32)
            dE1 = load_tile(de1, hidden, i, c, HIDDEN).to(tl.float32)
            gradient = load_tile(dW1, state, d, c, HIDDEN).to(low)
            written = tl.dot(keys, gradient)
            dge -= tl.sum(written * E1, 1)
            dE1 -= ge * written
            dK = tl.dot((-ge * E1).to(low), tl.trans(gradient), dK)
            gradient = load_tile(dS1, state, d, c, HIDDEN).to(low)
            written = tl.dot(keys, gradient)
            dne -= tl.sum(written * E1, 1)
            dE1 -= ne * written
            dK = tl.dot((-ne * E1).to(low), tl.trans(gradient), dK)
            X2 = load_tile(x2, hidden, i, c, HIDDEN)
            written_W = tl.dot(X2, load_tile(dW2, state, c, d, D).to(low), written_W)
            written_S = tl.dot(X2, load_tile(dS2, state, c, d, D).to(low), written_S)
            a2 = load_tile(anchor2, 0, c, d, D)
            Z1 = tl.dot(keys, load_tile(anchor1, 0, d, c, HIDDEN))
            Y = tl.dot(load_tile(e2, u * (C * D), i, d, D), tl.trans(a2))
            dZ1 = dE1 * Y * normal_density(Z1) * (2.0 - Z1 * Z1)
            dY = (dE1 * gelu_slope(Z1)).to(low)
            through = tl.dot(dY, a2, through)
            store_tile(e1, hidden, i, c, dZ1, HIDDEN)
            store_tile(de1, hidden, i, c, dY, HIDDEN)
        N = load_tile(normal, u * (C * D), i, d, D)
        r = tl.load(scale + u * C + i)[:, None]
        keys = load_tile(k, t * (C * D), i, d, D)
        values = load_tile(v, t * (C * D), i, d, D)
        U = loss_gradient(keys, values, N)
        E2 = r * without_statistics(U, N, CHANNELS)
        tl.store(dg_end + t * C + i, dge - tl.sum(written_W * E2, 1))
        tl.store(dn + t * C + i, dne - tl.sum(written_S * E2, 1))
        dE2 = load_tile(de2, u * (C * D), i, d, D) - ge * written_W - ne * written_S + through
        dU = r * without_statistics(dE2, N, CHANNELS)
        dN = dE2 * channel_mean(U * N, CHANNELS) + U * channel_mean(dE2 * N, CHANNELS)
        dN = 2.0 * dU - r * dN
        dZ2 = without_statistics(dN, N, CHANNELS) - N * channel_mean(dE2 * E2, CHANNELS)
        store_tile(dz2, u * (C * D), i, d, r * dZ2, D)
        store_tile(dv, t * (C * D), i, d, -2.0 * dU, D)
        dK += 2.0 * dU
        tl.debug_barrier()  # what is stored is read again by other threads

        be, fe, me = tl.load(beta_end + t), tl.load(f_end + t), tl.load(mu_end + t)
        b = tl.load(beta + t * C + i)[:, None]
        fs = tl.load(f + t * C + i)[:, None]
        dbe = tl.zeros([D], tl.float32)
        dfe = tl.zeros([D], tl.float32)
        dme = tl.zeros([D], tl.float32)
        for h0 in range(0, HIDDEN, BH):
            c = h0 + tl.arange(0, BH)
            hidden = u * (C * HIDDEN)
            keys = load_tile(k, t * (C * D), i, d, D)
            errors = load_tile(e2, u * (C * D), i, d, D)
            a1 = load_tile(anchor1, 0, d, c, HIDDEN)
            dw = load_tile(dW2, state, c, d, D)
            ds = load_tile(dS2, state, c, d, D)
            dX2 = load_tile(dx2, hidden, i, c, HIDDEN).to(tl.float32)
            dX2 -= ge * tl.dot(errors, tl.trans(dw.to(low)))
            dX2 -= ne * tl.dot(errors, tl.trans(ds.to(low)))
            dZ2 = load_tile(dz2, u * (C * D), i, d, D)
            dX2 = tl.dot(dZ2, tl.trans(load_tile(anchor2, 0, c, d, D)), dX2)
            dZ1 = load_tile(e1, hidden, i, c, HIDDEN).to(tl.float32)
            dZ1 = (dZ1 + dX2 * gelu_slope(tl.dot(keys, a1))).to(low)
            dK = tl.dot(dZ1, tl.trans(a1), dK)

            W = load_tile(tile_W2, u * (D * HIDDEN), c, d, D).to(tl.float32)
            S = load_tile(tile_S2, u * (D * HIDDEN), c, d, D).to(tl.float32)
            dbe += tl.sum(dw * W, 0)
            dfe += tl.sum(dw * S, 0)
            dme += tl.sum(ds * S, 0)
            Xq = load_tile(xq, hidden, i, c, HIDDEN)
            dZq = load_tile(dz2q, u * (C * D), i, d, D)
            ds = dw * fe + ds * me + tl.dot(tl.trans((Xq * fs).to(low)), dZq)
            store_tile(dS2, state, c, d, ds, D)
            dw = dw * be + tl.dot(tl.trans((Xq * b).to(low)), dZq)
            da = tl.dot(tl.trans(load_tile(de1, hidden, i, c, HIDDEN)), errors)
            da = tl.dot(tl.trans(load_tile(x2, hidden, i, c, HIDDEN)), dZ2, da)
            dw = pass_to_anchor(dA2, state, c, d, da, dw, fresh, kept, D)
            store_tile(dW2, state, c, d, dw, D)

            dw = load_tile(dW1, state, d, c, HIDDEN)
            ds = load_tile(dS1, state, d, c, HIDDEN)
            W = load_tile(tile_W1, u * (D * HIDDEN), d, c, HIDDEN).to(tl.float32)
            S = load_tile(tile_S1, u * (D * HIDDEN), d, c, HIDDEN).to(tl.float32)
            dbe += tl.sum(dw * W, 1)
            dfe += tl.sum(dw * S, 1)
            dme += tl.sum(ds * S, 1)
            queries = load_tile(q, t * (C * D), i, d, D)
            dZq = load_tile(dz1q, hidden, i, c, HIDDEN)
            ds = dw * fe + ds * me + tl.dot(tl.trans(queries), (dZq * fs).to(low))
            store_tile(dS1, state, d, c, ds, HIDDEN)
            dw = dw * be + tl.dot(tl.trans(queries), (dZq * b).to(low))
            da = tl.dot(tl.trans(keys), dZ1)
            dw = pass_to_anchor(dA1, state, d, c, da, dw, fresh, kept, HIDDEN)
            store_tile(dW1, state, d, c, dw, HIDDEN)
        store_tile(dk, t * (C * D), i, d, dK, D)
        tl.store(dbeta_end + t, tl.sum(dbe, 0))
        tl.store(df_end + t, tl.sum(dfe, 0))
        tl.store(dmu_end + t, tl.sum(dme, 0))
        tl.debug_barrier()
