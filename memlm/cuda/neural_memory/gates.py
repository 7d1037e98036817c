"""Decay, momentum and step of the tokens as weights of whole tiles.

All gradients ``g_i`` of a tile are known before its first token is read, so the weights at token t
are linear in them and in what the tile starts with, weights W and momentum S::

    b, m = cumulative sums of log(1 - alpha), log(eta);   beta = exp(b);   mu = exp(m)
    La[t, i] = exp(b_t - b_i),  Le[t, i] = exp(m_t - m_i)  for i <= t, else 0
    G = La Le diag(theta)       f = La mu       n_i = Le[C, i] theta_i
    M_t = beta_t W + f_t S - sum_i G[t, i] g_i          S_C = mu_C S - sum_i n_i g_i
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memlm.cuda.chunking import ChunkLayout

LOG_ZERO = -60.0  # exp of less counts as zero, which keeps denormal numbers out of the products


class TileGates(NamedTuple):
    """Of M tiles of C slots.

    Attributes:
        G, beta, f: what token t reads, ``[M, C, C]``, ``[M, C]``, ``[M, C]``.
        g_end, n: what a gradient leaves in weights and momentum at the end, ``[M, C]``.
        beta_end, f_end, mu_end: of W in the weights, of S in the weights, of S in the momentum at
            the end, ``[M]``.
    """

    G: Tensor
    beta: Tensor
    f: Tensor
    g_end: Tensor
    n: Tensor
    beta_end: Tensor
    f_end: Tensor
    mu_end: Tensor

    def split(self, counts: list[int]) -> list["TileGates"]:
        """The gates of every step."""
        return [TileGates(*parts) for parts in zip(*(x.split(counts) for x in self), strict=True)]


def tile_gates(
    layout: ChunkLayout, alpha: Tensor, eta: Tensor, theta: Tensor, joins: Tensor | None
) -> TileGates:
    """The weights of all tiles.

    Args:
        alpha, eta, theta: ``[tokens, H]``.
        joins: bool ``[tokens]``, the tokens at which the momentum is added to the weights; None:
            all.
    """
    # alpha = 1 and eta = 0 have finite logs; their own gradients are zero there.
    forgotten = alpha >= 1
    b = torch.log1p(-alpha.masked_fill(forgotten, 0)).masked_fill(forgotten, LOG_ZERO)
    b = layout.to_chunks(b).cumsum(1)
    m = layout.to_chunks(eta.clamp_min(math.exp(LOG_ZERO)).log()).cumsum(1)
    theta = layout.to_chunks(theta)
    # Empty slots neither decay (log 0 = 1) nor step (theta 0), nor add momentum to the weights.
    joined = torch.ones_like(alpha)
    if joins is not None:
        joined = joined * joins[:, None]
    joined = layout.to_chunks(joined)
    La = _decay_matrix(b) * joined[:, None, :]
    Le = _decay_matrix(m)
    beta, mu = _exp(b), _exp(m)
    f = (La @ mu[:, :, None]).squeeze(-1)
    G = La @ Le * theta[:, None, :]
    n = Le[:, -1] * theta
    return TileGates(G, beta, f, G[:, -1], n, beta[:, -1], f[:, -1], mu[:, -1])


def _exp(x: Tensor) -> Tensor:
    return x.masked_fill(x < LOG_ZERO, -torch.inf).exp()


def _decay_matrix(x: Tensor) -> Tensor:
    """``exp(x_t - x_i)`` for i <= t, else 0, of x ``[M, C]``."""
    difference = x[:, :, None] - x[:, None, :]
    size = x.shape[1]
    upper = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    return _exp(difference.masked_fill(upper, -torch.inf))
