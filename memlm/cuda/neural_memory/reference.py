"""The neural memory token by token, the inner gradient by autograd."""

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.neural_memory.inputs import Rule
from memlm.cuda.neural_memory.state import NORM_EPS, Layers, NeuralMemoryState


def read(weights: Layers, x: Tensor) -> Tensor:
    """The memory as a function: weights per layer ``[H, d_in, d_out]``, x ``[H, D]``."""
    layers = [w for w in weights if w.ndim == 3]
    y = torch.einsum("hd,hde->he", x, layers[0])
    if len(layers) == 1:
        return y
    for w in layers[1:]:
        y = torch.einsum("hd,hde->he", F.gelu(y), w)
    y = F.layer_norm(y, y.shape[-1:], eps=NORM_EPS)
    if len(weights) > len(layers):
        y = y * (1 + weights[-1])
    return x + y


def loss_gradient(anchor: Layers, k: Tensor, v: Tensor) -> tuple[Layers, Tensor]:
    """Gradient of ``||M(k) - v||^2`` per head by the weights, itself differentiable, and the loss
    ``[H]``."""
    with torch.enable_grad():
        # A non-leaf alias, so that gradients of the gradient reach the anchor's own history.
        anchor = tuple(
            w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for w in anchor
        )
        loss = (read(anchor, k) - v).square().sum(-1)
        return torch.autograd.grad(loss.sum(), anchor, create_graph=True), loss.detach()


def neural_memory_reference(
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
    """Tokens of all sequences one after the other: q, k, v ``[tokens, H, D]``, gates
    ``[tokens, H]``, lengths ``[N]``. Returns o ``[tokens, H, D]``, the final state, surprise and
    gradient norm ``[tokens, H]``."""
    outputs, surprises, norms, finals = [], [], [], []
    token = 0
    for sequence, length in enumerate(lengths.tolist()):
        anchor = tuple(w[sequence] for w in state.anchor)
        W = tuple(w[sequence] for w in state.weights)
        S = tuple(s[sequence] for s in state.momentum)
        offset = int(state.offset[sequence])
        for t in range(token, token + length):
            gradient, surprise = loss_gradient(W if rule.exact else anchor, k[t], v[t])
            square = sum(g.flatten(1).square().sum(1) for g in gradient)
            step = theta[t]
            if rule.clip is not None:
                step = step * rule.clip * square.clamp_min(rule.clip**2).rsqrt()
            begins, ends = offset % rule.chunk_size == 0, (offset + 1) % rule.chunk_size == 0
            by_chunk = rule.read == "chunk_gates"
            carry = torch.ones_like(step) if by_chunk and not begins else eta[t]
            S = tuple(
                _per_head(carry, s) * s - _per_head(step, g) * g
                for s, g in zip(S, gradient, strict=True)
            )
            if ends or not by_chunk:
                W = tuple(_per_head(1 - alpha[t], w) * w + s for w, s in zip(W, S, strict=True))
            outputs.append(read(anchor if rule.read == "chunk_start" else W, q[t]))
            surprises.append(surprise)
            norms.append(square.detach().sqrt())
            offset += 1
            if offset == rule.cycle:
                offset = 0
                anchor = W if rule.refresh and not rule.exact else anchor
        finals.append((anchor, W, S))
        token += length
    if not outputs:
        nothing = theta.detach()
        return torch.zeros_like(v), state, nothing, nothing
    o = torch.stack(outputs)
    parts = [
        tuple(torch.stack(layer) for layer in zip(*part, strict=True))
        for part in zip(*finals, strict=True)
    ]
    final = NeuralMemoryState(*parts, rule.offset_after(state.offset, lengths))
    if not torch.is_grad_enabled():
        o, final = o.detach(), final.map(Tensor.detach)
    return o, final, torch.stack(surprises), torch.stack(norms)


def _per_head(gate: Tensor, x: Tensor) -> Tensor:
    return gate.view(-1, *[1] * (x.ndim - 1))
