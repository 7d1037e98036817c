"""The neural memory in closed form per chunk, plain torch.

All gradients of a chunk are taken at its anchor, so the weights at token t are linear in them::

    b, m = cumulative sums of log(1 - alpha), log(eta);   beta = exp(b);   mu = exp(m)
    La[t, i] = exp(b_t - b_i),  Le[t, i] = exp(m_t - m_i)  for i <= t, else 0
    G = La Le diag(theta)       f = La mu       n_i = Le[C, i] theta_i
    M_t = beta_t M + f_t S - sum_i G[t, i] g_i          S_C = mu_C S - sum_i n_i g_i

and each gradient is an outer product ``a_i^T e_i`` of a layer's input and its error: no gradient
is ever formed, every sum over them is attention with the weights ``G``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.chunking import ChunkLayout
from memlm.cuda.neural_memory.state import NORM_EPS, NeuralMemoryState

LOG_ZERO = -60.0  # exp of less counts as zero, which keeps denormal numbers out of the products
Layers = tuple[Tensor, ...]


class _Gates(NamedTuple):
    """The weights of a chunk's gradients and of its start state: ``[M, C, *]``, ``[M, 1, 1]``."""

    G: Tensor
    beta: Tensor
    f: Tensor
    n: Tensor
    mu_end: Tensor


def neural_memory_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    state: NeuralMemoryState,
    chunk_size: int,
    lengths: Tensor,
) -> tuple[Tensor, NeuralMemoryState]:
    """Same arguments and results as `neural_memory_reference`."""
    if len(q) == 0:
        return torch.zeros_like(v), state
    seen = state.offset + lengths
    if bool((seen <= chunk_size).all()):
        layout = ChunkLayout.build(lengths, int(lengths.max()))  # one anchor serves the whole call
    else:
        layout = ChunkLayout.build(lengths, chunk_size, state.offset)
    heads = q.shape[1]
    counts = [count * heads for count in layout.counts]
    per_step = [x.split(counts) for x in map(layout.to_chunks, (q, k, v))]
    gates = _gates(layout, alpha, eta, theta)
    gates = [_Gates(*step) for step in zip(*(x.split(counts) for x in gates), strict=True)]

    def gather(layers: Layers) -> list[Tensor]:
        return [w.index_select(0, layout.order)[: layout.counts[0]].flatten(0, 1) for w in layers]

    anchor, weights, momentum = map(gather, (state.anchor, state.weights, state.momentum))
    depth = len(weights)
    chunk = _linear_chunk if depth == 1 else _mlp_chunk
    outputs, finished = [], []
    for step, (Q, K, V, gate, after) in enumerate(
        zip(*per_step, gates, [*counts[1:], 0], strict=True)
    ):
        if step > 0:
            anchor = weights
        o, weights, momentum = chunk(Q, K, V, gate, anchor, weights, momentum)
        outputs.append(o)
        if after < len(Q):  # some sequences end here
            finished.append([x[after:] for x in (*anchor, *weights, *momentum)])
            weights, momentum = ([x[:after] for x in layers] for layers in (weights, momentum))
    ended = [torch.cat(parts[::-1]) for parts in zip(*finished, strict=True)]
    before = (*state.anchor, *state.weights, *state.momentum)
    ended = [
        torch.cat((x.unflatten(0, (-1, heads)), old[layout.order[layout.counts[0] :]]))
        for x, old in zip(ended, before, strict=True)
    ]
    ended = [x[layout.inverse_order] for x in ended]
    anchor, weights, momentum = ended[:depth], ended[depth : 2 * depth], ended[2 * depth :]
    offset = seen % chunk_size
    complete = ((offset == 0) & (lengths > 0))[:, None, None, None]
    anchor = [torch.where(complete, w, a) for w, a in zip(weights, anchor, strict=True)]
    final = NeuralMemoryState(tuple(anchor), tuple(weights), tuple(momentum), offset)
    return layout.from_chunks(torch.cat(outputs), heads), final


