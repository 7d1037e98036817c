"""The gated delta recurrence token by token, as the formula is written."""

import torch
from torch import Tensor


def linear_recurrence_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """Tokens of all sequences one after the other: q, k ``[tokens, HV, K]``, v ``[tokens, HV, V]``,
    log_decay, beta ``[tokens, HV]``, state ``[N, HV, K, V]``, lengths ``[N]``.
    Returns (o ``[tokens, HV, V]``, final state)."""
    outputs, states = [], []
    token = 0
    for sequence, length in enumerate(lengths.tolist()):
        S = state[sequence]  # [HV, K, V]
        for t in range(token, token + length):
            if log_decay is not None:
                S = log_decay[t].exp()[:, None, None] * S
            delta = v[t]
            if beta is not None:
                delta = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
            S = S + torch.einsum("hk,hv->hkv", k[t], delta)
            outputs.append(scale * torch.einsum("hkv,hk->hv", S, q[t]))
        states.append(S)
        token += length
    o = torch.stack(outputs) if outputs else torch.zeros_like(v)
    return o, torch.stack(states) if states else state
