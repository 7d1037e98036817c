"""Sequences laid out in tiles, solved, and put together again.

A tile is what is computed at once; unlike the chunk it is a matter of speed. A tile never reaches
over a refresh of the anchor.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memlm.cuda.chunking import ChunkLayout
from memlm.cuda.neural_memory.gates import TileGates, tile_gates
from memlm.cuda.neural_memory.inputs import Rule
from memlm.cuda.neural_memory.state import Layers, NeuralMemoryState


class TileSizes(NamedTuple):
    """Slots of a tile: at most `longest`; powers of two from `shortest` on, if that is given; as
    many as a chunk has with `whole_chunks`."""

    longest: int
    shortest: int | None = None
    whole_chunks: bool = False

    def fit(self, tokens: int) -> int:
        """The size of equal tiles for so many tokens, with few empty slots."""
        size = -(-tokens // -(-tokens // self.longest))
        if self.shortest is None:
            return size
        return max(self.shortest, 1 << (size - 1).bit_length())


def lay_out(
    rule: Rule, offset: Tensor, lengths: Tensor, sizes: TileSizes
) -> tuple[ChunkLayout, int]:
    """The tiles of sequences of `lengths` whose states are at `offset`, and the number of tiles
    between refreshes of the anchor (0: it stays the same)."""
    longest = int(lengths.max())
    if sizes.whole_chunks:
        size = rule.chunk_size
        layout = ChunkLayout.build(lengths, size, offset, rule.cycle)
        return layout, rule.refresh // size
    period = 0 if rule.exact else rule.refresh
    if period == 0 or bool((offset + lengths <= period).all()):
        return ChunkLayout.build(lengths, sizes.fit(longest)), 0
    size = sizes.fit(period)
    return ChunkLayout.build(lengths, size, offset, period), -(-period // size)


def token_gates(
    rule: Rule, alpha: Tensor, eta: Tensor, offset: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Decay and momentum of every token under the read convention, and the tokens (bool
    ``[tokens]``, None = all) at which the momentum is added to the weights."""
    if rule.read != "chunk_gates":
        return alpha, eta, None
    starts = lengths.cumsum(0) - lengths
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=alpha.device), lengths)
    place = torch.arange(len(alpha), device=alpha.device) + (offset - starts)[sequence]
    begins = place % rule.chunk_size == 0
    ends = (place + 1) % rule.chunk_size == 0
    alpha = torch.where(ends[:, None], alpha, 0)
    eta = torch.where(begins[:, None], eta, 1)
    return alpha, eta, ends


def run_tiles(
    solve,
    sizes: TileSizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    state: NeuralMemoryState,
    rule: Rule,
    lengths: Tensor,
) -> tuple[Tensor, NeuralMemoryState, Tensor | None, Tensor | None]:
    """As `neural_memory_reference`, by a solver of tiles such as `eager.solve_tiles`; surprise and
    gradient norm None where the solver does not find them."""
    if len(q) == 0:
        return torch.zeros_like(v), state, theta.detach(), theta.detach()
    layout, refresh_every = lay_out(rule, state.offset, lengths, sizes)
    heads = q.shape[1]
    alpha, eta, joins = token_gates(rule, alpha, eta, state.offset, lengths)
    gates: TileGates = tile_gates(layout, alpha, eta, theta, joins)
    active = layout.order[: layout.counts[0]]

    def gather(layers: Layers) -> Layers:
        rows = (w.index_select(0, active).flatten(0, 1) for w in layers)
        return tuple(w if w.ndim == 3 else w.unsqueeze(1) for w in rows)

    more = {}
    if sizes.whole_chunks:  # a chunk is complete where its last slot holds a token
        more["full"] = layout.to_chunks(torch.ones_like(alpha))[:, -1] > 0
    found = solve(
        *map(layout.to_chunks, (q, k, v)),
        gates,
        gather(state.anchor),
        gather(state.weights),
        gather(state.momentum),
        [count * heads for count in layout.counts],
        refresh_every,
        rule,
        **more,
    )

    def scatter(layers: Layers, old: Layers) -> Layers:
        merged = []
        for x, before in zip(layers, old, strict=True):
            rows = x.reshape(-1, *before.shape[1:])
            idle = before.index_select(0, layout.order[layout.counts[0] :])
            merged.append(torch.cat((rows, idle)).index_select(0, layout.inverse_order))
        return tuple(merged)

    anchor, weights, momentum = (
        scatter(layers, old)
        for layers, old in (
            (found.anchor, state.anchor),
            (found.weights, state.weights),
            (found.momentum, state.momentum),
        )
    )
    offset = rule.offset_after(state.offset, lengths)
    surprise, square = (
        None if x is None else layout.from_chunks(x.unsqueeze(-1), heads).squeeze(-1)
        for x in (found.surprise, found.square)
    )
    final = NeuralMemoryState(anchor, weights, momentum, offset)
    if rule.refresh and not rule.exact:
        final = final.refreshed((offset == 0) & (lengths > 0))
    return (
        layout.from_chunks(found.o, heads),
        final,
        surprise,
        None if square is None else square.sqrt(),
    )
