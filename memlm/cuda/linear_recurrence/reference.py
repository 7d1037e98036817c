"""The gated delta recurrence token by token, as the formula is written."""

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.linear_recurrence.inputs import CHUNK, Inputs, first_chunk_slots

L2_NORM_EPS = 1e-6


def linear_recurrence_reference(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``[B, T, HV, V]``, final state and chunk states; differentiable by autograd."""
    B, T, H, HV, _, V = inputs.sizes
    dtype = inputs.state_dtype
    group = HV // H
    q, k = (x.to(dtype).repeat_interleave(group, dim=2) for x in (inputs.q, inputs.k))
    if inputs.qk_l2norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_NORM_EPS) for x in (q, k))
    v = inputs.v.to(dtype)
    log_decay, beta = natural_log_decay(inputs), write_strength(inputs)
    bounds = range(0, (B + 1) * T, T) if T else [0] * (B + 1)
    slots = [row * -(-T // CHUNK) for row in range(B)]
    if inputs.cu_seqlens is not None:
        bounds = inputs.cu_seqlens.tolist()
        slots = first_chunk_slots(inputs.cu_seqlens).tolist()
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    outputs, states = [], []
    chunk_states = v.new_zeros(inputs.chunk_states_shape).flatten(0, 1)
    for n in range(inputs.sequences):
        if inputs.initial_state is None:
            S = v.new_zeros(inputs.state_shape[1:])
        else:
            S = inputs.initial_state[n].to(dtype)
        for t in range(bounds[n], bounds[n + 1]):
            if (t - bounds[n]) % CHUNK == 0:
                chunk_states[slots[n] + (t - bounds[n]) // CHUNK] = S.detach()
            if log_decay is not None:
                S = log_decay[t].exp()[:, None, None] * S
            delta = v[t]
            if beta is not None:
                delta = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
            S = S + torch.einsum("hk,hv->hkv", k[t], delta)
            outputs.append(inputs.scale * torch.einsum("hkv,hk->hv", S, q[t]))
        states.append(S)
    o = torch.stack(outputs) if outputs else v
    state = torch.stack(states) if states else v.new_zeros(inputs.state_shape)
    return (
        o.view(B, T, HV, V).to(inputs.v.dtype),
        state,
        chunk_states.view(inputs.chunk_states_shape),
    )


def natural_log_decay(inputs: Inputs) -> Tensor | None:
    """Log decay of every token ``[B * T, HV]``: -exp(A_log) softplus(a + dt_bias), or as given."""
    if inputs.log_decay is None:
        return None
    B, T, _, HV, _, _ = inputs.sizes
    log_decay = inputs.log_decay.to(inputs.state_dtype)
    if inputs.A_log is not None:
        A_log, dt_bias = (x.to(log_decay.dtype) for x in (inputs.A_log, inputs.dt_bias))
        # softplus(x) = -logsigmoid(-x); see `sigmoid`.
        log_decay = A_log.exp() * F.logsigmoid(-(log_decay + dt_bias))
    return log_decay.expand(B, T, HV).flatten(0, 1)


def write_strength(inputs: Inputs) -> Tensor | None:
    """Write strength of every token ``[B * T, HV]``: sigmoid(b), doubled for negative
    eigenvalues, or as given."""
    if inputs.beta is None:
        return None
    beta = inputs.beta.to(inputs.state_dtype).flatten(0, 1)
    if inputs.beta_sigmoid:
        beta = sigmoid(beta)
    return 2 * beta if inputs.allow_neg_eigval else beta


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), the same bits for an entry wherever it stands.

    torch's sigmoid and softplus round the last few entries of a tensor otherwise than the rest on a
    CPU, so that a row alone would not equal the row in a batch; its exp and logsigmoid do not.
    """
    return F.logsigmoid(x).exp()
