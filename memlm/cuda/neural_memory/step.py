"""One token per sequence, as in decoding: no tiles, the recurrence itself."""

import torch
from torch import Tensor

from memlm.cuda.neural_memory.inputs import Rule
from memlm.cuda.neural_memory.network import errors_at, forward, square_norm
from memlm.cuda.neural_memory.state import Layers, NeuralMemoryState
from memlm.cuda.neural_memory.tiles import token_gates


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    state: NeuralMemoryState,
    rule: Rule,
    lengths: Tensor,
) -> tuple[Tensor, NeuralMemoryState, Tensor, Tensor]:
    """As `neural_memory_reference`, where every sequence has one token."""
    N, H, D = q.shape
    Q, K, V = (x.reshape(N * H, 1, D) for x in (q, k, v))
    alpha, eta, joins = token_gates(rule, alpha, eta, state.offset, lengths)
    decay, carry, size = (x.reshape(N * H, 1, 1) for x in (1 - alpha, eta, theta))

    def rows(layers: Layers) -> Layers:
        return tuple(w.reshape(N * H, -1, w.shape[-1]) for w in layers)

    anchor, weights, momentum = map(rows, (state.anchor, state.weights, state.momentum))
    found = errors_at(weights if rule.exact else anchor, K, V)
    square = square_norm(found)
    if rule.clip is not None:
        size = size * rule.clip * square.clamp_min(rule.clip**2).rsqrt().unsqueeze(-1)
    new_weights, new_momentum = [], []
    for a, e, w, s in zip(found.inputs, found.errors, weights, momentum, strict=True):
        s = (s * carry).baddbmm_(a.mT, size * e, alpha=-1)
        added = s if joins is None else s * joins.repeat_interleave(H)[:, None, None]
        new_weights.append(torch.addcmul(added, w, decay))
        new_momentum.append(s)
    o = forward(Q, anchor if rule.read == "chunk_start" else tuple(new_weights))

    def shaped(layers: list[Tensor]) -> Layers:
        return tuple(x.view(old.shape) for x, old in zip(layers, state.weights, strict=True))

    offset = rule.offset_after(state.offset, lengths)
    final = NeuralMemoryState(state.anchor, shaped(new_weights), shaped(new_momentum), offset)
    final = final.refreshed(offset == 0) if rule.refresh and not rule.exact else final
    return o.view(N, H, D), final, found.loss.view(N, H), square.sqrt().view(N, H)
