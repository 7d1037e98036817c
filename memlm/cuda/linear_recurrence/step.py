"""One token for every sequence: the recurrence itself, with its gradients."""

import dataclasses

import torch
from torch import Tensor

from memlm.cuda.linear_recurrence.gates import token_gate_gradients, token_gates
from memlm.cuda.linear_recurrence.inputs import Inputs
from memlm.cuda.linear_recurrence.reference import L2_NORM_EPS


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs ``[N, HV, V]`` and new states ``[N, HV, K, V]``, for T = 1."""
    token = _Token.of(inputs)
    S = token.written()
    return _read(S, token.q).mul_(inputs.scale), S


def backward(inputs: Inputs, do: Tensor, dstate: Tensor) -> dict[str, Tensor]:
    """Gradients by name; do ``[N, HV, V]``, dstate ``[N, HV, K, V]``."""
    token = _Token.of(inputs)
    q, k, decayed = token.q, token.k, token.decayed
    do = do.to(q.dtype) * inputs.scale
    dq = _along(token.written(), do)
    dS = torch.addcmul(dstate, q.unsqueeze(-1), do.unsqueeze(-2))
    ddelta = _read(dS, k)
    dk = _along(dS, token.delta)
    dbeta, dv, dlog_decay = None, ddelta, None
    if token.beta is not None:
        dbeta = (ddelta * token.error).sum(-1)
        dv = ddelta * token.beta.unsqueeze(-1)
        dk -= _along(decayed, dv)
        dS.addcmul_(k.unsqueeze(-1), dv.unsqueeze(-2), value=-1)
    if token.log_decay is not None:
        dlog_decay = (dS * decayed).sum((-1, -2))
        dS *= token.log_decay.exp()[:, :, None, None]
    found = token_gate_gradients(inputs, token.log_decay, dlog_decay, dbeta)
    found |= {"v": dv.unsqueeze(1), "initial_state": dS}
    for name, x, dx, factor in (("q", q, dq, token.q_factor), ("k", k, dk, token.k_factor)):
        if factor is not None:
            dx = factor * (dx - x * (x * dx).sum(-1, keepdim=True))
        heads = inputs.q.shape[2]
        found[name] = dx.unflatten(1, (heads, -1)).sum(2).unsqueeze(1)
    return found


@dataclasses.dataclass
class _Token:
    """What the token of every sequence is and does, per value head.

    q, k: ``[N, HV, K]``, normed if asked for, by q_factor and k_factor; log_decay, beta:
    ``[N, HV]``; decayed: the states it finds ``[N, HV, K, V]``; error: the value less what the
    state holds for the key ``[N, HV, V]``; delta: what it writes.
    """

    q: Tensor
    k: Tensor
    q_factor: Tensor | None
    k_factor: Tensor | None
    log_decay: Tensor | None
    beta: Tensor | None
    decayed: Tensor
    error: Tensor
    delta: Tensor

    @classmethod
    def of(cls, inputs: Inputs) -> "_Token":
        q, q_factor = _per_value_head(inputs, inputs.q)
        k, k_factor = _per_value_head(inputs, inputs.k)
        error = delta = inputs.v.to(inputs.state_dtype).squeeze(1)
        log_decay, beta = token_gates(inputs)
        if inputs.initial_state is None:
            decayed = q.new_zeros(inputs.state_shape)
        else:
            decayed = inputs.initial_state.to(inputs.state_dtype)
            if log_decay is not None:
                decayed = decayed * log_decay.exp()[:, :, None, None]
        if beta is not None:
            error = delta - _read(decayed, k)
            delta = error * beta.unsqueeze(-1)
        return cls(q, k, q_factor, k_factor, log_decay, beta, decayed, error, delta)

    def written(self) -> Tensor:
        """The new states."""
        return torch.addcmul(self.decayed, self.k.unsqueeze(-1), self.delta.unsqueeze(-2))


def _per_value_head(inputs: Inputs, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Queries or keys ``[N, HV, K]``, and what normed them."""
    _, _, H, HV, _, _ = inputs.sizes
    x = x.to(inputs.state_dtype).squeeze(1)
    if H < HV:
        x = x.repeat_interleave(HV // H, 1)
    if not inputs.qk_l2norm:
        return x, None
    factor = (x.square().sum(-1, keepdim=True) + L2_NORM_EPS).rsqrt_()
    return x * factor, factor


def _read(S: Tensor, x: Tensor) -> Tensor:
    """``S^T x``."""
    return (x.unsqueeze(-2) @ S).squeeze(-2)


def _along(S: Tensor, x: Tensor) -> Tensor:
    """``S x``."""
    return (S @ x.unsqueeze(-1)).squeeze(-1)
