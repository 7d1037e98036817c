"""Triton kernels of the gradients of the neural memory of two layers (triton_mlp_kernels.py).

With x~ the gradient of x, Gamma-like products written out, and LN(Z) = N with the factor r::

    p(x) = x - mean(x) - N mean(x N)          N~ -> Z~ = r p(N~)

Reads, of every tile by itself (`mlp_output_gradient_kernel`, `mlp_read_gradient_kernel`)::

    Z2q~ = r_q p_q(O~)       H2 = Z2q~ E2^T       H1 = Z1q~ E1^T
    Xq~ = beta (Z2q~ W2^T) + f (Z2q~ S2^T) - (H2 o G) X2       Z1q~ = Xq~ gelu'(Z1q)
    Q~ = O~ + beta (Z1q~ W1^T) + f (Z1q~ S1^T) - (H1 o G) K
    G~ = -tril(H2 o (Xq X2^T) + H1 o (Q K^T))
    beta~ = <Z2q~, Xq W2> + <Z1q~ W1^T, Q>       f~ = <Z2q~, Xq S2> + <Z1q~ S1^T, Q>
    E2~ = -P2^T Z2q~    X2~ = -(H2 o G)^T Xq    E1~ = -P1^T Z1q~    K~ = -(H1 o G)^T Q

Writes, from the last step to the first (three kernels per step, `mlp_reverse_*_kernel`, two of them
with a program per slice of the hidden channels), adding to what the reads left::

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
def mlp_output_gradient_kernel(
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
    dG,
    xq,
    slope,
    dz2q,
    de2,
    p1,
    h2,
    first,
    first_tile,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
):
    """Gradients through the reads of one tile, up to those of Xq.

    dG holds H2 o (Xq X2^T) of all tiles; of those from `first_tile` on Xq, gelu'(Z1q) (`slope`),
    Z2q~, the share of E2~, P1 and H2 o G are written.
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
    store_tile(p1, u * (C * C), i, i, P1, C)
    Z2q, XX = read_slices(
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
        D,
        HIDDEN,
        C,
        BH,
    )
    store_tile(dG, t * (C * C), i, i, XX, C)
    P2 = (XX * load_tile(G, t * (C * C), i, i, C)).to(low)
    errors = load_tile(e2, u * (C * D), i, d, D)
    Z2q -= tl.dot(P2, errors)
    N, r = layer_norm(Z2q, CHANNELS)
    dout = load_tile(do, t * (C * D), i, d, D).to(tl.float32)
    dZ2q = (r * without_statistics(dout, N, CHANNELS)).to(low)
    store_tile(dz2q, u * (C * D), i, d, dZ2q, D)
    store_tile(de2, u * (C * D), i, d, -tl.dot(tl.trans(P2), dZ2q), D)
    scores = tl.dot(dZ2q, tl.trans(errors))
    tl.debug_barrier()  # what is stored is read again by other threads
    store_tile(h2, u * (C * C), i, i, scores * load_tile(G, t * (C * C), i, i, C), C)
    store_tile(dG, t * (C * C), i, i, scores * load_tile(dG, t * (C * C), i, i, C), C)


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
    p1,
    h2,
    first,
    first_tile,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
):
    """The rest of the gradients through the reads of one tile.

    Written for all tiles: dq, dG, dbeta, df; for those from `first_tile` on: Z1q~, where dz1q held
    gelu'(Z1q), and the shares of K~, X2~ and E1~.
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
    products = tl.zeros([C, C], tl.float32)
    to_W = tl.zeros([C, D], tl.float32)
    to_S = tl.zeros([C, D], tl.float32)
    db = tl.zeros([C], tl.float32)
    dfs = tl.zeros([C], tl.float32)
    for h0 in range(0, HIDDEN, BH):
        c = h0 + tl.arange(0, BH)
        dZ = load_tile(dz2q, u * (C * D), i, d, D)
        Xq = load_tile(xq, u * (C * HIDDEN), i, c, HIDDEN)
        from_W = tl.dot(dZ, tl.trans(load_tile(tile_W2, u * (D * HIDDEN), c, d, D)))
        db += tl.sum(from_W * Xq.to(tl.float32), 1)
        from_S = tl.dot(dZ, tl.trans(load_tile(tile_S2, u * (D * HIDDEN), c, d, D)))
        dfs += tl.sum(from_S * Xq.to(tl.float32), 1)
        dXq = b * from_W + fs * from_S
        H2 = load_tile(h2, u * (C * C), i, i, C)
        dXq -= tl.dot(H2, load_tile(x2, u * (C * HIDDEN), i, c, HIDDEN))
        slope = load_tile(dz1q, u * (C * HIDDEN), i, c, HIDDEN).to(tl.float32)
        dZ1q = (dXq * slope).to(low)
        store_tile(dz1q, u * (C * HIDDEN), i, c, dZ1q, HIDDEN)
        store_tile(dx2, u * (C * HIDDEN), i, c, -tl.dot(tl.trans(H2), Xq), HIDDEN)
        P1 = load_tile(p1, u * (C * C), i, i, C)
        store_tile(de1, u * (C * HIDDEN), i, c, -tl.dot(tl.trans(P1), dZ1q), HIDDEN)
        E1 = load_tile(e1, u * (C * HIDDEN), i, c, HIDDEN)
        products = tl.dot(dZ1q, tl.trans(E1), products)
        W1 = load_tile(tile_W1, u * (D * HIDDEN), d, c, HIDDEN)
        S1 = load_tile(tile_S1, u * (D * HIDDEN), d, c, HIDDEN)
        to_W = tl.dot(dZ1q, tl.trans(W1), to_W)
        to_S = tl.dot(dZ1q, tl.trans(S1), to_S)
    queries = load_tile(q, t * (C * D), i, d, D)
    keys = load_tile(k, t * (C * D), i, d, D)
    wide = queries.to(tl.float32)
    tl.store(dbeta + t * C + i, db + tl.sum(to_W * wide, 1))
    tl.store(df + t * C + i, dfs + tl.sum(to_S * wide, 1))
    scores = load_tile(dG, t * (C * C), i, i, C) + products * tl.dot(queries, tl.trans(keys))
    store_tile(dG, t * (C * C), i, i, tl.where(i[:, None] >= i[None, :], -scores, 0.0), C)
    H1 = (products * load_tile(G, t * (C * C), i, i, C)).to(low)
    dout = load_tile(do, t * (C * D), i, d, D).to(tl.float32)
    store_tile(dq, t * (C * D), i, d, dout + b * to_W + fs * to_S - tl.dot(H1, keys), D)
    store_tile(dk, u * (C * D), i, d, -tl.dot(tl.trans(H1), queries), D)


@triton.jit(do_not_specialize=["start", "first_tile", "anchor_place"])
def mlp_reverse_inner_kernel(
    k,
    g_end,
    n,
    anchor1,
    anchor2,
    x2,
    e1,
    e2,
    dx2,
    de1,
    dW1,
    dW2,
    dS1,
    dS2,
    dk_parts,
    de2_parts,
    gate_parts,
    start,
    first_tile,
    anchor_place,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
):
    """One slice of the hidden channels of one tile of a step whose tiles begin at `start`: up to
    its shares of E2~.

    anchor: weights in the type of the tokens, the row's at `anchor_place` + row. de1 and e1 then
    hold Y~ and the first term of Z1~; dk_parts, de2_parts [rows, slices, C, D] and gate_parts
    [rows, 2, slices, C] take the shares of K~, E2~, g_end~ and n~.
    """
    row = tl.program_id(0).to(tl.int64)
    SLICES: tl.constexpr = HIDDEN // BH
    part = row * SLICES + tl.program_id(1)
    t = start + row
    state = row * (D * HIDDEN)
    anchor = (anchor_place + row) * (D * HIDDEN)
    tokens = t * (C * D)
    hidden = (t - first_tile) * (C * HIDDEN)
    i = tl.arange(0, C)
    d = tl.arange(0, D)
    c = tl.program_id(1) * BH + tl.arange(0, BH)
    low = k.dtype.element_ty
    ge = tl.load(g_end + t * C + i)[:, None]
    ne = tl.load(n + t * C + i)[:, None]
    keys = load_tile(k, tokens, i, d, D)
    E1 = load_tile(e1, hidden, i, c, HIDDEN).to(tl.float32)
    dE1 = load_tile(de1, hidden, i, c, HIDDEN).to(tl.float32)
    gradient = load_tile(dW1, state, d, c, HIDDEN).to(low)
    written = tl.dot(keys, gradient)
    dge = tl.sum(written * E1, 1)
    dE1 -= ge * written
    dK = tl.dot((ge * E1).to(low), tl.trans(gradient))
    gradient = load_tile(dS1, state, d, c, HIDDEN).to(low)
    written = tl.dot(keys, gradient)
    dne = tl.sum(written * E1, 1)
    dE1 -= ne * written
    dK = tl.dot((ne * E1).to(low), tl.trans(gradient), dK)
    store_tile(dk_parts, part * (C * D), i, d, -dK, D)
    place = gate_parts + (row * (2 * SLICES) + tl.program_id(1)) * C + i
    tl.store(place, -dge)
    tl.store(place + SLICES * C, -dne)

    a2 = load_tile(anchor2, anchor, c, d, D)
    Z1 = tl.dot(keys, load_tile(anchor1, anchor, d, c, HIDDEN))
    errors = load_tile(e2, (t - first_tile) * (C * D), i, d, D)
    Y = tl.dot(errors, tl.trans(a2))
    store_tile(e1, hidden, i, c, dE1 * Y * normal_density(Z1) * (2.0 - Z1 * Z1), HIDDEN)
    dY = (dE1 * gelu_slope(Z1)).to(low)
    store_tile(de1, hidden, i, c, dY, HIDDEN)
    dE2 = tl.dot(dY, a2)
    X2 = load_tile(x2, hidden, i, c, HIDDEN).to(tl.float32)
    gradient = load_tile(dW2, state, c, d, D).to(low)
    dE2 = tl.dot((-ge * X2).to(low), gradient, dE2)
    gradient = load_tile(dS2, state, c, d, D).to(low)
    dE2 = tl.dot((-ne * X2).to(low), gradient, dE2)
    store_tile(de2_parts, part * (C * D), i, d, dE2, D)


@triton.jit(do_not_specialize=["start", "first_tile"])
def mlp_reverse_norm_kernel(
    k,
    v,
    normal,
    scale,
    de2,
    de2_parts,
    dk_read,
    dz2,
    dv,
    start,
    first_tile,
    SLICES: tl.constexpr,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
):
    """Z2~ and V~ of one tile from the sum of E2~; adds 2 U~ to dk_read."""
    row = tl.program_id(0).to(tl.int64)
    t = start + row
    tokens = t * (C * D)
    rest = (t - first_tile) * (C * D)
    i = tl.arange(0, C)
    d = tl.arange(0, D)
    dE2 = load_tile(de2, rest, i, d, D)
    for part in range(0, SLICES):
        dE2 += load_tile(de2_parts, (row * SLICES + part) * (C * D), i, d, D)
    N = load_tile(normal, rest, i, d, D)
    r = tl.load(scale + (t - first_tile) * C + i)[:, None]
    U = loss_gradient(load_tile(k, tokens, i, d, D), load_tile(v, tokens, i, d, D), N)
    along_U = channel_mean(U * N, CHANNELS)
    along_dE2 = channel_mean(dE2 * N, CHANNELS)
    # mean(E2~ E2) / r, without E2 itself.
    both = channel_mean(dE2 * U, CHANNELS) - along_dE2 * along_U
    both -= channel_mean(dE2, CHANNELS) * channel_mean(U, CHANNELS)
    dU = r * without_statistics(dE2, N, CHANNELS)
    store_tile(dv, tokens, i, d, -2.0 * dU, D)
    store_tile(dk_read, rest, i, d, load_tile(dk_read, rest, i, d, D) + 2.0 * dU, D)
    dN = 2.0 * dU - r * (dE2 * along_U + U * along_dE2)
    dN = without_statistics(dN, N, CHANNELS) - N * (r * both)
    store_tile(dz2, rest, i, d, r * dN, D)


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


@triton.jit(
    do_not_specialize=["start", "first_tile", "anchor_place", "fresh", "always_kept", "remaining"]
)
def mlp_reverse_outer_kernel(
    q,
    k,
    beta,
    f,
    g_end,
    n,
    beta_end,
    f_end,
    mu_end,
    anchor1,
    anchor2,
    tile_W1,
    tile_W2,
    tile_S1,
    tile_S2,
    x2,
    e1,
    e2,
    xq,
    dz1q,
    dz2q,
    dx2,
    de1,
    dz2,
    dA1,
    dA2,
    dW1,
    dW2,
    dS1,
    dS2,
    dk_parts,
    gate_parts,
    end_parts,
    start,
    first_tile,
    anchor_place,
    fresh,
    always_kept,
    remaining,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
):
    """The rest of a slice of a tile; dA, dW and dS are read and overwritten.

    fresh: whether the anchor was taken at this step. The row's dA holds something if `always_kept`,
    or at its last tile: from row `remaining` on. end_parts [rows, 3, slices] takes the shares of
    beta_end~, f_end~ and mu_end~; the others as for `mlp_reverse_inner_kernel`.
    """
    row = tl.program_id(0).to(tl.int64)
    SLICES: tl.constexpr = HIDDEN // BH
    t = start + row
    u = t - first_tile
    state = row * (D * HIDDEN)
    anchor = (anchor_place + row) * (D * HIDDEN)
    before = u * (D * HIDDEN)
    hidden = u * (C * HIDDEN)
    kept = (always_kept != 0) | (row >= remaining)
    i = tl.arange(0, C)
    d = tl.arange(0, D)
    c = tl.program_id(1) * BH + tl.arange(0, BH)
    low = k.dtype.element_ty
    ge = tl.load(g_end + t * C + i)[:, None]
    ne = tl.load(n + t * C + i)[:, None]
    be, fe, me = tl.load(beta_end + t), tl.load(f_end + t), tl.load(mu_end + t)
    b = tl.load(beta + t * C + i)[:, None]
    fs = tl.load(f + t * C + i)[:, None]

    errors = load_tile(e2, u * (C * D), i, d, D)
    dw = load_tile(dW2, state, c, d, D)
    ds = load_tile(dS2, state, c, d, D)
    X2 = load_tile(x2, hidden, i, c, HIDDEN)
    written = tl.dot(errors, tl.trans(dw.to(low)))
    dge = tl.sum(written * X2.to(tl.float32), 1)
    dX2 = load_tile(dx2, hidden, i, c, HIDDEN).to(tl.float32) - ge * written
    written = tl.dot(errors, tl.trans(ds.to(low)))
    dne = tl.sum(written * X2.to(tl.float32), 1)
    dX2 -= ne * written
    place = gate_parts + (row * (2 * SLICES) + tl.program_id(1)) * C + i
    tl.store(place, -dge)
    tl.store(place + SLICES * C, -dne)
    dZ2 = load_tile(dz2, u * (C * D), i, d, D)
    dX2 = tl.dot(dZ2, tl.trans(load_tile(anchor2, anchor, c, d, D)), dX2)
    keys = load_tile(k, t * (C * D), i, d, D)
    a1 = load_tile(anchor1, anchor, d, c, HIDDEN)
    dZ1 = load_tile(e1, hidden, i, c, HIDDEN).to(tl.float32)
    dZ1 = (dZ1 + dX2 * gelu_slope(tl.dot(keys, a1))).to(low)
    dK = tl.dot(dZ1, tl.trans(a1))
    store_tile(dk_parts, (row * SLICES + tl.program_id(1)) * (C * D), i, d, dK, D)

    W = load_tile(tile_W2, before, c, d, D).to(tl.float32)
    S = load_tile(tile_S2, before, c, d, D).to(tl.float32)
    dbe = tl.sum(dw * W, 0)
    dfe = tl.sum(dw * S, 0)
    dme = tl.sum(ds * S, 0)
    Xq = load_tile(xq, hidden, i, c, HIDDEN).to(tl.float32)
    dZq = load_tile(dz2q, u * (C * D), i, d, D)
    ds = dw * fe + ds * me
    ds += tl.trans(tl.dot(tl.trans(dZq), (Xq * fs).to(low)))
    store_tile(dS2, state, c, d, ds, D)
    dw = dw * be + tl.trans(tl.dot(tl.trans(dZq), (Xq * b).to(low)))
    da = tl.dot(tl.trans(errors), load_tile(de1, hidden, i, c, HIDDEN))
    da = tl.trans(tl.dot(tl.trans(dZ2), X2, da))
    dw = pass_to_anchor(dA2, state, c, d, da, dw, fresh, kept, D)
    store_tile(dW2, state, c, d, dw, D)

    dv = load_tile(dW1, state, d, c, HIDDEN)
    du = load_tile(dS1, state, d, c, HIDDEN)
    W = load_tile(tile_W1, before, d, c, HIDDEN).to(tl.float32)
    S = load_tile(tile_S1, before, d, c, HIDDEN).to(tl.float32)
    dbe += tl.sum(dv * W, 1)
    dfe += tl.sum(dv * S, 1)
    dme += tl.sum(du * S, 1)
    queries = load_tile(q, t * (C * D), i, d, D)
    dZq = load_tile(dz1q, hidden, i, c, HIDDEN).to(tl.float32)
    du = dv * fe + du * me + tl.dot(tl.trans(queries), (dZq * fs).to(low))
    store_tile(dS1, state, d, c, du, HIDDEN)
    dv = dv * be + tl.dot(tl.trans(queries), (dZq * b).to(low))
    da = tl.dot(tl.trans(keys), dZ1)
    dv = pass_to_anchor(dA1, state, d, c, da, dv, fresh, kept, HIDDEN)
    store_tile(dW1, state, d, c, dv, HIDDEN)
    place = end_parts + row * (3 * SLICES) + tl.program_id(1)
    tl.store(place, tl.sum(dbe, 0))
    tl.store(place + SLICES, tl.sum(dfe, 0))
    tl.store(place + 2 * SLICES, tl.sum(dme, 0))
