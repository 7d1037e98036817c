"""Linear recurrences with a matrix state: gated delta rule, delta rule, retention, plain additive.

Per value head, with the state ``S`` of shape ``[K, V]`` (Yang et al., "Gated Delta Networks",
arXiv 2412.06464)::

    S <- exp(log_decay_t) S
    S <- S + beta_t k_t (v_t - S^T k_t)^T        # beta given: the delta rule on the decayed state
    S <- S + k_t v_t^T                           # beta None: plain additive
    o_t = scale S^T q_t                          # read after the write
"""

import torch
from torch import Tensor

from memlm.cuda.dispatch import choose
from memlm.cuda.linear_recurrence.eager import linear_recurrence_eager
from memlm.cuda.linear_recurrence.reference import linear_recurrence_reference

__all__ = ["linear_recurrence"]

IMPLEMENTATIONS = {"reference": linear_recurrence_reference, "eager": linear_recurrence_eager}


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run the recurrence over a batch of sequences.

    Args:
        q, k: ``[B, T, H, K]``. Value head ``j`` uses query and key head ``j // (HV // H)``.
        v: ``[B, T, HV, V]`` with ``HV`` a multiple of ``H``.
        log_decay: natural log of the decay, at most zero: None (no decay), ``[HV]`` (constant) or
            ``[B, T, HV]``. Values below -60 count as -60.
        beta: write strength ``[B, T, HV]``, or None for the plain additive recurrence.
        scale: of the queries, default ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]``, default zeros.
        cu_seqlens: int ``[N + 1]``, boundaries of the sequences packed along T (then ``B == 1``);
            empty sequences are allowed. None: one sequence per row, ``N == B``.
        return_state: whether to return the final state.

    Returns:
        o ``[B, T, HV, V]`` in v's dtype, and the final state ``[N, HV, K, V]`` (float32; float64 if
        v is float64) or None. Gradients flow through both.

    Raises:
        ValueError: shapes that do not fit together.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    _check_shapes(q, k, v, log_decay, beta, cu_seqlens)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if cu_seqlens is None:
        lengths = torch.full((B,), T, dtype=torch.int64, device=q.device)
    else:
        lengths = cu_seqlens.diff().to(torch.int64)
    N = len(lengths)
    state = initial_state
    if state is None:
        state = q.new_zeros(N, HV, K, V, dtype=dtype)
    elif state.shape != (N, HV, K, V):
        raise ValueError(f"initial_state is {tuple(state.shape)}, expected {(N, HV, K, V)}")
    if log_decay is not None:
        log_decay = log_decay.to(dtype).expand(B, T, HV).reshape(B * T, HV)
    if beta is not None:
        beta = beta.to(dtype).reshape(B * T, HV)
    q, k = (
        x.to(dtype).repeat_interleave(HV // H, dim=2) if H != HV else x.to(dtype) for x in (q, k)
    )
    run = choose("linear_recurrence", IMPLEMENTATIONS)
    with torch.autocast(q.device.type, enabled=False):  # the state and its updates stay float32
        o, state = run(
            q.reshape(B * T, HV, K),
            k.reshape(B * T, HV, K),
            v.to(dtype).reshape(B * T, HV, V),
            log_decay,
            beta,
            K**-0.5 if scale is None else scale,
            state.to(dtype),
            lengths,
        )
    return o.view(B, T, HV, V).to(v.dtype), state if return_state else None


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    B, T, H = q.shape[:3]
    HV = v.shape[2]
    if k.shape != q.shape:
        raise ValueError(f"q is {tuple(q.shape)} but k is {tuple(k.shape)}")
    if v.shape[:2] != (B, T) or HV % H:
        raise ValueError(
            f"v is {tuple(v.shape)}: expected [{B}, {T}, HV, V] with HV a multiple of {H}"
        )
    if log_decay is not None and log_decay.shape not in ((HV,), (B, T, HV)):
        raise ValueError(f"log_decay is {tuple(log_decay.shape)}: expected {(HV,)} or {(B, T, HV)}")
    if beta is not None and beta.shape != (B, T, HV):
        raise ValueError(f"beta is {tuple(beta.shape)}: expected {(B, T, HV)}")
    if cu_seqlens is not None and (B != 1 or int(cu_seqlens[-1]) != T):
        raise ValueError(
            f"cu_seqlens needs one row with all its tokens: it ends at {int(cu_seqlens[-1])}, "
            f"q has {B} rows of {T} tokens"
        )
