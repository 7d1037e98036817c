"""Triton kernels of the linear recurrence in chunks of C tokens.

One value head; rows are tokens, q scaled, G the sum of log decays within the chunk::

    Gamma_ij = e^{G_i - G_j} for i >= j          T_0 = (I + tril_{-1}(diag(beta) K K^T))^-1
    R  = beta (V - e^G (K S))                    V~ = (T_0 * Gamma) R
    O  = e^G (Q S) + (Q K^T * Gamma) V~          S' = e^{G_C} S + (e^{G_C - G} K)^T V~

T_0 does not know the decays, so ``(T_0 * Gamma)`` is all that is needed of the gated inverse and
the matrices U and W of the UT transform (Yang et al. 2024, arXiv 2412.06464) never exist. Without
the delta rule V~ = V. Backwards, with dS' given::

    dV~ = (Q K^T * Gamma)^T dO + (e^{G_C - G} K) dS'        dR = (T_0 * Gamma)^T dV~
    dS  = e^{G_C} dS' + (e^G Q)^T dO - (beta e^G K)^T dR

`solve_kernel` writes T_0; `scan_kernel` walks through the chunks of a sequence with a tile of S in
registers and writes outputs, or what the backward pass needs; `reverse_scan_kernel` walks back and
writes dS' and dR; `gradient_kernel` turns these into the gradients of every chunk at once.
`step_kernel` is the recurrence itself, for single tokens.

Sequence n of a packed call owns the chunk slots from ``cu_seqlens[n] // C + n`` on.
"""

import triton
import triton.language as tl

DECAY_NONE, DECAY_CONSTANT, DECAY_SCALAR, DECAY_GATE = 0, 1, 2, 3
LOG_ZERO = tl.constexpr(-60.0)  # exp of less counts as zero
EPS = tl.constexpr(1e-6)  # of the l2 norm


