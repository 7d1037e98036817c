"""The neural memory in closed form per tile, plain torch.

Every gradient is an outer product ``a_i^T e_i`` of a layer's input and its error, so none is ever
formed: every sum over them is attention with the weights of `tile_gates` (see `layer`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memlm.cuda.neural_memory.gates import TileGates
from memlm.cuda.neural_memory.inputs import Rule
from memlm.cuda.neural_memory.layer import (
    GeluWithSlope,
    advance,
    gain_and_advance,
    read_and_advance,
    read_start_and_advance,
)
from memlm.cuda.neural_memory.state import NORM_EPS, Layers

# Activations of the tiles between two kept states: what a backward pass has at hand at a time.
GROUP_BYTES = 256 * 2**20


class Solution(NamedTuple):
    """Outputs ``[M, C, D]``; of every row the anchor of its last tile and the weights and momentum
    after it ``[rows, d_in, d_out]``; surprise and squared gradient norm ``[M, C]``, detached, if
    they are asked for."""

    o: Tensor
    anchor: Layers
    weights: Layers
    momentum: Layers
    surprise: Tensor | None
    square: Tensor | None


class TileErrors(NamedTuple):
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
    ends: Tensor | None = None,
    statistics: bool = True,
) -> Solution:
    """Walk through the tiles of all rows.

    Args:
        q, k, v: ``[M, C, D]``, tiles in step-major order (`ChunkLayout`).
        anchor, weights, momentum: ``[rows, d_in, d_out]`` per layer, a gain as ``[rows, 1, D]``;
            anchor may be empty if ``rule.exact``.
        counts: rows active at every step, descending.
        refresh_every: steps between refreshes of the anchor, 0 = never.
        ends: bool ``[M]``, given where every tile is a chunk and the weights change at its end
            only: the tiles that reach theirs.
        statistics: whether surprise and gradient norm are wanted.
    """
    if ends is not None:  # None for a step in which all do
        ends = [None if bool(step.all()) else step for step in ends.split(counts)]
    parts = list(
        zip(q.split(counts), k.split(counts), v.split(counts), gates.split(counts), strict=True)
    )
    group = _group_size(q, weights, counts)
    steps = len(counts)
    state = _State(anchor, weights, momentum)
    outputs, finished = [], []
    for start in range(0, steps, group):
        part = range(start, min(start + group, steps))
        arguments = (part, parts, counts, refresh_every, rule, ends, statistics, state)
        # The backward pass begins with the last group: what it needs is kept.
        if torch.is_grad_enabled() and part.stop < steps:
            found = checkpoint(_walk, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            found = _walk(*arguments)
        state = found[2]
        outputs += found[0]
        finished += found[1]
    ended = (
        tuple(torch.cat(rows[::-1]) for rows in zip(*layers, strict=True))
        for layers in zip(*finished, strict=True)
    )
    o, *found = (torch.cat(x) for x in zip(*outputs, strict=True))
    found = [x.detach() for x in found] if statistics else [None, None]
    return Solution(o, *ended, *found)


def _group_size(q: Tensor, weights: Layers, counts: list[int]) -> int:
    """Steps between two kept states."""
    size, D = q.shape[1:]
    width = 4 * size + 8 * D + 8 * sum(w.shape[-1] for w in weights)
    state = 2 * sum(w.shape[1] * w.shape[2] for w in weights)
    per_step = counts[0] * (size * width + state) * q.element_size()
    return max(1, GROUP_BYTES // per_step)


class _State(NamedTuple):
    """Per layer ``[rows, d_in, d_out]``."""

    anchor: Layers
    weights: Layers
    momentum: Layers

    def rows(self, chosen: slice) -> "_State":
        return _State(*(tuple(x[chosen] for x in layers) for layers in self))


def _walk(
    steps: range,
    parts: list[tuple[Tensor, Tensor, Tensor, TileGates]],
    counts: list[int],
    refresh_every: int,
    rule: Rule,
    ends: list[Tensor | None] | None,
    statistics: bool,
    state: _State,
) -> tuple[list[tuple[Tensor, ...]], list[_State], _State]:
    """Some steps: outputs (and surprise and squared norm) of each, the rows that ended in them, and
    the state of those that go on."""
    outputs, finished = [], []
    ahead = None
    if not (refresh_every or rule.exact) and counts[steps[0]] == counts[steps[-1]]:
        ahead = _errors_of_all(state.anchor, [parts[step] for step in steps])
    for place, step in enumerate(steps):
        Q, K, V, gate = parts[step]
        anchor, weights, momentum = state
        if step > 0 and refresh_every and step % refresh_every == 0:
            anchor = weights
        if ahead is not None:
            found = ahead[place]
        elif rule.exact:
            found = _exact_errors(K, V, gate, weights[0], momentum[0])
        else:
            found = errors_at(anchor, K, V)
        errors = found.errors
        square = square_norm(found) if statistics or rule.clip is not None else None
        if rule.clip is not None:
            scale = rule.clip * square.clamp_min(rule.clip**2).rsqrt().unsqueeze(-1)
            errors = [error * scale for error in errors]
        layers = list(zip(found.inputs, errors, weights, momentum, strict=True))
        if rule.read == "chunk_start":
            o = forward(Q, anchor)
            advanced = [advance(gate, *layer) for layer in layers]
        elif ends is not None:
            o, advanced = _read_chunk(Q, gate, layers, ends[step])
        else:
            o, advanced = _read(Q, gate, layers)
        outputs.append((o, found.loss, square) if statistics else (o,))
        state = _State(anchor, *(tuple(x) for x in zip(*advanced, strict=True)))
        after = counts[step + 1] if step + 1 < len(counts) else 0
        if after < len(Q):  # some rows end here
            finished.append(state.rows(slice(after, None)))
            state = state.rows(slice(0, after))
    return outputs, finished, state


def _gain(weights: Layers) -> Tensor | None:
    """The gain of the layer norm, kept like a layer with one input."""
    return weights[-1] if len(weights) > 1 and weights[-1].shape[-2] == 1 else None


def _exact_errors(K: Tensor, V: Tensor, gate: TileGates, w: Tensor, s: Tensor) -> TileErrors:
    """Every token's error at the weights of the token before, by one triangular system."""
    G = F.pad(gate.G[:, :-1], (0, 0, 1, 0))
    beta = F.pad(gate.beta[:, :-1], (1, 0), value=1).unsqueeze(-1)
    f = F.pad(gate.f[:, :-1], (1, 0)).unsqueeze(-1)
    start = torch.baddbmm(torch.baddbmm(V, beta * K, w, beta=-1), f * K, s)
    system = 2 * (K @ K.mT) * G
    half = torch.linalg.solve_triangular(system, start, upper=False, unitriangular=True)
    return TileErrors([K], [2 * half], half.square().sum(-1))


