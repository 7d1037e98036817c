"""The large-chunk memory chunk by chunk, the inner gradients by autograd."""

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.large_chunk_memory.state import LargeChunkMemoryState, channel_norm, orthogonal

Matrices = tuple[Tensor, Tensor, Tensor]  # W1, W3, W2


def read(weights: Matrices, x: Tensor) -> Tensor:
    """The memory as a function: W1, W3 ``[H, D, h]``, W2 ``[H, h, D]``, x ``[T, H, D]``."""
    w1, w3, w2 = weights
    gate, value = (torch.einsum("thd,hde->the", x, w) for w in (w1, w3))
    return torch.einsum("the,hed->thd", F.silu(gate) * value, w2)


def gradients(weights: Matrices, k: Tensor, v: Tensor, steps: Tensor) -> Matrices:
    """``sum_t steps_tj d<M(k_t), v_t> / dWj`` for each matrix, itself differentiable."""
    with torch.enable_grad():
        weights = tuple(
            w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for w in weights
        )
        agreement = (read(weights, k) * v).sum(-1)  # [T, H]
        return tuple(
            torch.autograd.grad((steps[..., j] * agreement).sum(), w, create_graph=True)[0]
            for j, w in enumerate(weights)
        )


def large_chunk_memory_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    steps: Tensor,
    eta: Tensor | None,
    state: LargeChunkMemoryState,
    chunk_size: int,
    orthogonalise: bool,
    lengths: Tensor,
) -> tuple[Tensor, LargeChunkMemoryState]:
    """Sequences one after the other: q, k, v ``[tokens, H, D]``, steps ``[tokens, H, 3]``, eta
    ``[tokens, H]``, lengths ``[N]``. Returns (o ``[tokens, H, D]``, final state)."""
    if len(q) == 0:
        return torch.zeros_like(v), state
    q, k, v = (x.to(state.weights[0].dtype) for x in (q, k, v))
    outputs, finals = [], []
    token = 0
    for sequence, length in enumerate(lengths.tolist()):
        W, S, P = (
            _matrices(part, sequence) for part in (state.weights, state.momentum, state.pending)
        )
        gate_sum, offset = state.gate_sum[sequence], int(state.offset[sequence])
        end = token + length
        while token < end:
            span = slice(token, min(end, token + chunk_size - offset))
            outputs.append(read(W, q[span]))
            P = _add(P, gradients(W, k[span], v[span], steps[span]))
            if eta is not None:
                gate_sum = gate_sum + eta[span].sum(0)
            offset += span.stop - span.start
            token = span.stop
            if offset < chunk_size:
                continue
            step = P
            if eta is not None:
                decay = (gate_sum / chunk_size)[:, None, None]
                step = S = _add(tuple(decay * s for s in S), P)
            moved = _add(W, map(orthogonal, step) if orthogonalise else step)
            W = tuple(m * channel_norm(w) / channel_norm(m) for m, w in zip(moved, W, strict=True))
            P = tuple(map(torch.zeros_like, P))
            if eta is not None:
                gate_sum = torch.zeros_like(gate_sum)
            offset = 0
        finals.append((W, S, P, gate_sum, torch.tensor(offset, device=q.device)))
    weights, momenta, pendings, gate_sums, offsets = zip(*finals, strict=True)
    final = LargeChunkMemoryState(
        *map(_layers, (weights, momenta, pendings)), torch.stack(gate_sums), torch.stack(offsets)
    )
    o = torch.cat(outputs)
    if not torch.is_grad_enabled():
        return o.detach(), final.map(Tensor.detach)
    return o, final


def _matrices(layers: tuple[Tensor, ...], sequence: int) -> Matrices:
    """W1, W3 and W2 of one sequence."""
    return *layers[0][sequence].chunk(2, -1), layers[1][sequence]


def _layers(matrices: tuple[Matrices, ...]) -> tuple[Tensor, Tensor]:
    """The inverse of `_matrices` over all sequences."""
    w1, w3, w2 = map(torch.stack, zip(*matrices, strict=True))
    return torch.cat((w1, w3), -1), w2


def _add(left: Matrices, right: Matrices) -> Matrices:
    return tuple(a + b for a, b in zip(left, right, strict=True))
