"""The Triton kernels as a solver of tiles with a backward pass: depth 1 and 2."""

import torch
from torch import Tensor

from memlm.cuda.neural_memory import triton_linear, triton_mlp
from memlm.cuda.neural_memory.eager import Solution
from memlm.cuda.neural_memory.gates import TileGates
from memlm.cuda.neural_memory.inputs import Rule
from memlm.cuda.neural_memory.state import Layers


def longest_tile(depth: int, device: torch.device) -> int:
    """Most tokens of a tile that the kernels of this depth take there."""
    return triton_linear.LONGEST_TILE if depth == 1 else triton_mlp.longest_tile(device)


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
    """As `eager.solve_tiles`, without surprise and squared norm (None)."""
    depth = len(weights)
    layers = (*anchor, *weights, *momentum)
    options = (depth, counts, refresh_every, rule.exact)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *gates, *layers))
    o, *ended = _Tiles.apply(options, save, q, k, v, *gates, *layers)
    return Solution(o, *_in_parts(ended, depth), None, None)


def _in_parts(layers: list[Tensor], depth: int) -> list[Layers]:
    """Anchor (maybe empty), weights and momentum."""
    return [tuple(layers[: -2 * depth]), tuple(layers[-2 * depth : -depth]), tuple(layers[-depth:])]


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, save, q, k, v, *rest):
        depth, counts, refresh_every, exact = options
        gates, layers = TileGates(*rest[:8]), rest[8:]
        if depth == 1:
            anchor = None if exact else layers[0]
            o, *ended, saved = triton_linear.forward(
                q, k, v, gates, anchor, *layers[-2:], counts, refresh_every, exact, save
            )
            ended = [x for x in ended if x is not None]
        else:
            o, *ended, saved = triton_mlp.forward(
                q, k, v, gates, *_in_parts(layers, depth), counts, refresh_every, save
            )
            ended = [x for part in ended for x in part]
        ctx.options = options
        anchor = layers[: len(layers) - 2 * depth] if depth == 1 else ()
        ctx.anchors = len(anchor)
        ctx.save_for_backward(q, k, v, *gates, *anchor, *saved)
        return o, *ended

    @staticmethod
    def backward(ctx, do, *dended):
        depth, counts, refresh_every, exact = ctx.options
        q, k, v, *rest = ctx.saved_tensors
        gates, anchor, saved = (
            TileGates(*rest[:8]),
            rest[8 : 8 + ctx.anchors],
            rest[8:][ctx.anchors :],
        )
        if depth == 1:
            dended = (None, *dended) if exact else dended
            *dtokens, dgates, danchor, dW, dS = triton_linear.backward(
                q,
                k,
                v,
                gates,
                anchor[0] if anchor else None,
                counts,
                refresh_every,
                exact,
                saved,
                do,
                *dended,
            )
            dlayers = [x for x in (danchor, dW, dS) if x is not None]
        else:
            *dtokens, dgates, danchor, dW, dS = triton_mlp.backward(
                q, k, v, gates, counts, refresh_every, saved, do, *_in_parts(dended, depth)
            )
            dlayers = [*danchor, *dW, *dS]
        return None, None, *dtokens, *dgates, *dlayers
