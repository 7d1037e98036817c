"""Triton kernels of the linear recurrence in chunks of C tokens: what the scans need, the scans.

One value head; rows are tokens, q scaled, G the sum of log decays within the chunk::

    Gamma_ij = e^{G_i - G_j} for i >= j          T_0 = (I + tril_{-1}(diag(beta) K K^T))^-1
    R  = beta (V - e^G (K S))                    V~ = (T_0 * Gamma) R
    O  = e^G (Q S) + (Q K^T * Gamma) V~          S' = e^{G_C} S + (e^{G_C - G} K)^T V~

T_0 does not know the decays, so ``T_0 * Gamma`` is all that is needed of the gated inverse, and
the matrices U and W of the UT transform (Yang et al. 2024, arXiv 2412.06464) never exist. Without
the delta rule V~ = V. Backwards, with dS' given::

    dV~ = (Q K^T * Gamma)^T dO + (e^{G_C - G} K) dS'        dR = (T_0 * Gamma)^T dV~
    dS  = e^{G_C} dS' + (e^G Q)^T dO - (beta e^G K)^T dR

`prepare_kernel` writes both gated matrices for all chunks at once, so that the serial scans hold
neither decays nor options; `scan_kernel` walks through the chunks of a sequence with a tile of S in
registers and writes outputs, or what the backward pass needs; `reverse_scan_kernel` walks back and
writes dS' and dR. The gradients of every chunk follow from these: see triton_gradients.py.
"""

import triton
import triton.language as tl

from memlm.cuda.linear_recurrence.triton_tiles import (
    chunk_of_slot,
    decay_matrix,
    decay_of,
    load_rows,
    load_state,
    log_decays,
    row_scale,
    sequence,
    store_rows,
    store_state,
    unit_lower_inverse,
    write_strengths,
)


