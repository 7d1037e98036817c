"""The neural memory in closed form per tile, plain torch.

Every gradient is an outer product ``a_i^T e_i`` of a layer's input and its error, so none is ever
formed: every sum over them is attention with the weights of `tile_gates` (see `layer`).
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memlm.cuda.neural_memory.chunks import Chunks, walk_chunks
from memlm.cuda.neural_memory.gates import TileGates
from memlm.cuda.neural_memory.inputs import Rule
from memlm.cuda.neural_memory.layer import advance, gain_and_advance, read_and_advance
from memlm.cuda.neural_memory.network import (
    Errors,
    clipped,
    errors_at,
    forward,
    read_through,
    square_norm,
)
from memlm.cuda.neural_memory.state import Layers, RowStates

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
    full: Tensor | None = None,
    statistics: bool = True,
    walker: type[torch.autograd.Function] = Chunks,
) -> Solution:
    """Walk through the tiles of all rows.

    Args:
        q, k, v: ``[M, C, D]``, tiles in step-major order (`ChunkLayout`).
        anchor, weights, momentum: ``[rows, d_in, d_out]`` per layer, a gain as ``[rows, 1, D]``;
            anchor may be empty if ``rule.exact``.
        counts: rows active at every step, descending.
        refresh_every: steps between refreshes of the anchor, 0 = never.
        full: bool ``[M]``, given where every tile is a chunk and the weights change at its end
            only: the tiles with a token in their last slot.
        statistics: whether surprise and gradient norm are wanted.
        walker: goes through the chunks with a layer, where `full` is given.
    """
    if full is not None:
        walk = functools.partial(
            walk_chunks, tokens=(q, k, v), gates=gates, full=full, walker=walker
        )
    else:
        tiles = [x.split(counts) for x in (q, k, v)]
        walk = functools.partial(_walk, parts=list(zip(*tiles, gates.split(counts), strict=True)))
    walk = functools.partial(
        walk, counts=counts, refresh_every=refresh_every, rule=rule, statistics=statistics
    )
    kept_states = 1 if full is None else 1 / walker.kept_every(q.shape[1])
    group = _group_size(q, weights, counts, kept_states)
    steps = len(counts)
    state = RowStates(anchor, weights, momentum)
    outputs, finished = [], []
    for start in range(0, steps, group):
        part = range(start, min(start + group, steps))
        # The backward pass begins with the last group: what it needs is kept.
        if torch.is_grad_enabled() and part.stop < steps:
            found = checkpoint(
                walk, part, state=state, use_reentrant=False, preserve_rng_state=False
            )
        else:
            found = walk(part, state=state)
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


def _group_size(q: Tensor, weights: Layers, counts: list[int], kept_states: float) -> int:
    """Steps between two checkpoints; `kept_states` of a step's state is kept between them."""
    size, D = q.shape[1:]
    width = 4 * size + 8 * D + 8 * sum(w.shape[-1] for w in weights)
    state = 2 * kept_states * sum(w.shape[1] * w.shape[2] for w in weights)
    per_step = counts[0] * (size * width + state) * q.element_size()
    return max(1, int(GROUP_BYTES / per_step))


def _walk(
    steps: range,
    parts: list[tuple[Tensor, Tensor, Tensor, TileGates]],
    counts: list[int],
    refresh_every: int,
    rule: Rule,
    statistics: bool,
    state: RowStates,
) -> tuple[list[tuple[Tensor, ...]], list[RowStates], RowStates]:
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
        errors = found.errors if rule.clip is None else clipped(found, rule.clip)
        layers = list(zip(found.inputs, errors, weights, momentum, strict=True))
        if rule.read == "chunk_start":
            o = forward(Q, anchor)
            advanced = [advance(gate, *layer) for layer in layers]
        else:
            through = functools.partial(read_and_advance, gate)
            o, advanced = read_through(
                Q, layers, through, functools.partial(gain_and_advance, gate)
            )
        outputs.append((o, found.loss, square_norm(found)) if statistics else (o,))
        state = RowStates(anchor, *map(tuple, zip(*advanced, strict=True)))
        after = counts[step + 1] if step + 1 < len(counts) else 0
        if after < len(Q):  # some rows end here
            finished.append(state.rows(slice(after, None)))
            state = state.rows(slice(0, after))
    return outputs, finished, state


def _exact_errors(K: Tensor, V: Tensor, gate: TileGates, w: Tensor, s: Tensor) -> Errors:
    """Every token's error at the weights of the token before, by one triangular system."""
    G = F.pad(gate.G[:, :-1], (0, 0, 1, 0))
    beta = F.pad(gate.beta[:, :-1], (1, 0), value=1).unsqueeze(-1)
    f = F.pad(gate.f[:, :-1], (1, 0)).unsqueeze(-1)
    start = torch.baddbmm(torch.baddbmm(V, beta * K, w, beta=-1), f * K, s)
    system = 2 * (K @ K.mT) * G
    half = torch.linalg.solve_triangular(system, start, upper=False, unitriangular=True)
    return Errors([K], [2 * half], half.square().sum(-1))


def _errors_of_all(anchor: Layers, parts: list[tuple]) -> list[Errors]:
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
    return [Errors(list(a), list(e), loss) for a, e, loss in layers]
