"""Linear recurrences with a matrix state: gated delta rule, delta rule, retention, plain additive.

Per value head, with the state ``S`` of shape ``[K, V]`` (Yang et al., "Gated Delta Networks",
arXiv 2412.06464)::

    S <- exp(log_decay_t) S
    S <- S + beta_t k_t (v_t - S^T k_t)^T        # beta given: the delta rule on the decayed state
    S <- S + k_t v_t^T                           # beta None: plain additive
    o_t = scale S^T q_t                          # read after the write
"""

from torch import Tensor

from memlm.cuda.dispatch import choose_name
from memlm.cuda.linear_recurrence import operator
from memlm.cuda.linear_recurrence.inputs import CHUNK, Inputs, first_chunk_slots
from memlm.cuda.linear_recurrence.reference import linear_recurrence_reference

__all__ = ["CHUNK", "first_chunk_slots", "linear_recurrence", "linear_recurrence_step"]


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
    return_chunk_states: bool = False,
    *,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """Run the recurrence over a batch of sequences.

    Args:
        q, k: ``[B, T, H, K]``. Value head ``j`` uses query and key head ``j // (HV // H)``.
        v: ``[B, T, HV, V]`` with ``HV`` a multiple of ``H``.
        log_decay: natural log of the decay, at most zero: None (no decay), ``[HV]`` (constant) or
            ``[B, T, HV]``; the raw gate ``[B, T, HV]`` where A_log and dt_bias are given. Values
            below -60 count as -60.
        beta: write strength ``[B, T, HV]``, or None for the plain additive recurrence.
        scale: of the queries, default ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]``, default zeros.
        cu_seqlens: int ``[N + 1]``, boundaries of the sequences packed along T (then ``B == 1``);
            empty sequences are allowed. None: one sequence per row, ``N == B``.
        return_state: whether to return the final state.
        return_chunk_states: whether to return the states at chunk boundaries as well, without
            gradient: what a prefix cache keeps.
        qk_l2norm: divide queries and keys by their length, ``x rsqrt(sum x^2 + 1e-6)``.
        beta_sigmoid: beta is given before the sigmoid.
        allow_neg_eigval: double beta (after the sigmoid), so that a key's old value can be negated.
        A_log, dt_bias: ``[HV]``; the log decay is ``-exp(A_log) softplus(log_decay + dt_bias)``.

    Returns:
        o ``[B, T, HV, V]`` in v's dtype, and the final state ``[N, HV, K, V]`` (float32; float64 if
        v is float64) or None. Gradients flow through both.
        With return_chunk_states also the state before token ``CHUNK * i`` of every sequence, in
        the state's dtype: ``[B, ceil(T / CHUNK), HV, K, V]``; for packed sequences
        ``[1, T // CHUNK + N, HV, K, V]``, where those of sequence n begin at
        ``first_chunk_slots(cu_seqlens)[n]`` and slots of no sequence are zero.

    Raises:
        ValueError: shapes or options that do not fit together.
    """
    inputs = Inputs(
        q,
        k,
        v,
        log_decay,
        beta,
        initial_state,
        cu_seqlens,
        A_log,
        dt_bias,
        q.shape[-1] ** -0.5 if scale is None else scale,
        qk_l2norm,
        beta_sigmoid,
        allow_neg_eigval,
    )
    inputs.check()
    name = choose_name("linear_recurrence", operator.refusals(inputs), q.device)
    if name == "reference":
        o, state, chunk_states = linear_recurrence_reference(inputs)
    else:
        o, state, chunk_states = operator.run(name, inputs, return_chunk_states)
    found = (o, state if return_state else None)
    return (*found, chunk_states.detach()) if return_chunk_states else found


def linear_recurrence_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float | None = None,
    *,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Tensor:
    """One token of every row in decoding, with the state overwritten in place; no gradient.

    Args:
        q, k, v, log_decay, beta, scale, options: as of `linear_recurrence`, with ``T == 1``.
        state: ``[B, HV, K, V]``, float32 (float64 if v is float64) and contiguous.

    Returns:
        o ``[B, 1, HV, V]`` in v's dtype.

    Raises:
        ValueError: shapes that do not fit together, more than one token, or a state of another
            dtype or layout.
    """
    inputs = Inputs(
        q,
        k,
        v,
        log_decay,
        beta,
        state,
        None,
        A_log,
        dt_bias,
        q.shape[-1] ** -0.5 if scale is None else scale,
        qk_l2norm,
        beta_sigmoid,
        allow_neg_eigval,
    )
    inputs.check()
    if q.shape[1] != 1:
        raise ValueError(f"linear_recurrence_step takes one token per row, q has {q.shape[1]}")
    if state.dtype != inputs.state_dtype or not state.is_contiguous():
        raise ValueError(
            f"the state must be contiguous {inputs.state_dtype} to be overwritten, "
            f"it is {state.dtype} with strides {state.stride()}"
        )
    refusals = {**operator.refusals(inputs), "reference": "it never works in place"}
    name = choose_name("linear_recurrence_step", refusals, q.device)
    options = (inputs.scale, qk_l2norm, beta_sigmoid, allow_neg_eigval)
    return operator.step(q, k, v, log_decay, beta, state, A_log, dt_bias, *options, name)