def errors_at(anchor: Layers, K: Tensor, V: Tensor) -> TileErrors:
    """All layers' inputs and errors at the anchor."""
    gain = _gain(anchor)
    layers = anchor if gain is None else anchor[:-1]
    if len(layers) == 1:
        difference = torch.baddbmm(V, K, layers[0], beta=-1)
        return TileErrors([K], [2 * difference], difference.square().sum(-1))
    inputs, slopes = [K], []
    Z = K @ layers[0]
    for w in layers[1:]:
        activation, slope = GeluWithSlope.apply(Z)
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
    return TileErrors(inputs, errors, difference.square().sum(-1))


def _errors_of_all(anchor: Layers, parts: list[tuple]) -> list[TileErrors]:
    """`errors_at` of several steps with the same rows, as products of all their tokens."""
    K, V = (torch.cat([part[place] for part in parts], 1) for place in (1, 2))
    found = errors_at(anchor, K, V)
    size = K.shape[1] // len(parts)
    layers = zip(
        zip(*(x.split(size, 1) for x in found.inputs), strict=True),
        zip(*(x.split(size, 1) for x in found.errors), strict=True),
        found.loss.split(size, 1),
        strict=True,
    )
    return [TileErrors(list(a), list(e), loss) for a, e, loss in layers]


def square_norm(found: TileErrors) -> Tensor:
    """Of every token's gradient over all layers, ``[rows, C]``; outer products make it free."""
    layers = zip(found.inputs, found.errors, strict=True)
    return sum(a.square().sum(-1) * e.square().sum(-1) for a, e in layers)


def _read_chunk(
    Q: Tensor, gate: TileGates, layers: list[tuple[Tensor, ...]], joins: Tensor | None
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """As `_read`, where the last query alone reads the weights at the tile's end and all others
    those at its start."""
    through = functools.partial(read_start_and_advance, joins=joins)
    o, advanced = _read(Q[:, :-1], gate, layers, through, through)
    return torch.cat((o, forward(Q[:, -1:], tuple(w for w, _ in advanced))), 1), advanced


def _read(
    Q: Tensor,
    gate: TileGates,
    layers: list[tuple[Tensor, ...]],
    through: Callable = read_and_advance,
    through_gain: Callable = gain_and_advance,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The queries through the memory as it is at each, and every layer's next weights and momentum.

    layers: inputs, errors, weights and momentum of each. through, through_gain: `read_and_advance`
    and `gain_and_advance` or the like.
    """
    y, *advanced = through(Q, gate, *layers[0])
    advanced = [advanced]
    if len(layers) == 1:
        return y, advanced
    gain = None
    for layer in layers[1:]:
        if layer[0].shape[-1] == 1:
            gain, *after = through_gain(torch.ones_like(Q[..., :1]), gate, *layer)
        else:
            y, *after = through(F.gelu(y), gate, *layer)
        advanced.append(after)
    y = F.layer_norm(y, y.shape[-1:], eps=NORM_EPS)
    return Q + (y if gain is None else y * (1 + gain)), advanced


def forward(x: Tensor, weights: Layers) -> Tensor:
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
