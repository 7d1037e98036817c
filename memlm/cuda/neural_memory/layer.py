"""One layer of the memory over a tile: what its tokens read of it, and what they leave in it.

With the layer's inputs a and errors e at the anchor, queries x, and the weights W and momentum S at
the tile's start::

    y  = diag(beta) x W + diag(f) x S - ((x a^T) o G) e
    W' = beta_end W + f_end S - (diag(g_end) a)^T e        S' = mu_end S - (diag(n) a)^T e

The backward pass is written by hand: everything adds up in place.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from memlm.cuda.neural_memory.gates import TileGates


def read_and_advance(
    gate: TileGates, x: Tensor, a: Tensor, e: Tensor, W: Tensor, S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y ``[rows, C, d_out]``, W' and S' ``[rows, d_in, d_out]``."""
    return _Layer.apply(x, a, e, W, S, *gate)


def advance(gate: TileGates, a: Tensor, e: Tensor, W: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """W' and S' alone."""
    return _Layer.apply(None, a, e, W, S, *gate)[1:]


def gain_and_advance(
    gate: TileGates, x: Tensor, a: Tensor, e: Tensor, W: Tensor, S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `read_and_advance` for the gain of the layer norm, ``[rows, 1, D]``: x and a are 1."""
    beta, f, g_end, n = (x.unsqueeze(-1) for x in (gate.beta, gate.f, gate.g_end, gate.n))
    beta_end, f_end, mu_end = (x[:, None, None] for x in gate[-3:])
    y = torch.baddbmm(torch.addcmul(beta * W, f, S), gate.G, e, alpha=-1)
    W_next = torch.baddbmm(torch.addcmul(beta_end * W, f_end, S), g_end.mT, e, alpha=-1)
    return y, W_next, torch.baddbmm(mu_end * S, n.mT, e, alpha=-1)


def in_its_own_precision(backward: Callable) -> Callable:
    """A backward pass may itself be called under autocast."""

    @functools.wraps(backward)
    def wrapped(ctx, *gradients):
        with torch.autocast(ctx.device_type, enabled=False):
            return backward(ctx, *gradients)

    return wrapped


class _Layer(torch.autograd.Function):
    """Gates scale whatever is narrower, a layer's inputs or its outputs."""

    @staticmethod
    def forward(ctx, x, a, e, W, S, G, beta, f, g_end, n, beta_end, f_end, mu_end):
        gates = [gate.unsqueeze(-1) for gate in (beta, f, g_end, n)]
        beta, f, g_end, n = gates
        ends = [gate[:, None, None] for gate in (beta_end, f_end, mu_end)]
        beta_end, f_end, mu_end = ends
        y = products = by_W = by_S = None
        if x is not None:
            products = torch.bmm(x, a.mT)
            if narrows(W):
                by_W, by_S = torch.bmm(x, W), torch.bmm(x, S)
                y = (beta * by_W).addcmul_(f, by_S)
            else:
                y = torch.bmm(beta * x, W).baddbmm_(f * x, S)
            y.baddbmm_(products * G, e, alpha=-1)
        W_next = _minus_outer((W * beta_end).addcmul_(S, f_end), g_end, a, e)
        S_next = _minus_outer(S * mu_end, n, a, e)
        ctx.save_for_backward(x, a, e, W, S, G, products, by_W, by_S, *gates, *ends)
        ctx.device_type = a.device.type
        ctx.set_materialize_grads(False)
        return y, W_next, S_next

    @staticmethod
    @in_its_own_precision
    def backward(ctx, dy, dW_next, dS_next):
        x, a, e, W, S, G, products, y_W, y_S, beta, f, g_end, n, *ends = ctx.saved_tensors
        beta_end, f_end, mu_end = ends
        dx = da = de = dW = dS = dG = dbeta = df = None
        dg_end = dn = dbeta_end = df_end = dmu_end = None
        if dy is not None:
            towards = torch.bmm(dy, e.mT)
            dG = (towards * products).neg_()
            dproducts = towards.mul_(G).neg_()
            de = torch.bmm((products * G).mT, dy).neg_()
            da = torch.bmm(dproducts.mT, x)
            if narrows(W):
                dbeta, df = (y_W * dy).sum(-1), (y_S * dy).sum(-1)
                of_W, of_S = (x, beta * dy), (x, f * dy)
                dx = torch.bmm(of_W[1], W.mT).baddbmm_(of_S[1], S.mT)
            else:
                by_W, by_S = torch.bmm(dy, W.mT), torch.bmm(dy, S.mT)
                dbeta, df = (by_W * x).sum(-1), (by_S * x).sum(-1)
                of_W, of_S = (beta * x, dy), (f * x, dy)
                dx = by_W.mul_(beta).addcmul_(by_S, f)
            dx.baddbmm_(dproducts, a)
        if dW_next is not None:
            dW, dS = dW_next * beta_end, dW_next * f_end
            dbeta_end, df_end = dot(dW_next, W), dot(dW_next, S)
            dg_end, da, de = _outer_gradients(dW_next, g_end, a, e, da, de)
        if dS_next is not None:
            dmu_end = dot(dS_next, S)
            dS = dS_next * mu_end if dS is None else dS.addcmul_(dS_next, mu_end)
            dn, da, de = _outer_gradients(dS_next, n, a, e, da, de)
        if dy is not None:
            dW, dS = _plus_product(dW, *of_W), _plus_product(dS, *of_S)
        gates = (dG, dbeta, df, dg_end, dn, dbeta_end, df_end, dmu_end)
        return dx, da, de, dW, dS, *gates


def narrows(W: Tensor) -> bool:
    """Whether a layer has fewer outputs than inputs."""
    return W.shape[-1] < W.shape[-2]


def _minus_outer(state: Tensor, gate: Tensor, a: Tensor, e: Tensor) -> Tensor:
    """state - (diag(gate) a)^T e, in place."""
    if narrows(state):
        return state.baddbmm_(a.mT, gate * e, alpha=-1)
    return state.baddbmm_((gate * a).mT, e, alpha=-1)


def _outer_gradients(
    d: Tensor, gate: Tensor, a: Tensor, e: Tensor, da: Tensor | None, de: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `_minus_outer`, for its result's gradient d: dgate, and da and de added to those given."""
    if narrows(d):
        by = torch.bmm(a, d)
        dgate = (by * e).sum(-1).neg_()
        return dgate, _minus(da, gate * e, d.mT), _minus_scaled(de, by, gate)
    by = torch.bmm(e, d.mT)
    dgate = (by * a).sum(-1).neg_()
    return dgate, _minus_scaled(da, by, gate), _minus(de, gate * a, d)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the products of each row's entries, ``[rows]``, without a tensor of the products."""
    return torch.bmm(x.reshape(len(x), 1, -1), y.reshape(len(y), -1, 1)).flatten()


def _minus_scaled(total: Tensor | None, x: Tensor, gate: Tensor) -> Tensor:
    """total - diag(gate) x"""
    return (x * gate).neg_() if total is None else total.addcmul_(x, gate, value=-1)


def _minus(total: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """total - x y"""
    return torch.bmm(x, y).neg_() if total is None else total.baddbmm_(x, y, alpha=-1)


def _plus_product(total: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """total + x^T y"""
    return torch.bmm(x.mT, y) if total is None else total.baddbmm_(x.mT, y)
