"""The neural memory in closed form per tile, plain torch.

Every gradient is an outer product ``a_i^T e_i`` of a layer's input and its error, so none is ever
formed: every sum over them is attention with the weights of `tile_gates`. Weights and momentum lie
one over the other, ``[rows, 2 d_in, d_out]``, so that one product reads both and one writes both.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memlm.cuda.neural_memory.gates import TileGates
from memlm.cuda.neural_memory.inputs import Rule
from memlm.cuda.neural_memory.state import NORM_EPS, Layers

# Activations of the tiles between two kept states: what a backward pass has at hand at a time.
GROUP_BYTES = 48 * 2**20


class Solution(NamedTuple):
    """Outputs ``[M, C, D]``; of every row the anchor of its last tile and the weights and momentum
    after it ``[rows, d_in, d_out]``; surprise and squared gradient norm ``[M, C]``, detached."""

    o: Tensor
    anchor: Layers
    weights: Layers
    momentum: Layers
    surprise: Tensor
    square: Tensor


class _Errors(NamedTuple):
    """Of a tile's keys: per layer its inputs and its errors, and the loss."""

    inputs: list[Tensor]
    errors: list[Tensor]
    loss: Tensor


def solve_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: TileGates,
    anchor: Layers,
    weights: Layers,
    momentum: Layers,
    counts: list[int],
    refresh_every: int,
    rule: Rule,
) -> Solution:
    """Walk through the tiles of all rows.

    Args:
        q, k, v: ``[M, C, D]``, tiles in step-major order (`ChunkLayout`).
        anchor, weights, momentum: ``[rows, d_in, d_out]`` per layer, a gain as ``[rows, 1, D]``;
            anchor may be empty if ``rule.exact``.
        counts: rows active at every step, descending.
        refresh_every: steps between refreshes of the anchor, 0 = never.
    """
    stacked = [torch.cat(pair, 1) for pair in zip(weights, momentum, strict=True)]
    depth = len(weights)
    parts = list(
        zip(q.split(counts), k.split(counts), v.split(counts), gates.split(counts), strict=True)
    )
    group = _group_size(q, weights, counts)
    differentiable = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q, k, v, *gates, *anchor, *stacked)
    )
    columns, finished = [], []
    for start in range(0, len(counts), group):
        steps = range(start, min(start + group, len(counts)))
        following = [*counts[start + 1 : steps.stop], *counts[steps.stop : steps.stop + 1]]
        following += [0] * (len(steps) - len(following))
        arguments = (steps, parts, following, refresh_every, rule, tuple(anchor), *stacked)
        if differentiable and group < len(counts):
            found = checkpoint(_walk, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            found = _walk(*arguments)
        outputs, ended, anchor, stacked = found
        columns += outputs
        finished += ended
    ended = [torch.cat(x[::-1]) for x in zip(*finished, strict=True)]
    halves = [x.chunk(2, 1) for x in ended[len(ended) - depth :]]
    o, surprise, square = (torch.cat(x) for x in zip(*columns, strict=True))
    return Solution(
        o,
        tuple(ended[: len(ended) - depth]),
        *(tuple(x) for x in zip(*halves, strict=True)),
        surprise.detach(),
        square.detach(),
    )


def _group_size(q: Tensor, weights: Layers, counts: list[int]) -> int:
    """Steps between two kept states."""
    size, D = q.shape[1:]
    width = 4 * size + 8 * D + 12 * sum(w.shape[-1] for w in weights)
    state = 4 * sum(w.shape[1] * w.shape[2] for w in weights)
    per_step = counts[0] * (size * width + state) * q.element_size()
    return max(1, GROUP_BYTES // per_step)


def _walk(
    steps: range,
    parts: list[tuple[Any, ...]],
    following: list[int],
    refresh_every: int,
    rule: Rule,
    anchor: Layers,
    *stacked: Tensor,
) -> tuple[list[tuple[Tensor, ...]], list[list[Tensor]], Layers, list[Tensor]]:
    """Some steps: outputs and statistics of each, what ended in them, the anchor and the stacked
    weights and momenta of the rows that go on."""
    outputs, finished, stacked = [], [], list(stacked)
    for step, after in zip(steps, following, strict=True):
        Q, K, V, gate = parts[step]
        if step > 0 and refresh_every and step % refresh_every == 0:
            anchor = tuple(x[:, : x.shape[1] // 2] for x in stacked)
        found = _exact_errors(K, V, gate, *stacked) if rule.exact else _errors(K, V, anchor)
        errors, square = found.errors, _square_norm(found)
        if rule.clip is not None:
            scale = rule.clip * square.clamp_min(rule.clip**2).rsqrt().unsqueeze(-1)
            errors = [error * scale for error in errors]
        if rule.read == "chunk_start":
            o = _forward(Q, anchor)
        else:
            o = _read(Q, gate, found.inputs, errors, stacked)
        outputs.append((o, found.loss, square))
        stacked = [
            _advance(gate, *layer) for layer in zip(found.inputs, errors, stacked, strict=True)
        ]
        if after < len(Q):  # some rows end here
            finished.append([x[after:] for x in (*anchor, *stacked)])
            anchor, stacked = tuple(x[:after] for x in anchor), [x[:after] for x in stacked]
    return outputs, finished, anchor, stacked


def _gain(weights: Layers) -> Tensor | None:
    """The gain of the layer norm, kept like a layer with one input."""
    return weights[-1] if len(weights) > 1 and weights[-1].shape[-2] == 1 else None


def _exact_errors(K: Tensor, V: Tensor, gate: TileGates, stacked: Tensor) -> _Errors:
    """Every token's error at the weights of the token before, by one triangular system."""
    before = TileGates(
        F.pad(gate.G[:, :-1], (0, 0, 1, 0)),
        F.pad(gate.beta[:, :-1], (1, 0), value=1),
        F.pad(gate.f[:, :-1], (1, 0)),
        *gate[3:],
    )
    start = _from_start(K, before, stacked) - V
    system = 2 * (K @ K.mT) * before.G
    half = torch.linalg.solve_triangular(system, start, upper=False, unitriangular=True)
    return _Errors([K], [2 * half], half.square().sum(-1))


def _errors(K: Tensor, V: Tensor, anchor: Layers) -> _Errors:
    """All layers' inputs and errors at the anchor."""
    gain = _gain(anchor)
    layers = anchor if gain is None else anchor[:-1]
    if len(layers) == 1:
        difference = torch.baddbmm(V, K, layers[0], beta=-1)
        return _Errors([K], [2 * difference], difference.square().sum(-1))
    inputs, slopes = [K], []
    Z = K @ layers[0]
    for w in layers[1:]:
        activation, slope = _GeluWithSlope.apply(Z)
        inputs.append(activation)
        slopes.append(slope)
        Z = activation @ w
    centred = Z - Z.mean(-1, keepdim=True)
    inverse_std = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    normed = centred * inverse_std
    difference = (K - V) + (normed if gain is None else normed * (1 + gain))
    d = 2 * difference
    by_gain = d * normed
    if gain is not None:
        d = d * (1 + gain)
    along = by_gain.mean(-1, keepdim=True) if gain is None else (d * normed).mean(-1, keepdim=True)
    error = (d - d.mean(-1, keepdim=True) - normed * along) * inverse_std
    errors = [error]
    for w, slope in zip(layers[:0:-1], reversed(slopes), strict=True):
        error = (error @ w.mT) * slope
        errors.insert(0, error)
    if gain is not None:
        inputs.append(torch.ones_like(K[..., :1]))
        errors.append(by_gain)
    return _Errors(inputs, errors, difference.square().sum(-1))


def _square_norm(found: _Errors) -> Tensor:
    """Of every token's gradient over all layers, ``[rows, C]``; outer products make it free."""
    layers = zip(found.inputs, found.errors, strict=True)
    return sum(a.square().sum(-1) * e.square().sum(-1) for a, e in layers)


def _from_start(x: Tensor, gate: TileGates, stacked: Tensor) -> Tensor:
    """x through what the tile started with."""
    return torch.cat((gate.beta.unsqueeze(-1) * x, gate.f.unsqueeze(-1) * x), -1) @ stacked


def _apply(x: Tensor, gate: TileGates, inputs: Tensor, error: Tensor, stacked: Tensor) -> Tensor:
    """``x_t`` through a layer with the weights of token t."""
    start = _from_start(x, gate, stacked)
    return torch.baddbmm(start, x @ inputs.mT * gate.G, error, alpha=-1)


def _read(
    Q: Tensor,
    gate: TileGates,
    inputs: list[Tensor],
    errors: list[Tensor],
    stacked: list[Tensor],
) -> Tensor:
    """The queries through the memory as it is at each."""
    layers = list(zip(inputs, errors, stacked, strict=True))
    if len(layers) == 1:
        return _apply(Q, gate, *layers[0])
    gain = layers.pop() if stacked[-1].shape[1] == 2 and inputs[-1].shape[-1] == 1 else None
    y = _apply(Q, gate, *layers[0])
    for layer in layers[1:]:
        y = _apply(F.gelu(y), gate, *layer)
    y = F.layer_norm(y, y.shape[-1:], eps=NORM_EPS)
    if gain is not None:
        y = y * (1 + _apply(gain[0], gate, *gain))
    return Q + y


def _forward(x: Tensor, weights: Layers) -> Tensor:
    """x through the memory with the same weights for all."""
    gain = _gain(weights)
    layers = weights if gain is None else weights[:-1]
    y = x @ layers[0]
    if len(layers) == 1:
        return y
    for w in layers[1:]:
        y = F.gelu(y) @ w
    y = F.layer_norm(y, y.shape[-1:], eps=NORM_EPS)
    return x + (y if gain is None else y * (1 + gain))


def _advance(gate: TileGates, inputs: Tensor, error: Tensor, stacked: Tensor) -> Tensor:
    """Weights over momentum of a layer at the end of the tile."""
    w, s = stacked.chunk(2, 1)
    beta, f, mu = (x[:, None, None] for x in (gate.beta_end, gate.f_end, gate.mu_end))
    kept = torch.cat((torch.addcmul(beta * w, f, s), mu * s), 1)
    g_end, n = gate.g_end.unsqueeze(-1), gate.n.unsqueeze(-1)
    taken = torch.cat((g_end * inputs, n * inputs), -1)
    return torch.baddbmm(kept, taken.mT, error, alpha=-1)


class _GeluWithSlope(torch.autograd.Function):
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
