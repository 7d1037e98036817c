"""Triton kernels for the gradients of all chunks at once, from what the scans wrote."""

import triton
import triton.language as tl

from memlm.cuda.linear_recurrence.triton_tiles import (
    EPS,
    LOG_ZERO,
    chunk_of_slot,
    decay_matrix,
    decay_of,
    load_rows,
    load_state,
    log_decays,
    store_rows,
    write_strengths,
)


@triton.jit(do_not_specialize=["T", "norm_plane"])
def gradient_kernel(
    q,
    k,
    v,
    log_decay,
    beta,
    A_log,
    dt_bias,
    scores,
    norms,
    states,
    v_new,
    do,
    dends,
    dR,
    cu_seqlens,
    sequence_of_slot,
    dq,
    dk,
    dv,
    dlog_decay,
    dbeta,
    dA_log,
    scale,
    T,
    norm_plane,
    stride_q,
    stride_k,
    stride_v,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    L2: tl.constexpr,
    SIGMOID: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Gradients of one chunk for one key head and the value heads that share it.

    With dL = -tril_{-1}(dR V~^T) * Gamma (the gradient of beta K K^T), dP = (dO V~^T) * Gamma (of
    Q K^T), X = dR S^T, Y = V~ dS'^T, Z = dO S^T::

        dV = beta dR          dbeta = <dR, V> - e^G <X, K> + rowsum(dL * K K^T)
        dQ = e^G Z + dP K
        dK = (beta dL + (beta dL)^T) K + dP^T Q - beta e^G X + e^{G_C - G} Y

    The gradient of G_i collects every product with e^{G_i}; that of the log decays is its sum from
    the end; dA_log [tokens, HV] is its product with them. dq and dk take the sum over the
    value heads of a key head: where there are several, they are float32 and zero before. With norms
    they are the gradients of the unit vectors.
    """
    slot, h = tl.program_id(0) // H, tl.program_id(0) % H
    first, count = chunk_of_slot(slot, T, cu_seqlens, sequence_of_slot, C)
    if count == 0:
        return
    GROUP: tl.constexpr = HV // H
    i = tl.arange(0, C)
    inside = i < count
    q_norm = tl.full([C], 1.0, tl.float32)
    k_norm = tl.full([C], 1.0, tl.float32)
    if norms is not None:
        place = norms + first * H + h + i * H
        q_norm = tl.load(place, mask=inside, other=0.0)
        k_norm = tl.load(place + norm_plane, mask=inside, other=0.0)

    for member in range(0, GROUP):
        head = h * GROUP + member
        state_place = slot.to(tl.int64) * HV + head
        g = log_decays(log_decay, A_log, dt_bias, first, i, inside, head, HV, DECAY)
        G, G_end = tl.cumsum(g, 0), tl.sum(g, 0)
        gamma = decay_matrix(G, C)
        decay, end_decay = decay_of(G), decay_of(G_end - G)
        b = tl.zeros([C], tl.float32)
        if DELTA:
            b = write_strengths(beta, first, i, inside, head, HV, SIGMOID, DOUBLE)
        dP = tl.zeros([C, C], tl.float32)
        dL = tl.zeros([C, C], tl.float32)
        db = tl.zeros([C], tl.float32)
        for v0 in range(0, V, BV):
            value = v0 + tl.arange(0, BV)
            dout = load_rows(do + head * V, first, HV * V, i, value, inside, V)
            V_new = load_rows(v_new + head * V, first, HV * V, i, value, inside, V)
            dP = tl.dot(dout, tl.trans(V_new), dP)
            if DELTA:
                dr = load_rows(dR + head * V, first, HV * V, i, value, inside, V)
                dL = tl.dot(dr, tl.trans(V_new), dL)
                values = load_rows(v + head * V, first, stride_v, i, value, inside, V)
                db += tl.sum(dr.to(tl.float32) * values.to(tl.float32), 1)
                dvalues = dr.to(tl.float32) * b[:, None]
                store_rows(dv + head * V, first, HV * V, i, value, inside, dvalues, V)
        E = dP * load_rows(scores + head * C, first, HV * C, i, i, inside, C).to(tl.float32)
        dP *= gamma
        if DELTA:
            KK = tl.zeros([C, C], tl.float32)
            for k0 in range(0, K, BK):
                keys = load_rows(k + h * K, first, stride_k, i, k0 + tl.arange(0, BK), inside, K)
                KK = tl.dot(keys, tl.trans(keys), KK)
            dL = tl.where(i[:, None] > i[None, :], -dL * gamma, 0.0)
            F = dL * KK * k_norm[:, None] * k_norm[None, :]
            db += tl.sum(F, 1)
            F = F * b[:, None]
            E += F
            dL = dL * b[:, None]
            dL = dL + tl.trans(dL)
        dG = tl.sum(E, 1) - tl.sum(E, 0)
        dG_end = tl.zeros([C], tl.float32)
        end = tl.sum(tl.zeros([C], tl.float32))
        dP_low = (dP * scale).to(k.dtype.element_ty)
        dL_low = dL.to(k.dtype.element_ty)
        for k0 in range(0, K, BK):
            key = k0 + tl.arange(0, BK)
            keys = load_rows(k + h * K, first, stride_k, i, key, inside, K)
            queries = load_rows(q + h * K, first, stride_q, i, key, inside, K)
            if L2:
                keys = (keys.to(tl.float32) * k_norm[:, None]).to(keys.dtype)
                queries = (queries.to(tl.float32) * q_norm[:, None]).to(queries.dtype)
            X = tl.zeros([C, BK], tl.float32)
            Y = tl.zeros([C, BK], tl.float32)
            Z = tl.zeros([C, BK], tl.float32)
            for v0 in range(0, V, BV):
                value = v0 + tl.arange(0, BV)
                S = load_state(states, state_place, key, value, K, V)
                dS = load_state(dends, state_place, key, value, K, V)
                dout = load_rows(do + head * V, first, HV * V, i, value, inside, V)
                V_new = load_rows(v_new + head * V, first, HV * V, i, value, inside, V)
                Z = tl.dot(dout, tl.trans(S), Z)
                Y = tl.dot(V_new, tl.trans(dS), Y)
                if DELTA:
                    dr = load_rows(dR + head * V, first, HV * V, i, value, inside, V)
                    X = tl.dot(dr, tl.trans(S), X)
                if DECAY > 0:
                    end += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
            wide_k, wide_q = keys.to(tl.float32), queries.to(tl.float32)
            q_dot = tl.sum(Z * wide_q, 1) * decay * scale
            end_dot = tl.sum(Y * wide_k, 1) * end_decay
            dG += q_dot
            dG_end += end_dot
            dqs = Z * (decay * scale)[:, None]
            dqs = tl.dot(dP_low, keys, dqs)
            dks = Y * end_decay[:, None]
            dks = tl.dot(tl.trans(dP_low), queries, dks)
            if DELTA:
                x_dot = tl.sum(X * wide_k, 1) * decay
                db -= x_dot
                dG -= b * x_dot
                dks -= X * (b * decay)[:, None]
                dks = tl.dot(dL_low, keys, dks)
            if GROUP > 1:
                dqs += load_rows(dq + h * K, first, H * K, i, key, inside, K)
                dks += load_rows(dk + h * K, first, H * K, i, key, inside, K)
            store_rows(dq + h * K, first, H * K, i, key, inside, dqs, K)
            store_rows(dk + h * K, first, H * K, i, key, inside, dks, K)
        if GROUP > 1:
            tl.debug_barrier()  # the next member reads the sums, maybe with other threads
        if DECAY > 0:
            dG += tl.where(i == C - 1, end * decay_of(G_end), 0.0)
            # A token's own decay multiplies what was written before it, up to the chunk's end.
            dg = tl.cumsum(dG, 0, reverse=True) + tl.cumsum(dG_end, 0) - dG_end
            dg = tl.where(inside & (g > LOG_ZERO), dg, 0.0)
            if DECAY == 3:
                tl.store(dA_log + first * HV + head + i * HV, dg * g, mask=inside)
                raw = tl.load(log_decay + first * HV + head + i * HV, mask=inside, other=0.0)
                bias = tl.load(dt_bias + head).to(tl.float32)
                rate = tl.exp(tl.load(A_log + head).to(tl.float32))
                dg = -rate * dg * tl.sigmoid(raw.to(tl.float32) + bias)
            tl.store(dlog_decay + first * HV + head + i * HV, dg, mask=inside)
        if DELTA:
            if SIGMOID:
                largest: tl.constexpr = 2.0 if DOUBLE else 1.0
                db = db * b * (1.0 - b / largest)
            elif DOUBLE:
                db = 2.0 * db
            tl.store(dbeta + first * HV + head + i * HV, db, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def unit_gradient_kernel(
    x,
    gradient,
    dx,
    rows,
    stride,
    H: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """Gradient of x from that of x / |x|, for the vectors [tokens, H, K] of queries or keys."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    key = tl.arange(0, BK)
    here = (row < rows)[:, None] & (key < K)[None, :]
    place = (row // H * stride + row % H * K)[:, None] + key[None, :]
    wide = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(wide * wide, 1) + EPS)[:, None]
    place = row[:, None] * K + key[None, :]
    dunit = tl.load(gradient + place, mask=here, other=0.0).to(tl.float32)
    along = tl.sum(dunit * wide, 1)[:, None] * norm * norm
    tl.store(dx + place, ((dunit - wide * along) * norm).to(dx.dtype.element_ty), mask=here)
