"""The gated delta recurrence in chunks, plain torch.

Within a chunk of C tokens with start state S (rows are tokens)::

    G_i = sum_{j<=i} g_j        Gamma_ij = exp(G_i - G_j) for i >= j, else 0
    L = tril_{-1}(diag(beta) K K^T * Gamma)           [U | W] = (I + L)^-1 [beta V | beta e^G K]
    V~ = U - W S                                      O = (e^G Q) S + (Q K^T * Gamma) V~
    S' = e^{G_C} S + Khat^T V~  with  Khat_j = e^{G_C - G_j} K_j

The update is affine in S, so ``S' = A S + B`` with ``A = e^{G_C} I - Khat^T W`` and
``B = Khat^T U`` leaves one small product per chunk in the serial loop; all else is batched.
"""

import torch
from torch import Tensor

from memlm.cuda.chunking import ChunkLayout

LOG_ZERO = -60.0  # exp of less counts as zero, which keeps denormal numbers out of the products


def linear_recurrence_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `linear_recurrence_reference`."""
    if len(q) == 0:
        return torch.zeros_like(v), state
    if log_decay is not None:
        log_decay = log_decay.clamp_min(LOG_ZERO)
    if len(q) == len(lengths) and bool((lengths == 1).all()):
        return _step(q, k, v, log_decay, beta, scale, state)
    longest = int(lengths.max())
    size = min(64, max(4, 1 << (longest - 1).bit_length()))
    layout = ChunkLayout.build(lengths, size)
    heads = v.shape[1]
    active = layout.counts[0]
    S = state[layout.order[:active]].flatten(0, 1)  # [sequences * HV, K, V]
    o, last = _chunked(
        layout.to_chunks(q) * scale,
        layout.to_chunks(k),
        layout.to_chunks(v),
        None if log_decay is None else layout.to_chunks(log_decay),
        None if beta is None else layout.to_chunks(beta),
        S,
        [count * heads for count in layout.counts],
    )
    last = torch.cat((last.view(active, *state.shape[1:]), state[layout.order[active:]]))
    return layout.from_chunks(o, heads), last[layout.inverse_order]


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    S: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token for every sequence: the recurrence itself."""
    if log_decay is not None:
        S = log_decay.exp()[:, :, None, None] * S
    delta = v
    if beta is not None:
        delta = beta[:, :, None] * (v - (k[:, :, None, :] @ S).squeeze(2))
    S = S + k[:, :, :, None] * delta[:, :, None, :]
    return (scale * q[:, :, None, :] @ S).squeeze(2), S


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    S: Tensor,
    counts: list[int],
) -> tuple[Tensor, Tensor]:
    """q, k ``[M, C, K]``, v ``[M, C, V]``, g, beta ``[M, C]``, S ``[counts[0], K, V]``."""
    C, K = q.shape[1:]
    if g is None:
        g = q.new_zeros(q.shape[:2])
    G = g.cumsum(1)
    difference = G[:, :, None] - G[:, None, :]
    upper = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    gamma = difference.masked_fill(upper | (difference < LOG_ZERO), -torch.inf).exp()
    G = G.masked_fill(G < LOG_ZERO, -torch.inf).exp()[:, :, None]  # [M, C, 1]
    end = gamma[:, -1, :, None]  # e^{G_C - G_j}
    total = G[:, -1:]  # [M, 1, 1]
    K_end = (end * k).mT
    if beta is None:
        U, W = v, None
        A = total
    else:
        lower = (k * beta[:, :, None]) @ k.mT * gamma
        right = torch.cat((v, k * G), -1) * beta[:, :, None]
        U, W = torch.linalg.solve_triangular(
            lower.tril(-1), right, upper=False, unitriangular=True
        ).split((v.shape[-1], K), -1)
        A = total * torch.eye(K, dtype=q.dtype, device=q.device) - K_end @ W
    B = K_end @ U
    starts, ends = [], []
    for a, b, count, after in zip(
        A.split(counts), B.split(counts), counts, [*counts[1:], 0], strict=True
    ):
        starts.append(S)
        S = torch.baddbmm(b, a, S) if beta is not None else b + a * S
        ends.append(S[after:count])
        S = S[:after]
    states = torch.cat(starts)
    if W is not None:
        U = torch.baddbmm(U, W, states, alpha=-1)
    o = torch.baddbmm((q * G) @ states, q @ k.mT * gamma, U)
    return o, torch.cat(ends[::-1])
