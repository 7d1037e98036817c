"""One layer of the memory over a tile: what its tokens read of it, and what they leave in it.

With the layer's inputs a and errors e at the anchor, queries x, and the weights W and momentum S at
the tile's start::

    y  = diag(beta) x W + diag(f) x S - ((x a^T) o G) e
    W' = beta_end W + f_end S - (diag(g_end) a)^T e        S' = mu_end S - (diag(n) a)^T e

The backward pass is written by hand: everything adds up in place.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from memlm.cuda.neural_memory.gates import TileGates


def read_and_advance(
    x: Tensor, gate: TileGates, a: Tensor, e: Tensor, W: Tensor, S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y ``[rows, C, d_out]``, W' and S' ``[rows, d_in, d_out]``."""
    return _Layer.apply(x, a, e, W, S, *gate)


def advance(gate: TileGates, a: Tensor, e: Tensor, W: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """W' and S' alone."""
    return _Layer.apply(None, a, e, W, S, *gate)[1:]


def _in_its_own_precision(backward: Callable) -> Callable:
    """A backward pass may itself be called under autocast."""

    @functools.wraps(backward)
    def wrapped(ctx, *gradients):
        with torch.autocast(ctx.saved_tensors[1].device.type, enabled=False):
            return backward(ctx, *gradients)

    return wrapped


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, e, W, S, G, beta, f, g_end, n, beta_end, f_end, mu_end):
        gates = [gate.unsqueeze(-1) for gate in (beta, f, g_end, n)]
        beta, f, g_end, n = gates
        ends = [gate[:, None, None] for gate in (beta_end, f_end, mu_end)]
        beta_end, f_end, mu_end = ends
        y = products = None
        if x is not None:
            products = torch.bmm(x, a.mT)
            y = torch.bmm(beta * x, W)
            y.baddbmm_(f * x, S).baddbmm_(products * G, e, alpha=-1)
        W_next = (W * beta_end).addcmul_(S, f_end).baddbmm_((g_end * a).mT, e, alpha=-1)
        S_next = (S * mu_end).baddbmm_((n * a).mT, e, alpha=-1)
        ctx.save_for_backward(x, a, e, W, S, G, products, *gates, *ends)
        ctx.set_materialize_grads(False)
        return y, W_next, S_next

    @staticmethod
    @_in_its_own_precision
    def backward(ctx, dy, dW_next, dS_next):
        x, a, e, W, S, G, products, beta, f, g_end, n, beta_end, f_end, mu_end = ctx.saved_tensors
        dx = da = de = dW = dS = dG = dbeta = df = None
        dg_end = dn = dbeta_end = df_end = dmu_end = None
        if dy is not None:
            towards = torch.bmm(dy, e.mT)
            dG = (towards * products).neg_()
            dproducts = towards.mul_(G).neg_()
            de = torch.bmm((products * G).mT, dy).neg_()
            da = torch.bmm(dproducts.mT, x)
            by_W, by_S = torch.bmm(dy, W.mT), torch.bmm(dy, S.mT)
            dbeta, df = ((by * x).sum(-1) for by in (by_W, by_S))
            dx = by_W.mul_(beta).addcmul_(by_S, f).baddbmm_(dproducts, a)
        if dW_next is not None:
            dW, dS = dW_next * beta_end, dW_next * f_end
            dbeta_end, df_end = ((dW_next * state).sum((1, 2)) for state in (W, S))
            by_end = torch.bmm(e, dW_next.mT).neg_()
            dg_end = (by_end * a).sum(-1)
            da, de = _plus(da, by_end.mul_(g_end)), _minus(de, g_end * a, dW_next)
        if dS_next is not None:
            dmu_end = (dS_next * S).sum((1, 2))
            dS = dS_next * mu_end if dS is None else dS.addcmul_(dS_next, mu_end)
            by_end = torch.bmm(e, dS_next.mT).neg_()
            dn = (by_end * a).sum(-1)
            da, de = _plus(da, by_end.mul_(n)), _minus(de, n * a, dS_next)
        if dy is not None:
            dW, dS = _plus_product(dW, beta * x, dy), _plus_product(dS, f * x, dy)
        gates = (dG, dbeta, df, dg_end, dn, dbeta_end, df_end, dmu_end)
        return dx, da, de, dW, dS, *gates


def _plus(total: Tensor | None, x: Tensor) -> Tensor:
    return x if total is None else total.add_(x)


def _minus(total: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """total - x y"""
    return torch.bmm(x, y).neg_() if total is None else total.baddbmm_(x, y, alpha=-1)


def _plus_product(total: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """total + x^T y"""
    return torch.bmm(x.mT, y) if total is None else total.baddbmm_(x.mT, y)


class GeluWithSlope(torch.autograd.Function):
    """gelu(x) and its derivative ``Phi(x) + x phi(x)``, from one pass over the normal density."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        density = (x * x).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        below = (x * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
        slope = torch.addcmul(below, x, density)
        ctx.save_for_backward(x, slope, density)
        return below.mul_(x), slope

    @staticmethod
    def backward(ctx, dgelu: Tensor, dslope: Tensor) -> Tensor:
        x, slope, density = ctx.saved_tensors
        curvature = (x * x).sub_(2).mul_(density).mul_(dslope)  # minus gelu'' = phi (2 - x^2)
        return torch.addcmul(curvature.neg_(), dgelu, slope)