@triton.jit(do_not_specialize=["T", "plane", "norm_plane"])
def prepare_kernel(
    q,
    k,
    log_decay,
    beta,
    A_log,
    dt_bias,
    cu_seqlens,
    sequence_of_slot,
    inverse,
    scores,
    factors,
    norms,
    scale,
    T,
    plane,
    norm_plane,
    stride_q,
    stride_k,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    L2: tl.constexpr,
    SIGMOID: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """What the scans multiply with, for one chunk of one key head and all its value heads.

    inverse (None: not wanted) and scores [tokens, HV, C]: T_0 * Gamma and Q K^T * Gamma. factors
    [5, tokens, HV]: beta, beta e^G / |k|, e^{G_C - G} / |k|, e^G scale / |q|, e^{G_C}; the lengths
    are one unless L2. norms [2, tokens, H] (None: not wanted): 1 / |q|, 1 / |k|. So the serial
    scans hold no decays, norms or options.
    """
    plane = plane.to(tl.int64)
    slot, h = tl.program_id(0) // H, tl.program_id(0) % H
    first, count = chunk_of_slot(slot, T, cu_seqlens, sequence_of_slot, C)
    if count == 0:
        return
    i = tl.arange(0, C)
    inside = i < count
    key = tl.arange(0, BK)
    keys = load_rows(k + h * K, first, stride_k, i, key, inside, K)
    queries = load_rows(q + h * K, first, stride_q, i, key, inside, K)
    k_scale = row_scale(keys, L2)
    q_scale = row_scale(queries, L2)
    if norms is not None:
        place = norms + first * H + h + i * H
        tl.store(place, q_scale, mask=inside)
        tl.store(place + norm_plane, k_scale, mask=inside)
    q_scale *= scale
    KK = tl.zeros([C, C], tl.float32)
    if DELTA:
        KK = tl.dot(keys, tl.trans(keys), KK)
        KK = tl.where(i[:, None] > i[None, :], KK * k_scale[:, None] * k_scale[None, :], 0.0)
    QK = tl.dot(queries, tl.trans(keys))
    QK = QK * q_scale[:, None] * k_scale[None, :]
    for head in range(h * (HV // H), (h + 1) * (HV // H)):
        g = log_decays(log_decay, A_log, dt_bias, first, i, inside, head, HV, DECAY)
        G, G_end = tl.cumsum(g, 0), tl.sum(g, 0)
        gamma = decay_matrix(G, C)
        store_rows(scores + head * C, first, HV * C, i, i, inside, QK * gamma, C)
        place = factors + first * HV + head + i * HV
        decay = decay_of(G)
        if DELTA:
            b = write_strengths(beta, first, i, inside, head, HV, SIGMOID, DOUBLE)
            tl.store(place, b, mask=inside)
            tl.store(place + plane, b * decay * k_scale, mask=inside)
            if inverse is not None:
                T_0 = unit_lower_inverse(KK * b[:, None], C)
                store_rows(inverse + head * C, first, HV * C, i, i, inside, T_0 * gamma, C)
        tl.store(place + 2 * plane, decay_of(G_end - G) * k_scale, mask=inside)
        tl.store(place + 3 * plane, decay * q_scale, mask=inside)
        whole = tl.where(inside, decay_of(G_end), 0.0)
        tl.store(place + 4 * plane, whole, mask=inside)


@triton.jit(do_not_specialize=["T", "plane"])
def scan_kernel(
    q,
    k,
    v,
    inverse,
    scores,
    factors,
    initial_state,
    cu_seqlens,
    o,
    final_state,
    states,
    v_new,
    T,
    plane,
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
    CHUNKS_PER_STATE: tl.constexpr,
):
    """Walk through the chunks of one sequence and value head with S [K, BV] in registers.

    What is written depends on what is given: outputs (o), final states, the state before every
    CHUNKS_PER_STATE chunks (states), V~ (v_new). inverse None: no delta rule. v None: zero values,
    for the linear map of a stretch of tokens.
    """
    plane = plane.to(tl.int64)
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    row = tl.program_id(0) // BLOCKS
    n, head = row // HV, row % HV
    h = head // (HV // H)
    start, length, state_slot = sequence(n, T, cu_seqlens, C * CHUNKS_PER_STATE)
    i = tl.arange(0, C)
    key = tl.arange(0, BK)
    value = tl.program_id(0) % BLOCKS * BV + tl.arange(0, BV)
    state_place = n.to(tl.int64) * HV + head
    if initial_state is not None:
        S = load_state(initial_state, state_place, key, value, K, V).to(tl.float32)
    else:
        S = tl.zeros([BK, BV], tl.float32)
    for chunk in range(0, tl.cdiv(length, C)):
        inside = chunk * C + i < length
        first = start + chunk * C
        if states is not None and chunk % CHUNKS_PER_STATE == 0:
            place = (state_slot + chunk // CHUNKS_PER_STATE) * HV + head
            store_state(states, place, key, value, S, K, V)
        factor = factors + first * HV + head
        keys = load_rows(k + h * K, first, stride_k, i, key, inside, K)
        S_low = S.to(keys.dtype)
        if v is not None:
            V_new = load_rows(v + head * V, first, stride_v, i, value, inside, V)
        else:
            V_new = tl.zeros([C, BV], keys.dtype)
        if inverse is not None:
            b = tl.load(factor + i * HV, mask=inside, other=0.0)
            taken = tl.load(factor + plane + i * HV, mask=inside, other=0.0)
            KS = tl.dot(keys, S_low)
            R = b[:, None] * V_new.to(tl.float32) - taken[:, None] * KS
            solved = load_rows(inverse + head * C, first, HV * C, i, i, inside, C)
            V_new = tl.dot(solved, R.to(keys.dtype)).to(keys.dtype)
        if v_new is not None:
            store_rows(v_new + head * V, first, HV * V, i, value, inside, V_new, V)
        if o is not None:
            read = tl.load(factor + 3 * plane + i * HV, mask=inside, other=0.0)
            queries = load_rows(q + h * K, first, stride_q, i, key, inside, K)
            P = load_rows(scores + head * C, first, HV * C, i, i, inside, C)
            out = tl.dot(queries, S_low) * read[:, None]
            out = tl.dot(P, V_new, out)
            store_rows(o + head * V, first, HV * V, i, value, inside, out, V)
        # The scales of keys are put on the narrower values.
        kept = tl.load(factor + 2 * plane + i * HV, mask=inside, other=0.0)
        ends = (V_new.to(tl.float32) * kept[:, None]).to(keys.dtype)
        S = S * tl.load(factor + 4 * plane)
        S = tl.dot(tl.trans(keys), ends, S)
    if final_state is not None:
        store_state(final_state, state_place, key, value, S, K, V)


@triton.jit(do_not_specialize=["T", "plane"])
def reverse_scan_kernel(
    q,
    k,
    inverse,
    scores,
    factors,
    do,
    dfinal_state,
    cu_seqlens,
    dends,
    dR,
    dinitial_state,
    T,
    plane,
    stride_q,
    stride_k,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Walk back through the chunks with dS [K, BV] in registers.

    Writes the gradient of the state after every chunk (dends; None: not wanted), dR [tokens, HV, V]
    (None: not wanted; without the delta rule it is dV) and the gradient of the initial state.
    """
    plane = plane.to(tl.int64)
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    row = tl.program_id(0) // BLOCKS
    n, head = row // HV, row % HV
    h = head // (HV // H)
    start, length, slot = sequence(n, T, cu_seqlens, C)
    i = tl.arange(0, C)
    key = tl.arange(0, BK)
    value = tl.program_id(0) % BLOCKS * BV + tl.arange(0, BV)
    state_place = n.to(tl.int64) * HV + head
    if dfinal_state is not None:
        dS = load_state(dfinal_state, state_place, key, value, K, V).to(tl.float32)
    else:
        dS = tl.zeros([BK, BV], tl.float32)
    chunks = tl.cdiv(length, C)
    for step in range(0, chunks):
        chunk = chunks - 1 - step
        inside = chunk * C + i < length
        first = start + chunk * C
        if dends is not None:
            store_state(dends, (slot + chunk) * HV + head, key, value, dS, K, V)
        factor = factors + first * HV + head
        kept = tl.load(factor + 2 * plane + i * HV, mask=inside, other=0.0)
        read = tl.load(factor + 3 * plane + i * HV, mask=inside, other=0.0)
        keys = load_rows(k + h * K, first, stride_k, i, key, inside, K)
        queries = load_rows(q + h * K, first, stride_q, i, key, inside, K)
        dout = load_rows(do + head * V, first, HV * V, i, value, inside, V)
        P = load_rows(scores + head * C, first, HV * C, i, i, inside, C)
        dV_new = tl.dot(keys, dS.to(keys.dtype)) * kept[:, None]
        dV_new = tl.dot(tl.trans(P), dout, dV_new)
        # The scales of keys and queries are put on the narrower values.
        shown = (dout.to(tl.float32) * read[:, None]).to(keys.dtype)
        dS = dS * tl.load(factor + 4 * plane)
        dS = tl.dot(tl.trans(queries), shown, dS)
        if inverse is not None:
            taken = tl.load(factor + plane + i * HV, mask=inside, other=0.0)
            solved = load_rows(inverse + head * C, first, HV * C, i, i, inside, C)
            dV_new = tl.dot(tl.trans(solved), dV_new.to(keys.dtype))
            taken = (dV_new * -taken[:, None]).to(keys.dtype)
            dS = tl.dot(tl.trans(keys), taken, dS)
        if dR is not None:
            store_rows(dR + head * V, first, HV * V, i, value, inside, dV_new, V)
    if dinitial_state is not None:
        store_state(dinitial_state, state_place, key, value, dS, K, V)
