"""The additive recurrence over the chunks of a segment, and its backward pass written by hand.

As `delta_chunks` with ``V~ = V``: the values are written as they are.
"""

import torch
from torch import Tensor

from memlm.cuda.linear_recurrence.delta_chunks import decayed_products
from memlm.cuda.linear_recurrence.gates import ChunkDecays, DecayGradients


def forward(
    QK: Tensor,
    v: Tensor,
    decays: ChunkDecays,
    scale: float,
    group: int,
    carry: Tensor,
    saved: list[Tensor],
) -> Tensor:
    """As `delta_chunks.forward`; v is zero in empty slots, and saved are P ``[M, C, C]`` (the
    products of queries and keys, decayed) and the start states."""
    P, states = saved
    rows, C = len(carry), v.shape[1]
    q, k = QK[:, :C], QK[:, C:]
    decayed_products(q, k, decays.between(), group, out=P)
    written = (k * decays.to_end).mT @ v
    starts = states.split(rows)
    steps = zip(
        starts, [*starts[1:], carry], written.split(rows), decays.whole.split(rows), strict=True
    )
    starts[0].copy_(carry)
    for S, S_next, new, decay in steps:
        torch.addcmul(new, S, decay, out=S_next)
    o = (q @ states).mul_(decays.since_start)
    return o.baddbmm_(P, v, beta=scale, alpha=scale)


def backward(
    QK: Tensor,
    v: Tensor,
    decays: ChunkDecays,
    saved: list[Tensor],
    do: Tensor,
    dcarry: Tensor,
    gates: DecayGradients,
) -> tuple[Tensor, Tensor]:
    """As `delta_chunks.backward`; do is the outputs' gradient times the scale ``[M, C, V]``."""
    P, states = saved
    rows, C = len(dcarry), v.shape[1]
    q, k = QK[:, :C], QK[:, C:]
    do_start = do * decays.since_start
    dstates = states.new_empty(len(states) + rows, *states.shape[1:])
    dstates[-rows:] = dcarry
    torch.bmm(q.mT, do_start, out=dstates[:-rows])
    dstarts = dstates.split(rows)
    steps = list(zip(dstarts[:-1], dstarts[1:], decays.whole.split(rows), strict=True))
    for dS, dS_next, decay in reversed(steps):
        dS.addcmul_(dS_next, decay)
    dcarry.copy_(dstarts[0])
    dends = dstates[rows:]

    dv = (P.mT @ do).baddbmm_(k * decays.to_end, dends)
    dQK = torch.empty_like(QK)
    dq = do_start @ states.mT
    dk = (v @ dends.mT).mul_(decays.to_end)
    B = do @ v.mT

    gates.put(
        from_start=(dq * q).sum(-1, keepdim=True),
        inside=B * P,
        to_end=(dk * k).sum(-1, keepdim=True),
        whole=(dends * states).sum((1, 2), keepdim=True) * decays.whole,
    )
    B.mul_(decays.between())
    dQK[:, :C] = dq.baddbmm_(B, k)
    dQK[:, C:] = dk.baddbmm_(B.mT, q)
    return dQK, dv
