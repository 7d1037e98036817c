"""Runs of tokens of a linear recurrence, for any state before them.

Both recurrences are affine in the state S before a run::

    o_t   = output_t + (what token t reads of S)
    S_out = (transition of) S + addend

so a run can be worked through before S is known: what was read of S is added afterwards. The
transition of the delta rule is what the recurrence itself makes of the unit matrix where nothing is
written (v = 0): its outputs are then the queries as S sees them, its final state the transition.
"""

import dataclasses

import torch
from torch import Tensor

from memlm.cuda.diagonal_scan import diagonal_scan
from memlm.cuda.linear_recurrence import linear_recurrence
from memlm.cuda.linear_recurrence.gates import LOG_ZERO, token_gates
from memlm.cuda.linear_recurrence.inputs import Inputs
from memlm.cuda.linear_recurrence.reference import L2_NORM_EPS


@dataclasses.dataclass(frozen=True)
class RecurrenceMap:
    """N runs of tokens; T, HV, K, V and D as in `linear_recurrence` and `diagonal_scan`.

    Attributes:
        output: what the tokens read where the state before the run is zero, ``[B, T, HV, V]`` or
            ``[B, T, D]``.
        reads: what a token reads of the state S before its run: ``S^T reads_t`` with
            ``[B, T, HV, K]``, or ``reads_t * S`` with ``[B, T, D]``.
        transition: of S, in the dtype of states: a matrix ``[N, HV, K, K]`` with the delta rule, a
            factor ``[N, HV]`` without, factors ``[N, D]`` of a diagonal scan.
        addend: the final state where the state before is zero, ``[N, HV, K, V]`` or ``[N, D]``.
    """

    output: Tensor
    reads: Tensor
    transition: Tensor
    addend: Tensor


def linear_recurrence_map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> RecurrenceMap:
    """The sequences of a call of `linear_recurrence` as maps of their initial states.

    Costs that call, and with the delta rule a second one whose values have K channels. Without the
    delta rule a state only fades, and the second call is a cumulative sum of log decays. Gradients
    flow through all four results.

    Arguments and errors are those of `linear_recurrence`.
    """
    gates = {
        "log_decay": log_decay,
        "beta": beta,
        "scale": scale,
        "cu_seqlens": cu_seqlens,
        "return_state": True,
        "qk_l2norm": qk_l2norm,
        "beta_sigmoid": beta_sigmoid,
        "allow_neg_eigval": allow_neg_eigval,
        "A_log": A_log,
        "dt_bias": dt_bias,
    }
    output, addend = linear_recurrence(q, k, v, **gates)
    if beta is None:
        inputs = Inputs(
            q,
            k,
            v,
            log_decay,
            None,
            None,
            cu_seqlens,
            A_log,
            dt_bias,
            q.shape[-1] ** -0.5 if scale is None else scale,
            qk_l2norm,
        )
        return RecurrenceMap(output, *_fading(inputs), addend)
    N, HV, K, _ = addend.shape
    unit = torch.eye(K, dtype=addend.dtype, device=v.device).expand(N, HV, K, K).contiguous()
    nothing = v.new_zeros(*v.shape[:3], K)
    reads, transition = linear_recurrence(q, k, nothing, initial_state=unit, **gates)
    return RecurrenceMap(output, reads, transition, addend)


def diagonal_scan_map(a: Tensor, b: Tensor, cu_seqlens: Tensor | None = None) -> RecurrenceMap:
    """The sequences of a call of `diagonal_scan` as maps of their initial states.

    Costs two such calls, the second for the products of a. Arguments and errors are those of
    `diagonal_scan`.
    """
    output, addend = diagonal_scan(a, b, None, cu_seqlens, return_state=True)
    nothing = torch.zeros_like(b, dtype=addend.dtype)
    reads, transition = diagonal_scan(
        a, nothing, torch.ones_like(addend), cu_seqlens, return_state=True
    )
    return RecurrenceMap(output, reads, transition, addend)


def _fading(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`reads` and `transition` of an additive recurrence."""
    B, T, H, HV, _, _ = inputs.sizes
    dtype = inputs.state_dtype
    queries = inputs.q.to(dtype)
    if inputs.qk_l2norm:
        length = queries.square().sum(-1, keepdim=True) + L2_NORM_EPS
        queries = queries * length.rsqrt()
    queries = inputs.scale * queries.repeat_interleave(HV // H, dim=2)
    log_decay, _ = token_gates(inputs)
    if log_decay is None:
        transition = queries.new_ones(inputs.sequences, HV)
        return queries.to(inputs.v.dtype), transition
    # Differences of long sums: float32 would lose digits of the log decays.
    total = log_decay.view(B, T, HV).double().cumsum(1)
    if inputs.cu_seqlens is None:
        until = total
        whole = total[:, -1] if T else total.new_zeros(B, HV)
    else:
        bounds = inputs.cu_seqlens.long()
        total = torch.cat([total.new_zeros(1, HV), total.squeeze(0)])
        before, whole = total[bounds[:-1]], total[bounds].diff(dim=0)
        sequence = torch.repeat_interleave(bounds.diff(), output_size=T)
        until = (total[1:] - before[sequence]).unsqueeze(0)
    reads = queries * _exp(until).to(dtype).unsqueeze(-1)
    return reads.to(inputs.v.dtype), _exp(whole).to(dtype)


def _exp(x: Tensor) -> Tensor:
    """exp, zero where the recurrence takes it for zero."""
    return x.exp().masked_fill(x < LOG_ZERO, 0.0)
