"""The gated delta rule over the chunks of a segment, and its backward pass written by hand.

Within a chunk of C tokens with start state S (rows are tokens; scale is part of the outputs)::

    G_i = sum_{j<=i} g_j        Gamma_ij = exp(G_i - G_j) for i >= j, else 0
    L = tril_{-1}(diag(beta) K K^T * Gamma)           T = (I + L)^-1
    [U | W] = T [beta V | beta e^G K]                 V~ = U - W S
    O = (e^G Q) S + (Q K^T * Gamma) V~
    S' = e^{G_C} S + Khat^T V~  with  Khat_j = e^{G_C - G_j} K_j

The loop over time has two products per step; everything else is batched over the segment.

V~ solves ``V~_i = beta_i (v_i - S^T e^{G_i} k_i - sum_{j<i} Gamma_ij (k_i . k_j) V~_j)``, so with
its gradient taken through the solve, ``dX = T^T dV~``, neither U nor W need gradients, and ``dX``
times ``-beta`` is to the keys k_i what the outputs' gradient dO is to the queries. Both go through
the same products: queries and keys lie stacked as ``[M, 2 C, K]``, dO and dX as ``[M, 2 C, V]``.
"""

import torch
from torch import Tensor

from memlm.cuda.linear_recurrence.gates import ChunkDecays, DecayGradients


def forward(
    QK: Tensor,
    v: Tensor,
    decays: ChunkDecays,
    scale: float,
    group: int,
    carry: Tensor,
    saved: list[Tensor],
    beta: Tensor,
) -> Tensor:
    """Outputs ``[M, C, V]`` of a segment's M chunks of value heads.

    Args:
        QK: queries over keys ``[M, 2 C, K]``, equal in the `group` value heads of a key head.
        v: ``[M, C, V]``.
        carry: ``[rows, K, V]``, the states at the start of the segment, overwritten with those at
            its end; chunk ``m`` belongs to row ``m % rows``.
        saved: buffers that take A ``[M, 2 C, C]`` (both products with K, decayed), T ``[M, C, C]``,
            V~ ``[M, C, V]`` and the start states ``[M, K, V]``.
        beta: ``[M, C, 1]``, zero in empty slots (as log decays are).
    """
    A, T, V_new, states = saved
    rows, C = len(carry), v.shape[1]
    q, k = QK[:, :C], QK[:, C:]
    decayed_products(QK, k, decays.between(), group, out=A)
    L = A[:, C:] * beta
    eye = torch.eye(C, dtype=v.dtype, device=v.device).expand_as(L)
    torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True, out=T)
    torch.bmm(T * beta.mT, v, out=V_new)
    W = (T * (beta * decays.since_start).mT) @ k
    K_end = (k * decays.to_end).mT
    starts = states.split(rows)
    steps = zip(
        starts,
        [*starts[1:], carry],
        V_new.split(rows),
        W.split(rows),
        K_end.split(rows),
        decays.whole.split(rows),
        strict=True,
    )
    starts[0].copy_(carry)
    for S, S_next, v_new, w, k_end, decay in steps:
        v_new.baddbmm_(w, S, alpha=-1)
        torch.mul(S, decay, out=S_next).baddbmm_(k_end, v_new)
    o = (q @ states).mul_(decays.since_start)
    return o.baddbmm_(A[:, :C], V_new, beta=scale, alpha=scale)


def decayed_products(x: Tensor, k: Tensor, gamma: Tensor, group: int, out: Tensor) -> None:
    """``out = x k^T * Gamma`` of parts laid one over the other, x ``[M, parts C, K]``."""
    C = gamma.shape[-1]
    products = x[::group] @ k[::group].mT  # value heads of one key head are neighbours
    torch.mul(
        products.unflatten(1, (-1, C)).unsqueeze(1),
        gamma.unflatten(0, (-1, group)).unsqueeze(2),
        out=out.unflatten(1, (-1, C)).unflatten(0, (-1, group)),
    )


def backward(
    QK: Tensor,
    v: Tensor,
    decays: ChunkDecays,
    saved: list[Tensor],
    D: Tensor,
    dcarry: Tensor,
    gates: DecayGradients,
    beta: Tensor,
    dbeta: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `QK` and `v`.

    Args:
        QK, v, decays, saved, beta: as in `forward`.
        D: ``[M, 2 C, V]``; its first half has the outputs' gradient times the scale, zero in empty
            slots. Overwritten.
        dcarry: gradient of the states at the end of the segment, overwritten with that of those at
            its start.
        gates: takes the gradient of the log decays.
        dbeta: takes the gradient of beta.
    """
    A, T, V_new, states = saved
    rows, C = len(dcarry), v.shape[1]
    q, k = QK[:, :C], QK[:, C:]
    do, since_start = D[:, :C], decays.since_start
    W = (T * (beta * since_start).mT) @ k
    K_end = k * decays.to_end
    dV_new = A[:, :C].mT @ do
    dstates = states.new_empty(len(states) + rows, *states.shape[1:])
    dstates[-rows:] = dcarry
    torch.bmm((q * since_start).mT, do, out=dstates[:-rows])
    dstarts = dstates.split(rows)
    steps = zip(
        dstarts[:-1],
        dstarts[1:],
        dV_new.split(rows),
        W.mT.split(rows),
        K_end.split(rows),
        decays.whole.split(rows),
        strict=True,
    )
    for dS, dS_next, dv_new, w, k_end, decay in reversed(list(steps)):
        dv_new.baddbmm_(k_end, dS_next)
        dS.addcmul_(dS_next, decay).baddbmm_(w, dv_new, alpha=-1)
    dcarry.copy_(dstarts[0])
    dends = dstates[rows:]
    del W, steps

    dX = T.mT @ dV_new
    D[:, C:] = dX
    dQK = D @ states.mT
    dQK.unflatten(1, (2, C)).mul_(since_start.unsqueeze(1))
    B = D @ V_new.mT
    B[:, C:].diagonal(dim1=1, dim2=2).zero_()
    dK_end = torch.bmm(V_new, dends.mT, out=K_end).mul_(decays.to_end)

    from_start = (dQK * QK).sum(-1, keepdim=True)
    inside = B * A
    key_terms = from_start[:, C:] + inside[:, C:].sum(-1, keepdim=True)
    torch.sub((dX * v).sum(-1, keepdim=True), key_terms, out=dbeta)
    gates.put(
        from_start=torch.addcmul(from_start[:, :C], from_start[:, C:], beta, value=-1),
        inside=torch.addcmul(inside[:, :C], inside[:, C:], beta, value=-1),
        to_end=(dK_end * k).sum(-1, keepdim=True),
        whole=(dends * states).sum((1, 2), keepdim=True) * decays.whole,
    )

    B.unflatten(1, (2, C)).mul_(decays.between()[:, None])
    dQK.baddbmm_(B, k)
    B[:, C:].mul_(-beta)
    dk = dQK[:, C:].mul_(-beta)
    dk.add_(dK_end.baddbmm_(B.mT, QK))
    return dQK, dX.mul_(beta)