def _gates(layout: ChunkLayout, alpha: Tensor, eta: Tensor, theta: Tensor) -> _Gates:
    floor = math.exp(LOG_ZERO)  # alpha = 1 and eta = 0 have finite logs
    b = layout.to_chunks((1 - alpha).clamp_min(floor).log()).cumsum(1)
    m = layout.to_chunks(eta.clamp_min(floor).log()).cumsum(1)
    theta = layout.to_chunks(theta)
    # Empty slots neither decay (log 0 = 1) nor step (theta 0); the mask keeps the momentum from
    # being added to the weights there.
    token = layout.to_chunks(torch.ones_like(alpha))
    La = _decay_matrix(b) * token[:, None, :]
    Le = _decay_matrix(m)
    mu = _exp(m)
    f = La @ mu[:, :, None]
    n = Le[:, -1, :, None] * theta[:, :, None]
    return _Gates(La @ Le * theta[:, None, :], _exp(b)[:, :, None], f, n, mu[:, -1:, None])


def _exp(x: Tensor) -> Tensor:
    return x.masked_fill(x < LOG_ZERO, -torch.inf).exp()


def _decay_matrix(x: Tensor) -> Tensor:
    """``exp(x_t - x_i)`` for i <= t, else 0, of x ``[M, C]``."""
    difference = x[:, :, None] - x[:, None, :]
    size = x.shape[1]
    upper = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    return _exp(difference.masked_fill(upper, -torch.inf))


def _advance(
    gate: _Gates, inputs: Tensor, error: Tensor, w: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights and momentum of a layer at the end of the chunk."""
    last = torch.cat((gate.G[:, -1, :, None] * inputs, gate.n * inputs), -1)
    sums_w, sums_s = (last.mT @ error).chunk(2, 1)
    w = gate.beta[:, -1:] * w + gate.f[:, -1:] * s - sums_w
    return w, gate.mu_end * s - sums_s


def _apply(gate: _Gates, x: Tensor, inputs: Tensor, error: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """``x_t`` through a layer with the weights of token t."""
    now = torch.baddbmm((gate.beta * x) @ w, gate.f * x, s)
    return torch.baddbmm(now, x @ inputs.mT * gate.G, error, alpha=-1)


def _linear_chunk(
    Q: Tensor, K: Tensor, V: Tensor, gate: _Gates, anchor: Layers, weights: Layers, momentum: Layers
) -> tuple[Tensor, Layers, Layers]:
    error = 2 * torch.baddbmm(V, K, anchor[0], beta=-1)
    o = _apply(gate, Q, K, error, weights[0], momentum[0])
    w, s = _advance(gate, K, error, weights[0], momentum[0])
    return o, (w,), (s,)


def _mlp_chunk(
    Q: Tensor, K: Tensor, V: Tensor, gate: _Gates, anchor: Layers, weights: Layers, momentum: Layers
) -> tuple[Tensor, Layers, Layers]:
    Z1 = K @ anchor[0]
    X2 = F.gelu(Z1)
    Z2 = X2 @ anchor[1]
    centred = Z2 - Z2.mean(-1, keepdim=True)
    inverse_std = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    normed = centred * inverse_std
    d = 2 * (K + normed - V)
    E2 = d - d.mean(-1, keepdim=True) - normed * (d * normed).mean(-1, keepdim=True)
    E2 = E2 * inverse_std
    E1 = (E2 @ anchor[1].mT) * _gelu_derivative(Z1)

    hidden = F.gelu(_apply(gate, Q, K, E1, weights[0], momentum[0]))
    y = _apply(gate, hidden, X2, E2, weights[1], momentum[1])
    o = Q + F.layer_norm(y, y.shape[-1:], eps=NORM_EPS)
    layers = [
        _advance(gate, inputs, error, w, s)
        for inputs, error, w, s in zip((K, X2), (E1, E2), weights, momentum, strict=True)
    ]
    return o, *zip(*layers, strict=True)


def _gelu_derivative(x: Tensor) -> Tensor:
    """d gelu(x) / dx = Phi(x) + x phi(x)."""
    density = (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
