"""Triton kernels of the linear neural memory: tiles of C tokens, weights W and momentum S [D, D].

With the gates of a tile (gates.py; Gp, beta_p, f_p are G, beta, f one row later: before the token),
P = (Q K^T) * G, A the anchor (Behrouz et al. 2025, arXiv 2501.00663, in its dual form)::

    E  = 2 (K A - V)        exact: (I + 2 tril_{-1}(Gp * K K^T)) E / 2 = beta_p K W + f_p K S - V
    O  = beta (Q W) + f (Q S) - P E
    W' = beta_end W + f_end S - K^T (g_end E)          S' = mu_end S - K^T (n E)

Backwards, with dW' and dS' given and U = dV (T the inverse of the exact system, else I)::

    U  = T^T 2 (P^T dO + g_end K dW' + n K dS')        dA = -K^T U (exact: none)
    dW = beta_end dW' + Q^T (beta dO) [- K^T (beta_p U)]
    dS = f_end dW' + mu_end dS' + Q^T (f dO) [- K^T (f_p U)]

The terms in brackets are those of the exact system. Every column of W, S, A and E needs only the
same columns, so the scans cut them into blocks of BE that know nothing of each other.
`linear_prepare_kernel` writes P and T for all tiles at once, `linear_scan_kernel` walks through the
tiles of a row with W and S in registers, `linear_reverse_scan_kernel` walks back with dW and dS,
`linear_gradient_kernel` takes every tile's other gradients from what these two wrote.

Tiles are step-major (`memlm.cuda.chunking`): tile ``firsts[j] + row``, or ``j * R + row`` where
`firsts` is None. Empty slots hold zeros, so that rows need no masks.
"""

import triton
import triton.language as tl

from memlm.cuda.linear_recurrence.triton_tiles import (
    divides,
    load_state,
    store_state,
    unit_lower_inverse,
)


@triton.jit
def _tile(j, row, R, firsts):
    """The tile of a row at step j, 64 bits wide for the places of its tokens."""
    if firsts is not None:
        return tl.load(firsts + j).to(tl.int64) + row
    else:
        return R.to(tl.int64) * j + row


