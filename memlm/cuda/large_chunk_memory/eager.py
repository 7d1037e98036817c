"""The large-chunk memory as batched products over tiles of tokens, plain torch.

With ``a = K W1``, ``b = K W3`` and ``d = V W2^T`` (the gradient of ``<M(k), v>`` by what W2 reads)
all gradients of a tile are products over its tokens, steps applied per token::

    g1 = K^T (s1 d b silu'(a))      g3 = K^T (s3 d silu(a))      g2 = (s2 silu(a) b)^T V

A tile is a chunk where that wastes little, and a part of one where sequences are short or cut
elsewhere: gradients add up in `pending` until the chunk is complete.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from memlm.cuda.chunking import ChunkLayout
from memlm.cuda.large_chunk_memory.state import LargeChunkMemoryState, channel_norm, orthogonal

SMALLEST_TILE = 64  # tokens
WASTE = 1.25  # slots per token that a larger tile may cost


def large_chunk_memory_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    steps: Tensor,
    eta: Tensor | None,
    state: LargeChunkMemoryState,
    chunk_size: int,
    orthogonalise: bool,
    lengths: Tensor,
) -> tuple[Tensor, LargeChunkMemoryState]:
    """Same arguments and results as `large_chunk_memory_reference`."""
    if len(q) == 0:
        return torch.zeros_like(v), state
    layout, complete = _plan(lengths, state.offset, chunk_size)
    heads = q.shape[1]
    counts = [count * heads for count in layout.counts]
    tiles = [layout.to_chunks(x) for x in (q, k, v, steps.to(q.dtype))]
    gates = None if eta is None else layout.to_chunks(eta).sum(1).split(counts)
    tiles = zip(*(x.split(counts) for x in tiles), strict=True)

    # Weights, pending and, with momentum, momentum and the sum of its gates: a row per sequence
    # and head, sequences in the order of the layout.
    before = [*state.weights, *state.pending]
    if eta is not None:
        before += [*state.momentum, state.gate_sum]
    active = layout.order[: layout.counts[0]]
    carried = [x.index_select(0, active).flatten(0, 1) for x in before]
    outputs, finished = [], []
    for step, (Q, K, V, s) in enumerate(tiles):
        weights = tuple(w.to(Q.dtype) for w in carried[:2])
        outputs.append(_read(Q, weights))
        added = _gradients(K, V, s, weights)
        carried[2:4] = [p + g for p, g in zip(carried[2:4], added, strict=True)]
        if eta is not None:
            carried[6] = carried[6] + gates[step]
        if any(complete[step]):
            moved = _step(carried, chunk_size, orthogonalise, Q.dtype)
            if not all(complete[step]):
                rows = torch.tensor(complete[step], device=q.device).repeat_interleave(heads)
                moved = [
                    torch.where(rows.view(-1, *[1] * (new.ndim - 1)), new, old)
                    for new, old in zip(moved, carried, strict=True)
                ]
            carried = moved
        after = counts[step + 1] if step + 1 < len(counts) else 0
        if after < len(Q):  # some sequences end here
            finished.append([x[after:] for x in carried])
            carried = [x[:after] for x in carried]
    ended = [torch.cat(parts[::-1]) for parts in zip(*finished, strict=True)]
    untouched = layout.order[layout.counts[0] :]
    ended = [
        torch.cat((x.unflatten(0, (-1, heads)), old[untouched]))[layout.inverse_order]
        for x, old in zip(ended, before, strict=True)
    ]
    final = LargeChunkMemoryState(
        tuple(ended[:2]),
        tuple(ended[4:6]) if eta is not None else state.momentum,
        tuple(ended[2:4]),
        ended[6] if eta is not None else state.gate_sum,
        (state.offset + lengths) % chunk_size,
    )
    return layout.from_chunks(torch.cat(outputs), heads), final


def _plan(lengths: Tensor, offset: Tensor, chunk_size: int) -> tuple[ChunkLayout, list[list[bool]]]:
    """Lay the tokens out in tiles that divide a chunk.

    Returns the layout and for every step whether the tile of each active sequence ends its chunk.
    """
    spans = list(zip(lengths.tolist(), offset.tolist(), strict=True))
    longest = max(length for length, _ in spans)
    one_chunk = all(seen + length <= chunk_size for length, seen in spans)
    size = longest if one_chunk else chunk_size
    sizes = [size]
    while one_chunk and size >= 2 * SMALLEST_TILE:
        sizes.append(size := -(-size // 2))
    while not one_chunk and size >= 2 * SMALLEST_TILE and size % 2 == 0:
        sizes.append(size := size // 2)

    # Within one chunk a tile may begin anywhere.
    def start(seen: int, size: int) -> int:
        return 0 if one_chunk else seen % size

    def slots(size: int) -> int:
        return sum(
            -(-(start(seen, size) + length) // size) * size for length, seen in spans if length
        )

    enough = WASTE * sum(length for length, _ in spans)
    size = next((size for size in sizes if slots(size) <= enough), min(sizes, key=slots))
    layout = ChunkLayout.build(lengths, size, None if one_chunk else offset % size)
    ordered = [spans[i] for i in layout.order.tolist()]
    complete = []
    for step, count in enumerate(layout.counts):
        # Tokens of the sequence's chunks after this step, from the start of its current chunk.
        reached = [
            min(seen - start(seen, size) + (step + 1) * size, seen + length)
            for length, seen in ordered[:count]
        ]
        complete.append([tokens % chunk_size == 0 for tokens in reached])
    return layout, complete


def _read(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    gate, value = (x @ weights[0]).chunk(2, -1)
    return (F.silu(gate) * value) @ weights[1]


def _gradients(
    K: Tensor, V: Tensor, steps: Tensor, weights: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of ``steps * d<M(k), v> / dW``, shaped as the weights."""
    errors, inputs = _Swiglu.apply(K @ weights[0], V @ weights[1].mT, steps)
    return K.mT @ errors, inputs.mT @ V


