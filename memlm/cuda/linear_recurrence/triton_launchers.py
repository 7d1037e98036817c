"""Launches of the chunk kernels, with the buffers they write.

Nothing here reads a number back from the device, and nothing is compiled anew for another length
or number of sequences.
"""

import dataclasses

import torch
import triton
from torch import Tensor

from memlm.cuda.linear_recurrence.inputs import CHUNK
from memlm.cuda.linear_recurrence.triton_gradients import gradient_kernel, unit_gradient_kernel
from memlm.cuda.linear_recurrence.triton_kernels import (
    prepare_kernel,
    reverse_scan_kernel,
    scan_kernel,
)
from memlm.cuda.linear_recurrence.triton_problem import (
    Problem,
    gradient_config,
    prepare_config,
    scan_config,
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the scans multiply with: see `prepare_kernel`."""

    inverse: Tensor | None
    scores: Tensor
    factors: Tensor
    norms: Tensor | None

    @classmethod
    def of(cls, problem: Problem, inverse: Tensor | None = None) -> "Prepared":
        """Computed anew; an inverse that was kept is taken as it is."""
        inputs = problem.inputs
        B, T, H, HV, K, _ = inputs.sizes
        delta = inputs.beta is not None
        config = prepare_config(K, problem.target, delta)
        solve = delta and inverse is None
        if solve:
            inverse = problem.empty(B, T, HV, problem.chunk)
        scores = problem.empty(B, T, HV, problem.chunk)
        factors = problem.empty(5, B * T, HV, dtype=torch.float32)
        norms = problem.empty(2, B * T, H, dtype=torch.float32) if inputs.qk_l2norm else None
        if problem.slots:
            prepare_kernel[(problem.slots * H,)](
                problem.q,
                problem.k,
                problem.log_decay,
                problem.beta,
                inputs.A_log,
                inputs.dt_bias,
                problem.cu_seqlens,
                problem.sequence_of_slot,
                inverse if solve else None,
                scores,
                factors,
                norms,
                inputs.scale,
                problem.length,
                B * T * HV,
                B * T * H,
                problem.q.stride(1),
                problem.k.stride(1),
                H=H,
                HV=HV,
                K=K,
                C=problem.chunk,
                BK=config.BK,
                DELTA=delta,
                DECAY=problem.decay,
                **problem.switches,
                **config.launch,
            )
        return cls(inverse, scores, factors, norms)


def scan(
    problem: Problem,
    prepared: Prepared,
    initial_state: Tensor | None,
    o: Tensor | None = None,
    states: Tensor | None = None,
    v_new: Tensor | None = None,
    final: bool = True,
    zero_values: bool = False,
    dense_states: bool = False,
) -> Tensor | None:
    """Walk forward; returns the final states [sequences, HV, K, V] if `final`.

    `states` takes the state before every CHUNK tokens, with `dense_states` before every chunk.

    With `zero_values` the values are zero and K wide: from the identity, the final states are then
    the linear maps of the sequences.
    """
    _, _, _, HV, K, V = problem.inputs.sizes
    V = K if zero_values else V
    config = scan_config(K, V, problem.target)
    state = problem.empty(problem.sequences, HV, K, V, dtype=torch.float32) if final else None
    if problem.sequences:
        scan_kernel[(problem.sequences * HV * triton.cdiv(V, config.BV),)](
            problem.q,
            problem.k,
            None if zero_values else problem.v,
            prepared.inverse,
            prepared.scores,
            prepared.factors,
            None if initial_state is None else initial_state.contiguous(),
            problem.cu_seqlens,
            o,
            state,
            states,
            v_new,
            problem.length,
            prepared.factors.stride(0),
            problem.q.stride(1),
            problem.k.stride(1),
            problem.v.stride(1),
            **problem.shape | {"V": V},
            CHUNKS_PER_STATE=1 if dense_states else CHUNK // problem.chunk,
            BK=config.BK,
            BV=config.BV,
            **config.launch,
        )
    return state


def reverse_scan(
    problem: Problem,
    prepared: Prepared,
    do: Tensor,
    dfinal_state: Tensor | None,
    dends: Tensor | None = None,
    dR: Tensor | None = None,
) -> Tensor:
    """Walk back; returns the gradient of the initial states [sequences, HV, K, V]."""
    _, _, _, HV, K, V = problem.inputs.sizes
    config = scan_config(K, V, problem.target, reverse=True)
    dinitial = problem.empty(problem.sequences, HV, K, V, dtype=torch.float32)
    if problem.sequences:
        reverse_scan_kernel[(problem.sequences * HV * triton.cdiv(V, config.BV),)](
            problem.q,
            problem.k,
            prepared.inverse,
            prepared.scores,
            prepared.factors,
            do,
            dfinal_state,
            problem.cu_seqlens,
            dends,
            dR,
            dinitial,
            problem.length,
            prepared.factors.stride(0),
            problem.q.stride(1),
            problem.k.stride(1),
            **problem.shape,
            BK=config.BK,
            BV=config.BV,
            **config.launch,
        )
    return dinitial


def chunk_gradients(
    problem: Problem,
    prepared: "Prepared",
    states: Tensor,
    v_new: Tensor,
    do: Tensor,
    dends: Tensor,
    dR: Tensor,
) -> dict[str, Tensor]:
    """Gradients of everything but the initial state, from what the scans wrote."""
    inputs = problem.inputs
    B, T, H, HV, K, V = inputs.sizes
    config = gradient_config(K, V, problem.target, grouped=HV > H)
    if HV > H:
        found = {name: problem.zeros(B, T, H, K) for name in ("q", "k")}
    else:
        wide = torch.float32 if inputs.qk_l2norm else problem.v.dtype
        found = {name: problem.empty(B, T, H, K, dtype=wide) for name in ("q", "k")}
    found["v"] = dR
    if inputs.beta is not None:
        found["v"] = problem.empty(B, T, HV, V)
        found["beta"] = problem.empty(B, T, HV, dtype=torch.float32)
    if inputs.log_decay is not None:
        found["log_decay"] = problem.empty(B, T, HV, dtype=torch.float32)
    dA_log = None
    if inputs.A_log is not None:
        dA_log = problem.empty(B, T, HV, dtype=torch.float32)
    if problem.slots:
        gradient_kernel[(problem.slots * H,)](
            problem.q,
            problem.k,
            problem.v,
            problem.log_decay,
            problem.beta,
            inputs.A_log,
            inputs.dt_bias,
            prepared.scores,
            prepared.norms,
            states,
            v_new,
            do,
            dends,
            dR,
            problem.cu_seqlens,
            problem.sequence_of_slot,
            found["q"],
            found["k"],
            found["v"],
            found.get("log_decay"),
            found.get("beta"),
            dA_log,
            inputs.scale,
            problem.length,
            B * T * H,
            problem.q.stride(1),
            problem.k.stride(1),
            problem.v.stride(1),
            **problem.shape,
            BK=config.BK,
            BV=config.BV,
            DELTA=inputs.beta is not None,
            DECAY=problem.decay,
            **problem.switches,
            **config.launch,
        )
    if inputs.qk_l2norm:
        found["q"] = unit_gradient(problem.q, found["q"])
        found["k"] = unit_gradient(problem.k, found["k"])
    if inputs.A_log is not None:
        found["A_log"] = dA_log.sum((0, 1))
        found["dt_bias"] = found["log_decay"].sum((0, 1))
    return found


def unit_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of x [B, T, H, K], in its dtype, from that of x divided by its length."""
    B, T, H, K = x.shape
    dx = torch.empty_like(gradient, dtype=x.dtype)
    BT, BK = 16, max(16, triton.next_power_of_2(K))
    if x.numel():
        unit_gradient_kernel[(triton.cdiv(B * T * H, BT),)](
            x, gradient, dx, B * T * H, x.stride(1), H=H, K=K, BK=BK, BT=BT, num_warps=4
        )
    return dx