@triton.jit
def _load_tokens(pointer, tile, i, columns, C: tl.constexpr, D: tl.constexpr):
    """Columns of a tile's [C, D]; zero from D on."""
    entries = pointer + tile * (C * D) + (i[:, None] * D + columns[None, :])
    if divides(columns, D):
        return tl.load(entries)
    else:
        return tl.load(entries, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def _store_tokens(pointer, tile, i, columns, values, C: tl.constexpr, D: tl.constexpr):
    """The counterpart of `_load_tokens`."""
    entries = pointer + tile * (C * D) + (i[:, None] * D + columns[None, :])
    values = values.to(pointer.dtype.element_ty)
    if divides(columns, D):
        tl.store(entries, values)
    else:
        tl.store(entries, values, mask=(columns < D)[None, :])


@triton.jit
def _square(pointer, tile, i, C: tl.constexpr):
    """Places of a tile's [C, C]."""
    return pointer + tile * (C * C) + (i[:, None] * C + i[None, :])


@triton.jit
def linear_prepare_kernel(
    q, k, G, scores, inverse, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr
):
    """(Q K^T) * G of one tile, and with `inverse` (None: not exact) that of the exact system."""
    tile = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, C)
    QK = tl.zeros([C, C], tl.float32)
    KK = tl.zeros([C, C], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        keys = _load_tokens(k, tile, i, d, C, D)
        QK = tl.dot(_load_tokens(q, tile, i, d, C, D), tl.trans(keys), QK)
        if inverse is not None:
            KK = tl.dot(keys, tl.trans(keys), KK)
    P = QK * tl.load(_square(G, tile, i, C))
    tl.store(_square(scores, tile, i, C), P.to(scores.dtype.element_ty))
    if inverse is not None:
        before = tl.load(_square(G, tile, i, C) - C, mask=(i > 0)[:, None], other=0.0)
        L = tl.where(i[:, None] > i[None, :], 2.0 * before * KK, 0.0)
        T = unit_lower_inverse(L, C)
        tl.store(_square(inverse, tile, i, C), T.to(inverse.dtype.element_ty))


@triton.jit(
    do_not_specialize=["R", "first_step", "last_step", "steps", "base", "rows", "refresh_every"]
)
def linear_scan_kernel(
    q,
    k,
    v,
    scores,
    inverse,
    beta,
    f,
    g_end,
    n,
    beta_end,
    f_end,
    mu_end,
    anchor,
    weights,
    momentum,
    firsts,
    lengths,
    o,
    anchor_out,
    weights_out,
    momentum_out,
    weight_states,
    momentum_states,
    anchor_slots,
    errors,
    R,
    first_step,
    last_step,
    steps,
    base,
    rows,
    refresh_every,
    D: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    FRESH: tl.constexpr,
):
    """Walk through a row's tiles of the steps first_step to last_step with W and S in registers.

    What is written depends on what is given: outputs (o) and the states at the end, which may
    overwrite those at the start; or what the gradients are made of: E [tiles, C, D], W
    [rows + tiles, D, D] and S [tiles, D, D] at every tile's start, the first `rows` of W being the
    anchors given, and the place of every tile's anchor in W, the tiles counted from `base`.
    inverse given: exact, without anchors. FRESH: refresh_every is 1. steps: those of the longest
    row.
    """
    BLOCKS: tl.constexpr = (D + BE - 1) // BE
    row = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    i = tl.arange(0, C)
    d = tl.arange(0, BD)
    e = block * BE + tl.arange(0, BE)
    place = row.to(tl.int64)
    W = load_state(weights, place, d, e, D, D)
    S = load_state(momentum, place, d, e, D, D)
    if inverse is None:
        A = load_state(anchor, place, d, e, D, D).to(k.dtype.element_ty)
        if weight_states is not None:
            store_state(weight_states, place, d, e, A, D, D)
        slot = row
    length = steps
    if lengths is not None:
        length = tl.load(lengths + row)
    for j in range(first_step, tl.where(length < last_step, length, last_step)):
        tile = _tile(j, row, R, firsts)
        W_low = W.to(k.dtype.element_ty)
        S_low = S.to(k.dtype.element_ty)
        if weight_states is not None:
            store_state(weight_states, tile - base + rows, d, e, W_low, D, D)
            store_state(momentum_states, tile - base, d, e, S_low, D, D)
        keys = _load_tokens(k, tile, i, d, C, D)
        E = -_load_tokens(v, tile, i, e, C, D).to(tl.float32)
        if inverse is not None:
            earlier = i > 0
            beta_p = tl.load(beta + tile * C + i - 1, mask=earlier, other=1.0)
            f_p = tl.load(f + tile * C + i - 1, mask=earlier, other=0.0)
            E += tl.dot(keys, W_low) * beta_p[:, None]
            E += tl.dot(keys, S_low) * f_p[:, None]
            E = tl.dot(tl.load(_square(inverse, tile, i, C)), E.to(keys.dtype))
        else:
            if FRESH:
                refresh = j > 0
                A = W_low
                if j == 0:
                    A = load_state(anchor, place, d, e, D, D).to(k.dtype.element_ty)
            else:
                refresh = (refresh_every > 0) & (j > 0)
                if refresh_every > 0:
                    refresh = refresh & (j % refresh_every == 0)
                A = tl.where(refresh, W_low, A)
            slot = tl.where(refresh, (tile - base).to(tl.int32) + rows, slot)
            if anchor_out is not None and refresh & (j + refresh_every >= length):
                store_state(anchor_out, place, d, e, W, D, D)
            if anchor_slots is not None:
                tl.store(anchor_slots + (tile - base), slot)
            E = tl.dot(keys, A, E)
        E = 2.0 * E
        E_low = E.to(keys.dtype)
        if errors is not None:
            _store_tokens(errors, tile - base, i, e, E_low, C, D)
        if o is not None:
            queries = _load_tokens(q, tile, i, d, C, D)
            out = tl.dot(queries, W_low) * tl.load(beta + tile * C + i)[:, None]
            out += tl.dot(queries, S_low) * tl.load(f + tile * C + i)[:, None]
            out -= tl.dot(tl.load(_square(scores, tile, i, C)), E_low)
            _store_tokens(o, tile, i, e, out, C, D)
        # The scales of keys are put on the narrower errors.
        to_weights = (E * -tl.load(g_end + tile * C + i)[:, None]).to(keys.dtype)
        to_momentum = (E * -tl.load(n + tile * C + i)[:, None]).to(keys.dtype)
        W = W * tl.load(beta_end + tile) + S * tl.load(f_end + tile)
        W = tl.dot(tl.trans(keys), to_weights, W)
        S = S * tl.load(mu_end + tile)
        S = tl.dot(tl.trans(keys), to_momentum, S)
    if weights_out is not None:
        store_state(weights_out, place, d, e, W, D, D)
        store_state(momentum_out, place, d, e, S, D, D)


@triton.jit(do_not_specialize=["R", "first_step", "last_step", "steps", "base", "refresh_every"])
def linear_reverse_scan_kernel(
    q,
    k,
    scores,
    inverse,
    beta,
    f,
    g_end,
    n,
    beta_end,
    f_end,
    mu_end,
    do,
    danchor,
    dweights,
    dmomentum,
    firsts,
    lengths,
    dv,
    weight_gradients,
    momentum_gradients,
    R,
    first_step,
    last_step,
    steps,
    base,
    refresh_every,
    D: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    FRESH: tl.constexpr,
):
    """Walk back through a row's tiles of the steps last_step to first_step with dW and dS.

    dweights, dmomentum, danchor [R, D, D] hold the gradients of the states after these steps and
    take those before them. Writes dV, and dW' and dS' [tiles, D, D] of every tile, counted from
    `base`. inverse given: exact, without anchors. FRESH: refresh_every is 1, so that only a row's
    first tile reads the anchor given, whose gradient is left to the caller, and dA is not carried.
    steps: those of the longest row.
    """
    BLOCKS: tl.constexpr = (D + BE - 1) // BE
    row = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    i = tl.arange(0, C)
    d = tl.arange(0, BD)
    e = block * BE + tl.arange(0, BE)
    place = row.to(tl.int64)
    dW = load_state(dweights, place, d, e, D, D)
    dS = load_state(dmomentum, place, d, e, D, D)
    CARRY: tl.constexpr = inverse is None and not FRESH
    if CARRY:
        dA = load_state(danchor, place, d, e, D, D)
    length = steps
    if lengths is not None:
        length = tl.load(lengths + row)
    end = tl.where(length < last_step, length, last_step)
    for step in range(0, end - first_step):
        j = end - 1 - step
        tile = _tile(j, row, R, firsts)
        dW_low = dW.to(k.dtype.element_ty)
        dS_low = dS.to(k.dtype.element_ty)
        store_state(weight_gradients, tile - base, d, e, dW_low, D, D)
        store_state(momentum_gradients, tile - base, d, e, dS_low, D, D)
        keys = _load_tokens(k, tile, i, d, C, D)
        queries = _load_tokens(q, tile, i, d, C, D)
        dout = _load_tokens(do, tile, i, e, C, D)
        U = tl.dot(keys, dW_low) * tl.load(g_end + tile * C + i)[:, None]
        U += tl.dot(keys, dS_low) * tl.load(n + tile * C + i)[:, None]
        U = tl.dot(tl.trans(tl.load(_square(scores, tile, i, C))), dout, U)
        U = 2.0 * U
        if inverse is not None:
            T = tl.load(_square(inverse, tile, i, C))
            U = tl.dot(tl.trans(T), U.to(keys.dtype))
        _store_tokens(dv, tile, i, e, U, C, D)
        # The scales of queries and keys are put on the narrower gradients.
        wide = dout.to(tl.float32)
        from_weights = (wide * tl.load(beta + tile * C + i)[:, None]).to(keys.dtype)
        from_momentum = (wide * tl.load(f + tile * C + i)[:, None]).to(keys.dtype)
        dS = dS * tl.load(mu_end + tile) + dW * tl.load(f_end + tile)
        dS = tl.dot(tl.trans(queries), from_momentum, dS)
        dW = dW * tl.load(beta_end + tile)
        dW = tl.dot(tl.trans(queries), from_weights, dW)
        if inverse is not None:
            earlier = i > 0
            beta_p = tl.load(beta + tile * C + i - 1, mask=earlier, other=1.0)
            f_p = tl.load(f + tile * C + i - 1, mask=earlier, other=0.0)
            dW = tl.dot(tl.trans(keys), (U * -beta_p[:, None]).to(keys.dtype), dW)
            dS = tl.dot(tl.trans(keys), (U * -f_p[:, None]).to(keys.dtype), dS)
        elif FRESH:
            if (j == length - 1) & (j > 0):  # the anchor of the last tile is an output
                dW += load_state(danchor, place, d, e, D, D)
            dW = tl.dot(tl.trans(keys), (U * tl.where(j > 0, -1.0, 0.0)).to(keys.dtype), dW)
        else:
            dA = tl.dot(tl.trans(keys), (-U).to(keys.dtype), dA)
            refresh = (refresh_every > 0) & (j > 0)
            if refresh_every > 0:
                refresh = refresh & (j % refresh_every == 0)
            # Products, for sums that are zeroed by a choice do not compile for sm_100.
            dW += dA * tl.where(refresh, 1.0, 0.0)
            dA = dA * tl.where(refresh, 0.0, 1.0)
    store_state(dweights, place, d, e, dW, D, D)
    store_state(dmomentum, place, d, e, dS, D, D)
    if CARRY:
        store_state(danchor, place, d, e, dA, D, D)


@triton.jit(do_not_specialize=["base", "rows"])
def linear_gradient_kernel(
    q,
    k,
    G,
    beta,
    f,
    g_end,
    n,
    do,
    dv,
    errors,
    weight_states,
    momentum_states,
    anchor_slots,
    weight_gradients,
    momentum_gradients,
    dq,
    dk,
    dG,
    dbeta,
    df,
    dg_end,
    dn,
    dbeta_end,
    df_end,
    dmu_end,
    base,
    rows,
    D: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """Gradients of one tile's queries, keys and gates. With U = dV::

        dG = -tril(dO E^T) * Q K^T          dB = -(dO E^T) * G
        dQ = beta dO W^T + f dO S^T + dB K
        dK = dB^T Q - g_end E dW'^T - n E dS'^T - U A^T

    and for the exact system (anchor_slots None), with N = tril_{-1}(U E^T), instead of U A^T::

        dGp = N * K K^T                     dK += (N * Gp + (N * Gp)^T) K
        dK -= beta_p U W^T + f_p U S^T

    The gradients of the gates of rows are the products of these terms with Q or K, row by row.
    """
    local = tl.program_id(0).to(tl.int64)
    tile = local + base
    i = tl.arange(0, C)
    EXACT: tl.constexpr = anchor_slots is None
    dB = tl.zeros([C, C], tl.float32)
    for e0 in range(0, D, BE):
        e = e0 + tl.arange(0, BE)
        error = _load_tokens(errors, local, i, e, C, D)
        dB = tl.dot(_load_tokens(do, tile, i, e, C, D), tl.trans(error), dB)
    QK = tl.zeros([C, C], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        keys = _load_tokens(k, tile, i, d, C, D)
        QK = tl.dot(_load_tokens(q, tile, i, d, C, D), tl.trans(keys), QK)
    dB = tl.where(i[:, None] >= i[None, :], -dB, 0.0)
    tl.store(_square(dG, tile, i, C), dB * QK)
    dB_low = (dB * tl.load(_square(G, tile, i, C))).to(k.dtype.element_ty)
    earlier = i > 0
    if EXACT:
        N = tl.zeros([C, C], tl.float32)
        for e0 in range(0, D, BE):
            e = e0 + tl.arange(0, BE)
            error = _load_tokens(errors, local, i, e, C, D)
            N = tl.dot(_load_tokens(dv, tile, i, e, C, D), tl.trans(error), N)
        KK = tl.zeros([C, C], tl.float32)
        for d0 in range(0, D, BD):
            keys = _load_tokens(k, tile, i, d0 + tl.arange(0, BD), C, D)
            KK = tl.dot(keys, tl.trans(keys), KK)
        N = tl.where(i[:, None] > i[None, :], N, 0.0)
        tl.debug_barrier()  # other threads read the row before theirs
        one_up = _square(dG, tile, i, C) - C
        sums = tl.load(one_up, mask=earlier[:, None], other=0.0) + N * KK
        tl.store(one_up, sums, mask=earlier[:, None])
        N = N * tl.load(_square(G, tile, i, C) - C, mask=earlier[:, None], other=0.0)
        N_low = (N + tl.trans(N)).to(k.dtype.element_ty)
        beta_p = tl.load(beta + tile * C + i - 1, mask=earlier, other=1.0)
        f_p = tl.load(f + tile * C + i - 1, mask=earlier, other=0.0)
        dbeta_p = tl.zeros([C], tl.float32)
        df_p = tl.zeros([C], tl.float32)
    beta_t = tl.load(beta + tile * C + i)
    f_t = tl.load(f + tile * C + i)
    g_t = tl.load(g_end + tile * C + i)
    n_t = tl.load(n + tile * C + i)
    dbeta_t = tl.zeros([C], tl.float32)
    df_t = tl.zeros([C], tl.float32)
    dg_t = tl.zeros([C], tl.float32)
    dn_t = tl.zeros([C], tl.float32)
    weights_end = tl.zeros([BD, BE], tl.float32)
    mixed_end = tl.zeros([BD, BE], tl.float32)
    momentum_end = tl.zeros([BD, BE], tl.float32)
    anchor_slot = local
    if not EXACT:
        anchor_slot = tl.load(anchor_slots + local).to(tl.int64)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        read_W = tl.zeros([C, BD], tl.float32)
        read_S = tl.zeros([C, BD], tl.float32)
        to_W = tl.zeros([C, BD], tl.float32)
        to_S = tl.zeros([C, BD], tl.float32)
        from_W = tl.zeros([C, BD], tl.float32)
        from_S = tl.zeros([C, BD], tl.float32)
        for e0 in range(0, D, BE):
            e = e0 + tl.arange(0, BE)
            W = load_state(weight_states, local + rows, d, e, D, D)
            S = load_state(momentum_states, local, d, e, D, D)
            dW = load_state(weight_gradients, local, d, e, D, D)
            dS = load_state(momentum_gradients, local, d, e, D, D)
            dout = _load_tokens(do, tile, i, e, C, D)
            error = _load_tokens(errors, local, i, e, C, D)
            U = _load_tokens(dv, tile, i, e, C, D)
            read_W = tl.dot(dout, tl.trans(W), read_W)
            read_S = tl.dot(dout, tl.trans(S), read_S)
            to_W = tl.dot(error, tl.trans(dW), to_W)
            to_S = tl.dot(error, tl.trans(dS), to_S)
            if EXACT:
                from_W = tl.dot(U, tl.trans(W), from_W)
                from_S = tl.dot(U, tl.trans(S), from_S)
            else:
                A = load_state(weight_states, anchor_slot, d, e, D, D)
                from_W = tl.dot(U, tl.trans(A), from_W)
            weights_end += W.to(tl.float32) * dW.to(tl.float32)
            mixed_end += S.to(tl.float32) * dW.to(tl.float32)
            momentum_end += S.to(tl.float32) * dS.to(tl.float32)
        queries = _load_tokens(q, tile, i, d, C, D)
        keys = _load_tokens(k, tile, i, d, C, D)
        wide_q, wide_k = queries.to(tl.float32), keys.to(tl.float32)
        dbeta_t += tl.sum(read_W * wide_q, 1)
        df_t += tl.sum(read_S * wide_q, 1)
        dg_t -= tl.sum(to_W * wide_k, 1)
        dn_t -= tl.sum(to_S * wide_k, 1)
        dqs = read_W * beta_t[:, None] + read_S * f_t[:, None]
        dqs = tl.dot(dB_low, keys, dqs)
        _store_tokens(dq, tile, i, d, dqs, C, D)
        dks = -(to_W * g_t[:, None] + to_S * n_t[:, None])
        if EXACT:
            dbeta_p -= tl.sum(from_W * wide_k, 1)
            df_p -= tl.sum(from_S * wide_k, 1)
            dks -= from_W * beta_p[:, None] + from_S * f_p[:, None]
            dks = tl.dot(N_low, keys, dks)
        else:
            dks -= from_W
        dks = tl.dot(tl.trans(dB_low), queries, dks)
        _store_tokens(dk, tile, i, d, dks, C, D)
    tl.store(dg_end + tile * C + i, dg_t)
    tl.store(dn + tile * C + i, dn_t)
    tl.store(dbeta + tile * C + i, dbeta_t)
    tl.store(df + tile * C + i, df_t)
    if EXACT:
        tl.debug_barrier()
        before = tile * C + i - 1
        sums = tl.load(dbeta + before, mask=earlier, other=0.0) + dbeta_p
        tl.store(dbeta + before, sums, mask=earlier)
        sums = tl.load(df + before, mask=earlier, other=0.0) + df_p
        tl.store(df + before, sums, mask=earlier)
    tl.store(dbeta_end + tile, tl.sum(tl.sum(weights_end, 1), 0))
    tl.store(df_end + tile, tl.sum(tl.sum(mixed_end, 1), 0))
    tl.store(dmu_end + tile, tl.sum(tl.sum(momentum_end, 1), 0))