def _step(
    carried: list[Tensor], chunk_size: int, orthogonalise: bool, dtype: torch.dtype
) -> list[Tensor]:
    """What is carried after a complete chunk."""
    up, down, *step = carried[:4]
    rest = []
    if len(carried) > 4:
        decay = (carried[6] / chunk_size)[:, None, None]
        step = [torch.addcmul(p, decay, s) for p, s in zip(step, carried[4:6], strict=True)]
        rest = [*step, torch.zeros_like(carried[6])]
    if orthogonalise:
        w1, w3, w2 = (orthogonal(x.to(dtype)) for x in (*step[0].chunk(2, -1), step[1]))
        step = [torch.cat((w1, w3), -1), w2]
    weights = []
    for w, change in zip((up, down), step, strict=True):
        moved = w + change
        weights.append(moved * (channel_norm(w) / channel_norm(moved)))
    return [*weights, *map(torch.zeros_like, carried[2:4]), *rest]


class _Swiglu(torch.autograd.Function):
    """Errors of W1 and W3 side by side, and the inputs of W2, times their steps.

    From ``z = [a, b]`` ``[M, C, 2 h]``, ``d`` ``[M, C, h]`` and the steps ``[M, C, 3]``. Keeps only
    these for the backward pass, where autograd would keep every factor.
    """

    @staticmethod
    def forward(ctx, z: Tensor, d: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, d, steps)
        a, b = z.chunk(2, -1)
        s1, s3, s2 = steps.split(1, -1)
        sigma = a.sigmoid()
        silu = a * sigma
        slope = sigma + silu * (1 - sigma)
        errors = torch.cat((s1 * (d * b * slope), s3 * (d * silu)), -1)
        return errors, s2 * (silu * b)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_errors: Tensor, grad_inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, d, steps = ctx.saved_tensors
        a, b = z.chunk(2, -1)
        sigma = a.sigmoid()
        silu = a * sigma
        slope = sigma + silu * (1 - sigma)
        curvature = sigma * (1 - sigma) * (2 + a * (1 - 2 * sigma))
        g1, g3 = grad_errors.chunk(2, -1)
        grad_steps = torch.cat(
            [
                x.sum(-1, keepdim=True)
                for x in (g1 * d * b * slope, g3 * d * silu, grad_inputs * silu * b)
            ],
            -1,
        )
        s1, s3, s2 = steps.split(1, -1)
        g1, g3, g2 = s1 * g1, s3 * g3, s2 * grad_inputs
        grad_a = d * (g1 * b * curvature + g3 * slope) + g2 * b * slope
        grad_b = g1 * d * slope + g2 * silu
        grad_d = g1 * b * slope + g3 * silu
        return torch.cat((grad_a, grad_b), -1), grad_d, grad_steps