@triton.jit
def _sequence(n, T, cu_seqlens, C: tl.constexpr):
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
def _chunk_of_slot(slot, T, cu_seqlens, sequence_of_slot, C: tl.constexpr):
    """First token of the chunk in this slot, and its number of tokens (0 in an unused slot)."""
    if cu_seqlens is not None:
        n = tl.load(sequence_of_slot + slot)
        start, length, first = _sequence(n, T, cu_seqlens, C)
        offset = (slot - first).to(tl.int32) * C
    else:
        chunks = tl.cdiv(T, C)
        start = (slot // chunks).to(tl.int64) * T
        length = T
        offset = (slot % chunks).to(tl.int32) * C
    return start + offset, tl.maximum(tl.minimum(length - offset, C), 0)


@triton.jit
def _softplus(x):
    # log1p without libdevice: exact where 1 + y rounds to 1, corrected elsewhere.
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * y / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _log_decay(
    log_decay, A_log, dt_bias, tokens, inside, head, HV: tl.constexpr, DECAY: tl.constexpr
):
    """Log decays of some tokens, zero outside."""
    if DECAY == 0:
        g = tl.where(inside, 0.0, 0.0)
    elif DECAY == 1:
        g = tl.load(log_decay + head).to(tl.float32) + tl.where(inside, 0.0, 0.0)
    else:
        g = tl.load(log_decay + tokens * HV + head, mask=inside, other=0.0).to(tl.float32)
    if DECAY == 3:
        rate = tl.exp(tl.load(A_log + head).to(tl.float32))
        g = -rate * _softplus(g + tl.load(dt_bias + head).to(tl.float32))
    return tl.where(inside, tl.maximum(g, LOG_ZERO), 0.0)


@triton.jit
def _write_strength(
    beta, tokens, inside, head, HV: tl.constexpr, SIGMOID: tl.constexpr, DOUBLE: tl.constexpr
):
    """beta of some tokens, zero outside."""
    b = tl.load(beta + tokens * HV + head, mask=inside, other=0.0).to(tl.float32)
    if SIGMOID:
        b = tl.sigmoid(b)
    if DOUBLE:
        b = 2.0 * b
    return tl.where(inside, b, 0.0)


@triton.jit
def _rows(pointer, tokens, stride, columns, inside, WIDTH: tl.constexpr):
    """[tokens, columns] of a matrix with rows `stride` apart, zero outside."""
    return tl.load(
        pointer + tokens[:, None] * stride + columns[None, :],
        mask=inside[:, None] & (columns < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _unit_rows(x):
    """Rows of length one, in x's dtype."""
    wide = x.to(tl.float32)
    return (wide * tl.rsqrt(tl.sum(wide * wide, 1) + EPS)[:, None]).to(x.dtype)


@triton.jit
def _gamma(G, C: tl.constexpr):
    """e^{G_i - G_j} for i >= j, else 0."""
    i = tl.arange(0, C)
    difference = tl.minimum(G[:, None] - G[None, :], 0.0)
    keep = (i[:, None] >= i[None, :]) & (difference > LOG_ZERO)
    return tl.where(keep, tl.exp(tl.where(keep, difference, 0.0)), 0.0)


@triton.jit
def _decay(G):
    """e^G, zero below LOG_ZERO."""
    return tl.where(G > LOG_ZERO, tl.exp(tl.maximum(G, LOG_ZERO)), 0.0)


@triton.jit
def _unit_lower_inverse(L, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 of a strictly lower triangular [C, C].

    Substitution row by row within blocks of 16. With D the inverse of the block diagonal and
    M = D (L - its diagonal blocks), the whole inverse is (I + M)^-1 D, and M^(C / 16) = 0.
    """
    BLOCKS: tl.constexpr = C // 16
    block = tl.arange(0, BLOCKS)
    r = tl.arange(0, 16)
    same = (block[:, None, None, None] == block[None, None, :, None])  # [BLOCKS, 1, BLOCKS, 1]
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
        M = tl.dot(D, rest, input_precision=PRECISION)
        # (I + M)^-1 D = D - M D + M^2 D - ..., by Horner's rule.
        inverse = D
        for _ in range(BLOCKS - 1):
            inverse = D - tl.dot(M, inverse, input_precision=PRECISION)
        D = inverse
    return D


@triton.jit(do_not_specialize=["T"])
def solve_kernel(
    k,
    beta,
    T_0,
    cu_seqlens,
    sequence_of_slot,
    T,
    stride_k,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    L2: tl.constexpr,
    SIGMOID: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T_0 [tokens, HV, C]; a program has one chunk of one key head and all its value heads."""
    slot, h = tl.program_id(0) // H, tl.program_id(0) % H
    start, count = _chunk_of_slot(slot, T, cu_seqlens, sequence_of_slot, C)
    if count == 0:
        return
    i = tl.arange(0, C)
    inside = i < count
    tokens = start + i
    keys = _rows(k + h * K, tokens, stride_k, tl.arange(0, BK), inside, K)
    if L2:
        keys = _unit_rows(keys)
    KK = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    KK = tl.where(i[:, None] > i[None, :], KK, 0.0)
    for head in range(h * (HV // H), (h + 1) * (HV // H)):
        b = _write_strength(beta, tokens, inside, head, HV, SIGMOID, DOUBLE)
        inverse = _unit_lower_inverse(KK * b[:, None], C, PRECISION)
        place = T_0 + (tokens[:, None] * HV + head) * C + i[None, :]
        tl.store(place, inverse.to(T_0.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["T"])
def scan_kernel(
    q,
    k,
    v,
    log_decay,
    beta,
    A_log,
    dt_bias,
    T_0,
    initial_state,
    cu_seqlens,
    o,
    final_state,
    states,
    v_new,
    scale,
    T,
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
    DECAY: tl.constexpr,
    L2: tl.constexpr,
    SIGMOID: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk through the chunks of one sequence and value head with S [K, BV] in registers.

    What is written depends on what is given: outputs (o), final states, the state before every
    chunk (states), V~ (v_new). T_0 None: no delta rule. v None: zero values, for the linear map of
    a stretch of tokens.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    row = tl.program_id(0) // BLOCKS
    n, head = row // HV, row % HV
    h = head // (HV // H)
    start, length, slot = _sequence(n, T, cu_seqlens, C)
    i = tl.arange(0, C)
    key = tl.arange(0, BK)
    value = tl.program_id(0) % BLOCKS * BV + tl.arange(0, BV)
    entries = key[:, None] * V + value[None, :]
    real = (key < K)[:, None] & (value < V)[None, :]
    state_row = (n.to(tl.int64) * HV + head) * K * V
    if initial_state is not None:
        S = tl.load(initial_state + state_row + entries, mask=real, other=0.0).to(tl.float32)
    else:
        S = tl.zeros([BK, BV], tl.float32)
    for chunk in range(0, tl.cdiv(length, C)):
        inside = chunk * C + i < length
        tokens = start + chunk * C + i
        if states is not None:
            place = states + ((slot + chunk) * HV + head) * K * V + entries
            tl.store(place, S.to(states.dtype.element_ty), mask=real)
        keys = _rows(k + h * K, tokens, stride_k, key, inside, K)
        if L2:
            keys = _unit_rows(keys)
        g = _log_decay(log_decay, A_log, dt_bias, tokens, inside, head, HV, DECAY)
        G, G_end = tl.cumsum(g, 0), tl.sum(g, 0)
        gamma = _gamma(G, C)
        S_low = S.to(keys.dtype)
        if v is not None:
            V_new = _rows(v + head * V, tokens, stride_v, value, inside, V)
        else:
            V_new = tl.zeros([C, BV], keys.dtype)
        if T_0 is not None:
            b = _write_strength(beta, tokens, inside, head, HV, SIGMOID, DOUBLE)
            KS = tl.dot(keys, S_low, input_precision=PRECISION)
            R = b[:, None] * (V_new.to(tl.float32) - _decay(G)[:, None] * KS)
            inverse = _rows(T_0 + head * C, tokens, HV * C, i, inside, C).to(tl.float32) * gamma
            V_new = tl.dot(inverse.to(keys.dtype), R.to(keys.dtype), input_precision=PRECISION)
            V_new = V_new.to(keys.dtype)
        here = inside[:, None] & (value < V)[None, :]
        if v_new is not None:
            place = v_new + (tokens[:, None] * HV + head) * V + value[None, :]
            tl.store(place, V_new, mask=here)
        if o is not None:
            queries = _rows(q + h * K, tokens, stride_q, key, inside, K)
            if L2:
                queries = _unit_rows(queries)
            P = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * gamma
            out = tl.dot(queries, S_low, input_precision=PRECISION) * _decay(G)[:, None]
            out += tl.dot(P.to(keys.dtype), V_new, input_precision=PRECISION)
            place = o + (tokens[:, None] * HV + head) * V + value[None, :]
            tl.store(place, (out * scale).to(o.dtype.element_ty), mask=here)
        ends = (keys.to(tl.float32) * _decay(G_end - G)[:, None]).to(keys.dtype)
        S = S * _decay(G_end) + tl.dot(tl.trans(ends), V_new, input_precision=PRECISION)
    if final_state is not None:
        tl.store(final_state + state_row + entries, S, mask=real)


@triton.jit(do_not_specialize=["T"])
def reverse_scan_kernel(
    q,
    k,
    log_decay,
    beta,
    A_log,
    dt_bias,
    T_0,
    do,
    dfinal_state,
    cu_seqlens,
    dends,
    dR,
    dinitial_state,
    scale,
    T,
    stride_q,
    stride_k,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    L2: tl.constexpr,
    SIGMOID: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk back through the chunks with dS [K, BV] in registers.

    Writes the gradient of the state after every chunk (dends; None: not wanted), dR [tokens, HV, V]
    (None: not wanted; without the delta rule it is dV) and the gradient of the initial state.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    row = tl.program_id(0) // BLOCKS
    n, head = row // HV, row % HV
    h = head // (HV // H)
    start, length, slot = _sequence(n, T, cu_seqlens, C)
    i = tl.arange(0, C)
    key = tl.arange(0, BK)
    value = tl.program_id(0) % BLOCKS * BV + tl.arange(0, BV)
    entries = key[:, None] * V + value[None, :]
    real = (key < K)[:, None] & (value < V)[None, :]
    state_row = (n.to(tl.int64) * HV + head) * K * V
    if dfinal_state is not None:
        dS = tl.load(dfinal_state + state_row + entries, mask=real, other=0.0).to(tl.float32)
    else:
        dS = tl.zeros([BK, BV], tl.float32)
    chunks = tl.cdiv(length, C)
    for step in range(0, chunks):
        chunk = chunks - 1 - step
        inside = chunk * C + i < length
        tokens = start + chunk * C + i
        if dends is not None:
            place = dends + ((slot + chunk) * HV + head) * K * V + entries
            tl.store(place, dS.to(dends.dtype.element_ty), mask=real)
        keys = _rows(k + h * K, tokens, stride_k, key, inside, K)
        queries = _rows(q + h * K, tokens, stride_q, key, inside, K)
        if L2:
            keys, queries = _unit_rows(keys), _unit_rows(queries)
        g = _log_decay(log_decay, A_log, dt_bias, tokens, inside, head, HV, DECAY)
        G, G_end = tl.cumsum(g, 0), tl.sum(g, 0)
        gamma = _gamma(G, C)
        dout = _rows(do + head * V, tokens, HV * V, value, inside, V)
        P = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * gamma * scale
        dV_new = tl.dot(tl.trans(P.to(keys.dtype)), dout, input_precision=PRECISION)
        ends = (keys.to(tl.float32) * _decay(G_end - G)[:, None]).to(keys.dtype)
        dV_new += tl.dot(ends, dS.to(keys.dtype), input_precision=PRECISION)
        decayed = (queries.to(tl.float32) * (_decay(G) * scale)[:, None]).to(keys.dtype)
        dS = dS * _decay(G_end) + tl.dot(tl.trans(decayed), dout, input_precision=PRECISION)
        if T_0 is not None:
            b = _write_strength(beta, tokens, inside, head, HV, SIGMOID, DOUBLE)
            inverse = _rows(T_0 + head * C, tokens, HV * C, i, inside, C).to(tl.float32) * gamma
            dV_new = tl.dot(
                tl.trans(inverse.to(keys.dtype)), dV_new.to(keys.dtype), input_precision=PRECISION
            )
            written = (keys.to(tl.float32) * (b * _decay(G))[:, None]).to(keys.dtype)
            dS -= tl.dot(
                tl.trans(written), dV_new.to(keys.dtype), input_precision=PRECISION
            )
        if dR is not None:
            place = dR + (tokens[:, None] * HV + head) * V + value[None, :]
            here = inside[:, None] & (value < V)[None, :]
            tl.store(place, dV_new.to(dR.dtype.element_ty), mask=here)
    if dinitial_state is not None:
        tl.store(dinitial_state + state_row + entries, dS, mask=real)


@triton.jit(do_not_specialize=["T"])
def gradient_kernel(
    q,
    k,
    v,
    log_decay,
    beta,
    A_log,
    dt_bias,
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
    dq_sum,
    dk_sum,
    scale,
    T,
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
    PRECISION: tl.constexpr,
):
    """Gradients of one chunk for one key head and the value heads that share it.

    With dL = -tril_{-1}(dR V~^T) * Gamma (the gradient of beta K K^T), dP = (dO V~^T) * Gamma (of
    Q K^T), X = dR S^T, Y = V~ dS'^T, Z = dO S^T::

        dV = beta dR          dbeta = <dR, V> - e^G <X, K> + rowsum(dL * K K^T)
        dQ = e^G Z + dP K
        dK = (beta dL + (beta dL)^T) K + dP^T Q - beta e^G X + e^{G_C - G} Y

    The gradient of G_i collects every product with e^{G_i}; that of the log decays is its sum from
    the end. dq_sum, dk_sum (float32 [tokens, H, K], or None) collect the sums over the value heads
    and let the gradient of the l2 norm, which needs whole rows, be taken at the end.
    """
    slot, h = tl.program_id(0) // H, tl.program_id(0) % H
    start, count = _chunk_of_slot(slot, T, cu_seqlens, sequence_of_slot, C)
    if count == 0:
        return
    GROUP: tl.constexpr = HV // H
    i = tl.arange(0, C)
    inside = i < count
    tokens = start + i
    lower = i[:, None] >= i[None, :]

    KK = tl.zeros([C, C], tl.float32)
    QK = tl.zeros([C, C], tl.float32)
    q_square = tl.zeros([C], tl.float32)
    k_square = tl.zeros([C], tl.float32)
    for k0 in range(0, K, BK):
        key = k0 + tl.arange(0, BK)
        keys = _rows(k + h * K, tokens, stride_k, key, inside, K)
        queries = _rows(q + h * K, tokens, stride_q, key, inside, K)
        if DELTA:
            KK = tl.dot(keys, tl.trans(keys), KK, input_precision=PRECISION)
        QK = tl.dot(queries, tl.trans(keys), QK, input_precision=PRECISION)
        if L2:
            q_square += tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 1)
            k_square += tl.sum(keys.to(tl.float32) * keys.to(tl.float32), 1)
    q_norm = tl.full([C], 1.0, tl.float32)
    k_norm = tl.full([C], 1.0, tl.float32)
    if L2:
        q_norm = tl.rsqrt(q_square + EPS)
        k_norm = tl.rsqrt(k_square + EPS)
        KK = KK * k_norm[:, None] * k_norm[None, :]
        QK = QK * q_norm[:, None] * k_norm[None, :]
    QK *= scale
    q_radial = tl.zeros([C], tl.float32)  # <dq, q> of unit rows: the norm's gradient removes it
    k_radial = tl.zeros([C], tl.float32)

    for member in range(0, GROUP):
        head = h * GROUP + member
        g = _log_decay(log_decay, A_log, dt_bias, tokens, inside, head, HV, DECAY)
        G, G_end = tl.cumsum(g, 0), tl.sum(g, 0)
        gamma = _gamma(G, C)
        decay, end_decay = _decay(G), _decay(G_end - G)
        b = tl.zeros([C], tl.float32)
        if DELTA:
            b = _write_strength(beta, tokens, inside, head, HV, SIGMOID, DOUBLE)
        dP = tl.zeros([C, C], tl.float32)
        dL = tl.zeros([C, C], tl.float32)
        db = tl.zeros([C], tl.float32)
        for v0 in range(0, V, BV):
            value = v0 + tl.arange(0, BV)
            dout = _rows(do + head * V, tokens, HV * V, value, inside, V)
            V_new = _rows(v_new + head * V, tokens, HV * V, value, inside, V)
            dP = tl.dot(dout, tl.trans(V_new), dP, input_precision=PRECISION)
            if DELTA:
                dr = _rows(dR + head * V, tokens, HV * V, value, inside, V)
                dL = tl.dot(dr, tl.trans(V_new), dL, input_precision=PRECISION)
                values = _rows(v + head * V, tokens, stride_v, value, inside, V)
                db += tl.sum(dr.to(tl.float32) * values.to(tl.float32), 1)
                place = dv + (tokens[:, None] * HV + head) * V + value[None, :]
                here = inside[:, None] & (value < V)[None, :]
                dvalues = dr.to(tl.float32) * b[:, None]
                tl.store(place, dvalues.to(dv.dtype.element_ty), mask=here)
        dP = tl.where(lower, dP * gamma, 0.0)
        E = dP * QK
        q_radial += tl.sum(E, 1)
        k_radial += tl.sum(E, 0)
        if DELTA:
            dL = tl.where(i[:, None] > i[None, :], -dL * gamma, 0.0)
            F = dL * KK
            db += tl.sum(F, 1)
            F = F * b[:, None]
            k_radial += tl.sum(F, 1) + tl.sum(F, 0)
            E += F
            dL = dL * b[:, None]
            dL = dL + tl.trans(dL)
        dG = tl.sum(E, 1) - tl.sum(E, 0)
        end = tl.sum(tl.zeros([C], tl.float32), 0)
        dP_low = (dP * scale).to(k.dtype.element_ty)
        dL_low = dL.to(k.dtype.element_ty)
        for k0 in range(0, K, BK):
            key = k0 + tl.arange(0, BK)
            keys = _rows(k + h * K, tokens, stride_k, key, inside, K)
            queries = _rows(q + h * K, tokens, stride_q, key, inside, K)
            if L2:
                keys = (keys.to(tl.float32) * k_norm[:, None]).to(keys.dtype)
                queries = (queries.to(tl.float32) * q_norm[:, None]).to(queries.dtype)
            X = tl.zeros([C, BK], tl.float32)
            Y = tl.zeros([C, BK], tl.float32)
            Z = tl.zeros([C, BK], tl.float32)
            for v0 in range(0, V, BV):
                value = v0 + tl.arange(0, BV)
                entries = key[:, None] * V + value[None, :]
                real = (key < K)[:, None] & (value < V)[None, :]
                state_row = (slot.to(tl.int64) * HV + head) * K * V
                S = tl.load(states + state_row + entries, mask=real, other=0.0)
                dS = tl.load(dends + state_row + entries, mask=real, other=0.0)
                dout = _rows(do + head * V, tokens, HV * V, value, inside, V)
                V_new = _rows(v_new + head * V, tokens, HV * V, value, inside, V)
                Z = tl.dot(dout, tl.trans(S), Z, input_precision=PRECISION)
                Y = tl.dot(V_new, tl.trans(dS), Y, input_precision=PRECISION)
                if DELTA:
                    dr = _rows(dR + head * V, tokens, HV * V, value, inside, V)
                    X = tl.dot(dr, tl.trans(S), X, input_precision=PRECISION)
                if DECAY > 0:
                    end += tl.sum(tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1), 0)
            wide_k, wide_q = keys.to(tl.float32), queries.to(tl.float32)
            q_dot = tl.sum(Z * wide_q, 1) * decay * scale
            end_dot = tl.sum(Y * wide_k, 1) * end_decay
            dG += q_dot - end_dot
            dG += tl.where(i == C - 1, tl.sum(end_dot, 0), 0.0)
            q_radial += q_dot
            k_radial += end_dot
            dqs = Z * (decay * scale)[:, None]
            dqs = tl.dot(dP_low, keys, dqs, input_precision=PRECISION)
            dks = Y * end_decay[:, None]
            dks = tl.dot(tl.trans(dP_low), queries, dks, input_precision=PRECISION)
            if DELTA:
                x_dot = tl.sum(X * wide_k, 1) * decay
                db -= x_dot
                dG -= b * x_dot
                k_radial -= b * x_dot
                dks -= X * (b * decay)[:, None]
                dks = tl.dot(dL_low, keys, dks, input_precision=PRECISION)
            place = (tokens[:, None] * H + h) * K + key[None, :]
            here = inside[:, None] & (key < K)[None, :]
            if dq_sum is None:
                tl.store(dq + place, dqs.to(dq.dtype.element_ty), mask=here)
                tl.store(dk + place, dks.to(dk.dtype.element_ty), mask=here)
            else:
                if member > 0:
                    dqs += tl.load(dq_sum + place, mask=here, other=0.0)
                    dks += tl.load(dk_sum + place, mask=here, other=0.0)
                tl.store(dq_sum + place, dqs, mask=here)
                tl.store(dk_sum + place, dks, mask=here)
        if dq_sum is not None:
            tl.debug_barrier()  # the sums are read again below, maybe by other threads
        if DECAY > 0:
            dG += tl.where(i == C - 1, end * _decay(G_end), 0.0)
            dg = tl.where(inside & (g > LOG_ZERO), tl.cumsum(dG, 0, reverse=True), 0.0)
            if DECAY == 3:
                tl.store(dA_log + slot.to(tl.int64) * HV + head, tl.sum(dg * g, 0))
                raw = tl.load(log_decay + tokens * HV + head, mask=inside, other=0.0)
                bias = tl.load(dt_bias + head).to(tl.float32)
                rate = tl.exp(tl.load(A_log + head).to(tl.float32))
                dg = -rate * dg * tl.sigmoid(raw.to(tl.float32) + bias)
            tl.store(dlog_decay + tokens * HV + head, dg, mask=inside)
        if DELTA:
            if SIGMOID:
                largest: tl.constexpr = 2.0 if DOUBLE else 1.0
                db = db * b * (1.0 - b / largest)
            elif DOUBLE:
                db = 2.0 * db
            tl.store(dbeta + tokens * HV + head, db, mask=inside)

    if dq_sum is not None:
        for k0 in range(0, K, BK):
            key = k0 + tl.arange(0, BK)
            place = (tokens[:, None] * H + h) * K + key[None, :]
            here = inside[:, None] & (key < K)[None, :]
            dqs = tl.load(dq_sum + place, mask=here, other=0.0)
            dks = tl.load(dk_sum + place, mask=here, other=0.0)
            if L2:
                keys = _rows(k + h * K, tokens, stride_k, key, inside, K).to(tl.float32)
                queries = _rows(q + h * K, tokens, stride_q, key, inside, K).to(tl.float32)
                dqs = q_norm[:, None] * (dqs - queries * (q_norm * q_radial)[:, None])
                dks = k_norm[:, None] * (dks - keys * (k_norm * k_radial)[:, None])
            tl.store(dq + place, dqs.to(dq.dtype.element_ty), mask=here)
            tl.store(dk + place, dks.to(dk.dtype.element_ty), mask=here)


@triton.jit
def step_kernel(
    q,
    k,
    v,
    log_decay,
    beta,
    A_log,
    dt_bias,
    state,
    o,
    new_state,
    scale,
    stride_q,
    stride_k,
    stride_v,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    L2: tl.constexpr,
    SIGMOID: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """One token per sequence; new_state may be state itself."""
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    row = tl.program_id(0) // BLOCKS
    n, head = (row // HV).to(tl.int64), row % HV
    h = head // (HV // H)
    key = tl.arange(0, BK)
    value = tl.program_id(0) % BLOCKS * BV + tl.arange(0, BV)
    entries = (n * HV + head) * K * V + key[:, None] * V + value[None, :]
    real = (key < K)[:, None] & (value < V)[None, :]
    keys = tl.load(k + n * stride_k + h * K + key, mask=key < K, other=0.0).to(tl.float32)
    queries = tl.load(q + n * stride_q + h * K + key, mask=key < K, other=0.0).to(tl.float32)
    values = tl.load(v + n * stride_v + head * V + value, mask=value < V, other=0.0)
    values = values.to(tl.float32)
    if L2:
        keys *= tl.rsqrt(tl.sum(keys * keys, 0) + EPS)
        queries *= tl.rsqrt(tl.sum(queries * queries, 0) + EPS)
    inside = n >= 0
    if state is not None:
        S = tl.load(state + entries, mask=real, other=0.0).to(tl.float32)
    else:
        S = tl.zeros([BK, BV], tl.float32)
    S *= tl.exp(_log_decay(log_decay, A_log, dt_bias, n, inside, head, HV, DECAY))
    if DELTA:
        b = _write_strength(beta, n, inside, head, HV, SIGMOID, DOUBLE)
        values = b * (values - tl.sum(S * keys[:, None], 0))
    S += keys[:, None] * values[None, :]
    tl.store(new_state + entries, S, mask=real)
    out = tl.sum(S * queries[:, None], 0) * scale
    place = o + (n * HV + head) * V + value
    tl.store(place, out.to(o.dtype.element_ty), mask=value < V)
