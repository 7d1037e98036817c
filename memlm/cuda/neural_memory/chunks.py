"""The neural memory where its weights change at the end of a chunk only, plain torch.

With ``read="chunk_gates"`` a tile is a chunk. For a layer with inputs a and errors e at the anchor,
queries x, and weights W and momentum S at the start of a chunk::

    S' = mu S - (diag(n) a)^T e          W' = beta W + S', or beta W if the chunk is not full

All queries of the chunk but the last read ``x W``, the last ``x W'``. The states of a layer do not
depend on what is read of the layer below, so a layer goes through many chunks before the next one
begins, and the loop is left with the products that contain a state. The backward pass is written
by hand.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.neural_memory.gates import TileGates
from memlm.cuda.neural_memory.inputs import Rule
from memlm.cuda.neural_memory.layer import dot, in_its_own_precision, narrows
from memlm.cuda.neural_memory.network import (
    GeluWithSlope,
    clipped,
    errors_at,
    read_through,
    square_norm,
)
from memlm.cuda.neural_memory.state import RowStates


def walk_chunks(
    steps: range,
    tokens: tuple[Tensor, Tensor, Tensor],
    gates: TileGates,
    full: Tensor,
    counts: list[int],
    refresh_every: int,
    rule: Rule,
    statistics: bool,
    walker: type[torch.autograd.Function],
    state: RowStates,
) -> tuple[list[tuple[Tensor, ...]], list[RowStates], RowStates]:
    """Some steps of `eager.solve_tiles`, whose tiles are chunks.

    Args:
        tokens: queries, keys and values ``[chunks, C, D]`` of all steps.
        full: bool ``[chunks]``, those with a token in their last slot.
        walker: `Chunks` or what does the same.

    Returns:
        Outputs (and surprise and squared norm) of some chunks at a time, the rows that ended in
        these steps, and the state of those that go on.
    """
    outputs, finished = [], []
    first = sum(counts[: steps.start])
    for run in _runs(steps, counts, refresh_every):
        if run.start > 0 and refresh_every and run.start % refresh_every == 0:
            state = state._replace(anchor=state.weights)
        rows = counts[run.start]
        chosen = slice(first, first + rows * len(run))
        first = chosen.stop
        # By step and row, and by row and token.
        gate = TileGates(*(x[chosen].unflatten(0, (-1, rows)) for x in gates))
        q, k, v, n = (_by_row(x[chosen], rows) for x in (*tokens, gates.n))
        joins = full[chosen].view(-1, rows)
        found = errors_at(state.anchor, k, v, walker.gelu_with_slope)
        errors = found.errors if rule.clip is None else clipped(found, rule.clip)

        def through(x: Tensor, *layer: Tensor, n=n, gate=gate, joins=joins):
            return walker.apply(x, *layer, n, gate.beta_end, gate.mu_end, joins)

        layers = list(zip(found.inputs, errors, state.weights, state.momentum, strict=True))
        o, advanced = read_through(q, layers, through, through, walker.gelu)
        told = (o, found.loss, square_norm(found)) if statistics else (o,)
        outputs.append(tuple(_by_step(x, len(run)) for x in told))
        state = RowStates(state.anchor, *map(tuple, zip(*advanced, strict=True)))
        after = counts[run.stop] if run.stop < len(counts) else 0
        if after < rows:  # some rows end here
            finished.append(state.rows(slice(after, None)))
            state = state.rows(slice(0, after))
    return outputs, finished, state


def _runs(steps: range, counts: list[int], refresh_every: int) -> list[range]:
    """The steps in runs of the same rows and the same anchor."""

    def what(step: int) -> tuple[int, int]:
        return counts[step], step // refresh_every if refresh_every else 0

    runs = (list(run) for _, run in itertools.groupby(steps, what))
    return [range(run[0], run[-1] + 1) for run in runs]


def _by_row(x: Tensor, rows: int) -> Tensor:
    """``[steps * rows, C, *]`` to ``[rows, steps * C, *]``."""
    return x.unflatten(0, (-1, rows)).transpose(0, 1).flatten(1, 2)


def _by_step(x: Tensor, steps: int) -> Tensor:
    """Inverse of `_by_row`."""
    return x.unflatten(1, (steps, -1)).transpose(0, 1).flatten(0, 1)


class Chunks(torch.autograd.Function):
    """One layer over N chunks of C tokens.

    Takes x, a ``[rows, N * C, d_in]``, e ``[rows, N * C, d_out]``, W, S ``[rows, d_in, d_out]``,
    n ``[rows, N * C]``, beta, mu and full ``[N, rows]``; returns y ``[rows, N * C, d_out]`` and the
    last W and S. Of the states before a chunk, every `kept_every`-th is kept for the backward pass,
    which makes the others again: a few states stay in the cache, all do not.
    """

    # Of the network between its layers.
    gelu = staticmethod(F.gelu)
    gelu_with_slope = staticmethod(GeluWithSlope.apply)

    @staticmethod
    def kept_every(size: int) -> int:
        """Chunks of so many tokens between two kept states."""
        return 8

    @staticmethod
    def forward(ctx, x, a, e, W, S, n, beta, mu, full):
        n = n.unsqueeze(-1)
        joins = mu.new_empty(0) if bool(full.all()) else full.to(W.dtype)
        gates = [gate[..., None, None] for gate in (mu, beta, joins)]
        y = x.new_empty(*x.shape[:2], W.shape[-1])
        (*asking, last), (*answers, last_answer) = _reads(x, len(mu)), _reads(y, len(mu))
        kept, every = [], Chunks.kept_every(x.shape[1] // len(mu))
        for chunk, update in enumerate(_updates(gates, a, e, n, W)):
            if chunk % every == 0:
                kept += (W, S)
                W, S = W.clone(), S.clone()
            torch.bmm(asking[chunk], W, out=answers[chunk])
            _advance(W, S, update, (W, S))
        torch.bmm(last, W, out=last_answer)
        ctx.save_for_backward(x, a, e, n, *gates, W, *kept)
        ctx.device_type = x.device.type
        return y, W, S

    @staticmethod
    @in_its_own_precision
    def backward(ctx, dy, dW, dS):
        x, a, e, n, mu, beta, joins, W, *kept = ctx.saved_tensors
        kept = list(zip(kept[::2], kept[1::2], strict=True))
        chunks = len(mu)
        updates = _updates((mu, beta, joins), a, e, n, W)
        dx, da, de = (torch.empty_like(t) for t in (x, a, e))
        dbeta, dmu = mu.new_empty(2, *mu.shape[:2])
        dbetas, dmus = dbeta.unbind(), dmu.unbind()
        asking_mT = _reads(x.mT, chunks, dim=2)
        answers, dasking = _reads(dy, chunks), _reads(dx, chunks)
        das, des = (t.chunk(chunks, 1) for t in (da, de))
        dW = torch.baddbmm(dW, asking_mT[-1], answers[-1])
        torch.bmm(answers[-1], W.mT, out=dasking[-1])
        # Memory is written again rather than allocated: new pages cost more than the arithmetic.
        dS, decay = dS.clone(), torch.ones_like(mu[0])  # decay of the chunk behind
        every = Chunks.kept_every(x.shape[1] // chunks)
        states = W.new_empty(min(every, chunks) - 1, 2, *W.shape)
        places = [state.unbind() for state in states]
        for first in reversed(range(0, chunks, every)):
            part = range(first, min(first + every, chunks))
            before = [kept.pop()]
            for chunk, place in zip(part[:-1], places, strict=False):
                before.append(_advance(*before[-1], updates[chunk], place))
            for chunk in reversed(part):
                W, S = before.pop()
                mu, beta, joins, left_mT, right = updates[chunk]
                dbetas[chunk].copy_(dot(dW, W))
                torch.addcmul(dW if joins is None else dW * joins, dS, decay, out=dS)
                decay = mu
                dmus[chunk].copy_(dot(dS, S))
                torch.bmm(right, dS.mT, out=das[chunk])
                torch.bmm(left_mT.mT, dS, out=des[chunk])
                dW = dW.mul_(beta).baddbmm_(asking_mT[chunk], answers[chunk])
                torch.bmm(answers[chunk], W.mT, out=dasking[chunk])
        # Of the factors so far; the gate belongs to one of them.
        if narrows(W):
            dn = (de * e).sum(-1).neg_()
            de.mul_(n).neg_()
        else:
            dn = (da * a).sum(-1).neg_()
            da.mul_(n).neg_()
        return dx, da, de, dW, dS * decay, dn, dbeta, dmu, None


class _Update(NamedTuple):
    """What a chunk does to the states: mu, beta and joins ``[rows, 1, 1]`` (None: it is full), and
    the factors ``[rows, d_in, C]`` and ``[rows, C, d_out]`` of what is added to the momentum."""

    mu: Tensor
    beta: Tensor
    joins: Tensor | None
    left_mT: Tensor
    right: Tensor


def _updates(gates: Sequence[Tensor], a: Tensor, e: Tensor, n: Tensor, W: Tensor) -> list[_Update]:
    """Of every chunk; n scales whatever is narrower, a layer's inputs or its outputs."""
    mu, beta, joins = gates
    chunks = len(mu)
    left, right = (a, (n * e).neg_()) if narrows(W) else ((n * a).neg_(), e)
    joined = joins.unbind() if len(joins) else [None] * chunks
    factors = left.mT.chunk(chunks, 2), right.chunk(chunks, 1)
    return [_Update(*x) for x in zip(mu.unbind(), beta.unbind(), joined, *factors, strict=True)]


def _advance(W: Tensor, S: Tensor, update: _Update, out: Sequence[Tensor]) -> Sequence[Tensor]:
    """W and S after a chunk, in `out`."""
    W_next, S_next = out
    mu, beta, joins, left_mT, right = update
    torch.mul(S, mu, out=S_next).baddbmm_(left_mT, right)
    torch.addcmul(S_next if joins is None else S_next * joins, W, beta, out=W_next)
    return out


def _reads(x: Tensor, chunks: int, dim: int = 1) -> tuple[Tensor, ...]:
    """x in the pieces of tokens that read the weights before every chunk and after the last."""
    size = x.shape[dim] // chunks
    return x.split([size - 1, *[size] * (chunks - 1), 1], dim)
