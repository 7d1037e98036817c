"""The gated delta rule over chunks, with a backward pass written by hand.

Within a chunk of C tokens with start state S (rows are tokens)::

    G_i = sum_{j<=i} g_j        Gamma_ij = exp(G_i - G_j) for i >= j, else 0
    L = tril_{-1}(diag(beta) K K^T * Gamma)           T = (I + L)^-1
    [U | W] = T [beta V | beta e^G K]                 V~ = U - W S
    O = (e^G Q) S + (Q K^T * Gamma) V~
    S' = e^{G_C} S + Khat^T V~  with  Khat_j = e^{G_C - G_j} K_j

The update is affine in S: ``S' = A S + B`` with ``A = e^{G_C} I - Khat^T W``, ``B = Khat^T U``.
So the serial loop has one small product per chunk, and its backward ``dS = A^T dS' + D`` as well;
everything else is batched over all chunks.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LOG_ZERO = -60.0  # exp of less counts as zero, which keeps denormal numbers out of the products
BASE = 16  # side of the blocks that are inverted by substitution


class DeltaChunks(torch.autograd.Function):
    """``(q, k, v, g, beta, S, counts) -> (o, final S)``.

    q (scaled), k ``[M, C, K]``, v ``[M, C, V]``, g (not below LOG_ZERO), beta ``[M, C]``,
    S ``[counts[0], K, V]``; counts: chunks of every step, descending. Final states come in the
    order of the initial ones.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor, counts: list[int]
    ) -> tuple[Tensor, Tensor]:
        gamma, decay = decays(g)
        beta = beta[:, :, None]
        KK, QK = k @ k.mT, q @ k.mT
        T = unit_lower_inverse(KK * gamma * beta)
        UW = T @ (torch.cat((v, k * decay), -1) * beta)
        K_end = gamma[:, -1, :, None] * k
        BA = K_end.mT @ UW
        V = v.shape[-1]
        A = BA[:, :, V:].neg_()
        A.diagonal(dim1=1, dim2=2).add_(decay[:, -1])
        states, last = _scan(A, BA[:, :, :V], S, counts)
        V_new = torch.baddbmm(UW[:, :, :V], UW[:, :, V:], states, alpha=-1)
        o = torch.baddbmm((q * decay) @ states, QK * gamma, V_new)
        ctx.counts = counts
        ctx.save_for_backward(q, k, v, beta, gamma, decay, KK, QK, T, UW, A, states, V_new)
        return o, last

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        # A backward pass may itself be called under autocast.
        with torch.autocast(do.device.type, enabled=False):
            return DeltaChunks._gradients(ctx, do, dlast)

    @staticmethod
    def _gradients(ctx, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, gamma, decay, KK, QK, T, UW, A, states, V_new = ctx.saved_tensors
        V = v.shape[-1]
        Q_in = q * decay
        K_end = gamma[:, -1, :, None] * k
        dV_new = (QK * gamma).mT @ do
        D = torch.baddbmm(Q_in.mT @ do, UW[:, :, V:].mT, dV_new, alpha=-1)
        dends, dS = _scan_backward(A, D, dlast, ctx.counts)
        dV_new.baddbmm_(K_end, dends)
        dQ_in = do @ states.mT
        dK_end = V_new @ dends.mT
        dW = torch.bmm(dV_new, states.mT).neg_()

        dright = T.mT @ torch.cat((dV_new, dW), -1)  # gradient of [beta V | beta e^G K]
        dBv, dBk = dright.split((V, k.shape[-1]), -1)
        dL = (dright @ UW.mT).neg_().mul_(gamma)  # Gamma is zero above the diagonal
        dL.diagonal(dim1=1, dim2=2).zero_()
        dKK = dL * beta
        dQK = (do @ V_new.mT).mul_(gamma)

        key_term = (dBk * k).sum(-1, keepdim=True).mul_(decay)
        dL.mul_(KK)
        dbeta = (dBv * v).sum(-1) + key_term.squeeze(-1) + dL.sum(-1)
        end_term = (dK_end * K_end).sum(-1)
        E = dL.mul_(beta).addcmul_(dQK, QK)
        dG = E.sum(-1) - E.sum(-2) - end_term + (dQ_in * Q_in).sum(-1)
        dG += (key_term * beta).squeeze(-1)
        carried = (dends * states).sum((-1, -2)) * decay[:, -1, 0]
        dG[:, -1] += end_term.sum(-1) + carried
        dg = dG.flip(-1).cumsum(-1).flip(-1)

        dq = torch.baddbmm(dQ_in.mul_(decay), dQK, k)
        dk = torch.baddbmm(dK_end.mul_(gamma[:, -1, :, None]), dQK.mT, q)
        dk.baddbmm_(dKK.add_(dKK.mT.clone()), k).addcmul_(dBk, decay * beta)
        return dq, dk, dBv * beta, dg, dbeta, dS, None


def decays(g: Tensor) -> tuple[Tensor, Tensor]:
    """Gamma ``[M, C, C]`` and e^G ``[M, C, 1]`` of log decays ``[M, C]``, zero below LOG_ZERO."""
    G = g.cumsum(1)
    size = g.shape[1]
    future = torch.full((size, size), -torch.inf, dtype=g.dtype, device=g.device).triu(1)
    gamma = (G[:, :, None] - G[:, None, :]).add_(future)
    return (
        F.threshold_(gamma, LOG_ZERO, -torch.inf).exp_(),
        F.threshold(G, LOG_ZERO, -torch.inf).exp_()[:, :, None],
    )


def unit_lower_inverse(L: Tensor) -> Tensor:
    """``(I + tril_{-1}(L))^-1`` of ``[M, C, C]``: substitution in blocks, products between them."""
    size = L.shape[-1]
    if size <= BASE:
        eye = torch.eye(size, dtype=L.dtype, device=L.device).expand_as(L)
        return torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True)
    half = size // 2
    blocks = torch.cat((L[:, :half, :half], L[:, half:, half:]))
    first, second = unit_lower_inverse(blocks).chunk(2)
    inverse = torch.zeros_like(L)
    inverse[:, :half, :half] = first
    inverse[:, half:, half:] = second
    inverse[:, half:, :half] = (second @ L[:, half:, :half] @ first).neg_()
    return inverse


def _scan(A: Tensor, B: Tensor, S: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """``S <- A S + B`` step by step: the start state of every chunk, and the final states."""
    states = torch.empty_like(B)
    pieces = states.split(counts)
    last = torch.empty_like(S)
    pieces[0].copy_(S)
    steps = zip(A.split(counts), B.split(counts), pieces, [*pieces[1:], last[:0]], strict=True)
    for a, b, start, following in steps:
        after = len(following)
        if after == len(start):
            torch.baddbmm(b, a, start, out=following)
        else:  # some sequences end here
            end = torch.baddbmm(b, a, start)
            following.copy_(end[:after])
            last[after : len(start)] = end[after:]
    return states, last


def _scan_backward(A: Tensor, D: Tensor, dlast: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Gradients of the end state of every chunk, and of the initial states."""
    dends = torch.empty_like(D)
    pieces = dends.split(counts)
    dS = dlast[:0]
    steps = list(zip(A.split(counts), D.split(counts), pieces, strict=True))
    for a, d, dend in reversed(steps):
        dend[: len(dS)] = dS
        dend[len(dS) :] = dlast[len(dS) : len(dend)]
        dS = torch.baddbmm(d, a.mT, dend)
    return dends, dS
