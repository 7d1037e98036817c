"""The recurrence itself, for single tokens: a Triton kernel and its launch."""

import triton
import triton.language as tl
from torch import Tensor

from memlm.cuda.linear_recurrence.triton_problem import Problem, step_config
from memlm.cuda.linear_recurrence.triton_tiles import (
    EPS,
    log_decays,
    write_strengths,
)


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
    S *= tl.exp(log_decays(log_decay, A_log, dt_bias, n, 0, inside, head, HV, DECAY))
    if DELTA:
        b = write_strengths(beta, n, 0, inside, head, HV, SIGMOID, DOUBLE)
        values = b * (values - tl.sum(S * keys[:, None], 0))
    S += keys[:, None] * values[None, :]
    tl.store(new_state + entries, S, mask=real)
    out = tl.sum(S * queries[:, None], 0) * scale
    place = o + (n * HV + head) * V + value
    tl.store(place, out.to(o.dtype.element_ty), mask=value < V)


def step(problem: Problem, state: Tensor | None, o: Tensor, new_state: Tensor) -> Tensor:
    """One token per row; new_state may be `state` itself. Returns o [B, 1, HV, V]."""
    inputs = problem.inputs
    B, _, H, HV, K, V = inputs.sizes
    config = step_config(K, V)
    if B:
        step_kernel[(B * HV * triton.cdiv(V, config.BV),)](
            problem.q,
            problem.k,
            problem.v,
            problem.log_decay,
            problem.beta,
            inputs.A_log,
            inputs.dt_bias,
            state,
            o,
            new_state,
            inputs.scale,
            problem.q.stride(0),
            problem.k.stride(0),
            problem.v.stride(0),
            H=H,
            HV=HV,
            K=K,
            V=V,
            BK=config.BK,
            BV=config.BV,
            DELTA=inputs.beta is not None,
            DECAY=problem.decay,
            **problem.switches,
            **config.launch,
        )
    return o
