"""The neural memory token by token, the inner gradient by autograd."""

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.neural_memory.state import NORM_EPS, NeuralMemoryState


def read(weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """The memory as a function: weights per layer ``[H, d_in, d_out]``, x ``[H, D]``."""
    if len(weights) == 1:
        return torch.einsum("hd,hde->he", x, weights[0])
    hidden = F.gelu(torch.einsum("hd,hde->he", x, weights[0]))
    y = torch.einsum("hd,hde->he", hidden, weights[1])
    return x + F.layer_norm(y, y.shape[-1:], eps=NORM_EPS)


def loss_gradient(anchor: tuple[Tensor, ...], k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Gradient of ``||M(k) - v||^2`` per head by the weights, itself differentiable."""
    with torch.enable_grad():
        # A non-leaf alias, so that gradients of the gradient reach the anchor's own history.
        anchor = tuple(
            w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for w in anchor
        )
        loss = (read(anchor, k) - v).square().sum()
        return torch.autograd.grad(loss, anchor, create_graph=True)


def neural_memory_reference(
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
    """Tokens of all sequences one after the other: q, k, v ``[tokens, H, D]``, gates
    ``[tokens, H]``, lengths ``[N]``. Returns (o ``[tokens, H, D]``, final state)."""
    outputs, finals = [], []
    token = 0
    for sequence, length in enumerate(lengths.tolist()):
        anchor = tuple(w[sequence] for w in state.anchor)
        W = tuple(w[sequence] for w in state.weights)
        S = tuple(s[sequence] for s in state.momentum)
        offset = int(state.offset[sequence])
        for t in range(token, token + length):
            decay, carry, step = (gate[t][:, None, None] for gate in (1 - alpha, eta, theta))
            gradient = loss_gradient(anchor, k[t], v[t])
            S = tuple(carry * s - step * g for s, g in zip(S, gradient, strict=True))
            W = tuple(decay * w + s for w, s in zip(W, S, strict=True))
            outputs.append(read(W, q[t]))
            offset += 1
            if offset == chunk_size:
                anchor, offset = W, 0
        finals.append((anchor, W, S, torch.tensor(offset, device=q.device)))
        token += length
    if not outputs:
        return torch.zeros_like(v), state
    o = torch.stack(outputs)
    anchors, weights, momenta, offsets = zip(*finals, strict=True)
    final = NeuralMemoryState(
        *(
            tuple(torch.stack(layer) for layer in zip(*part, strict=True))
            for part in (anchors, weights, momenta)
        ),
        torch.stack(offsets),
    )
    if not torch.is_grad_enabled():
        return o.detach(), final.map(Tensor.detach)
    return o, final
