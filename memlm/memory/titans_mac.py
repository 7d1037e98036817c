"""Titans with the memory as context of attention (mac).

Behrouz et al., arXiv 2501.00663, section 4.1, in the paper's order, for each segment of a document:

1. retrieve: h_i = M(q_i) of its tokens S_i, with the weights at the end of the segment before;
2. attend: y_i over the persistent tokens, h_<=i and S_<=i (`memlm.layers.segment_attention`);
3. update the memory with y, token by token, and read it again, m_i = M_i(q(y_i));
4. gate y with m.

What the memory learns from is norm(S + y): the residual connection keeps the token itself in what
it stores. The retrieving queries share their projection with those of step 3, and have a short
convolution of their own.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.cuda.chunking import ChunkLayout
from memlm.layers.attention_state import AttentionState
from memlm.layers.context import SequenceLayout
from memlm.layers.convolution import ShortConvolution
from memlm.layers.segment_attention import SegmentAttention
from memlm.memory.base import AttendingMemory, CallContext
from memlm.memory.titans_attention import MemoryGate
from memlm.memory.titans_config import TitansConfig
from memlm.memory.titans_memory import Layers, TitansMemory, TitansState, unit_length


@dataclasses.dataclass
class TitansMACState(TitansState):
    """The memory, and what it said in the current segment.

    Attributes:
        segment_weights: per layer [B, H, d_in, d_out], those at the end of the segment before.
        retrieval_conv: [B, conv_size - 1, H * D], the last inputs of the retrieval's convolution.
        keys, values: [B, segment, num_key_value_heads, channels], of what was retrieved.
        positions: int64 [B, segment], positions of those in the document, -1 = none.
    """

    segment_weights: Layers
    retrieval_conv: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor

    def reset(self, rows: Tensor | None = None) -> "TitansMACState":
        cleared = super().reset(rows)
        empty = cleared.fresh if rows is None else rows
        positions = cleared.positions.masked_fill(empty[:, None], -1)
        return dataclasses.replace(cleared, positions=positions)


@dataclasses.dataclass
class _Tiles:
    """Segments of documents, slot by slot: M of them, or those of one step of the walk.

    Attributes:
        x: [M, segment, hidden_size].
        query, keys, values: [M, segment, heads, channels] of the attention.
        positions: int64 [M, segment], of the tokens of the call, -1 in other slots.
        key_positions: int64 [M, segment], of the keys: also those of earlier calls.
    """

    x: Tensor
    query: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    key_positions: Tensor

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the attention sees of the segment itself."""
        return self.keys, self.values, self.key_positions


class TitansMAC(AttendingMemory):
    """mac. Off: attention over the persistent tokens and the segment, normed.

    The memory is walked through segment by segment, all documents of the call side by side.
    """

    name = "titans"
    config: TitansConfig

    def __init__(self, config: TitansConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        self.memory = TitansMemory(config, hidden_size)
        H, D = self.memory.heads, self.memory.head_dim
        self.retrieval_conv = (
            ShortConvolution(H * D, config.conv_size) if config.conv_size else None
        )
        self.m_proj = nn.Linear(H * D, hidden_size, bias=False)
        self.retrieved_norm = nn.RMSNorm(hidden_size, norm_eps)
        self.attention = SegmentAttention(
            config.attention(), hidden_size, config.persistent_tokens, norm_eps
        )
        self.update_norm = nn.RMSNorm(hidden_size, norm_eps)
        self.gate = MemoryGate(hidden_size, norm_eps)

    def init_weights(self) -> None:
        """Nothing beside the memory's and the attention's own, linear layers and norms."""

    def init_state(self, batch_size: int, device=None, dtype=None) -> TitansMACState:
        memory = self.memory.init_state(batch_size, device, dtype)
        tile = self.attention.init_state(batch_size, device, dtype)
        reach = self.config.conv_size - 1 if self.config.conv_size else 0
        channels = self.memory.heads * self.memory.head_dim
        return TitansMACState(
            **vars(memory),
            segment_weights=tuple(torch.zeros_like(w) for w in memory.weights),
            retrieval_conv=torch.zeros(batch_size, reach, channels, device=device, dtype=dtype),
            keys=tile.keys,
            values=tile.values,
            positions=tile.positions,
        )

    def init_attention_state(self, batch_size: int, device=None, dtype=None) -> AttentionState:
        return self.attention.init_state(batch_size, device, dtype)

    def forward(
        self,
        hidden: Tensor,
        state: TitansMACState,
        context: CallContext,
        attention_state: AttentionState,
        use_memory: bool = True,
    ) -> tuple[Tensor, TitansMACState, AttentionState]:
        layout = context.layout
        tail = attention_state.tail
        if self.attention.convolution is not None:
            hidden, tail = self.attention.convolve(hidden, attention_state, layout)
        x = layout.pack(hidden)
        segment = self.config.segment
        grid = ChunkLayout.build(layout.lengths, segment, layout.first_position % segment)
        place = grid.chunk * segment + grid.slot  # of every token among all slots
        carried = layout.incoming(attention_state)
        tiles = self._lay(x.flatten(0, 1), layout.pack(context.position_ids), grid, carried)
        last = grid.chunk[layout.lengths.cumsum(0) - 1]
        attended = AttentionState(
            tiles.keys[last].to(carried.keys.dtype),
            tiles.values[last].to(carried.values.dtype),
            tiles.key_positions[last],
            carried.tail,
        )
        attended = layout.outgoing(attended, attention_state)
        attended = dataclasses.replace(attended, tail=tail)
        if not use_memory:
            y = self.attention.attend(tiles.query, tiles.positions, tiles.tokens)
            y = y.flatten(0, 1)[place].view_as(x)
            return layout.unpack(self.gate(y, None)), state, attended

        incoming = layout.incoming(state)
        retrieval, retrieval_tail = self._retrieval(x, incoming.retrieval_conv, layout)
        retrieval = grid.to_chunks(retrieval.flatten(0, 1).flatten(1)[:, None])
        y, o, final = self._walk(
            tiles, retrieval.unflatten(-1, (self.memory.heads, -1)), incoming, grid, context.write
        )
        y = y.flatten(0, 1)[place].view_as(x)
        order = place.argsort().argsort()
        self.memory.finish(layout, order)
        o = o[order].unflatten(0, x.shape[:2])
        output = layout.unpack(self.gate(y, self._spread(o)))
        if not context.write:
            return output, state, attended
        final = dataclasses.replace(
            final, retrieval_conv=retrieval_tail.to(state.retrieval_conv.dtype)
        )
        return output, layout.outgoing(final, state), attended

    def _lay(
        self, x: Tensor, positions: Tensor, grid: ChunkLayout, carried: AttentionState
    ) -> _Tiles:
        """Tokens [tokens, hidden_size] of the call and the keys of its first segments so far."""
        query, keys, values = self.attention.project(x, grid.slot)
        parts = [
            grid.to_chunks(part.flatten(1)[:, None]).unflatten(-1, part.shape[1:])
            for part in (x, query, keys, values)
        ]
        # Empty slots come out as zero.
        positions = grid.to_chunks(positions.flatten()[:, None] + 1) - 1
        first = grid.order
        for index, before in ((2, carried.keys), (3, carried.values)):
            parts[index] = _fill(parts[index], before[first], positions)
        key_positions = _fill(positions, carried.positions[first], positions)
        return _Tiles(*parts, positions, key_positions)

    def _retrieval(self, x: Tensor, tail: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Unit queries [B, T, H, D] of packed tokens, and the new tails of their convolution."""
        q = self.memory.q_proj(x)
        heads, channels = self.memory.heads, self.memory.head_dim
        if self.retrieval_conv is None:
            return unit_length(F.silu(q).unflatten(-1, (heads, channels))), tail
        (q,), tail = self.retrieval_conv(q, tail, layout, [(heads, channels, True)])
        return q, tail

    def _spread(self, o: Tensor) -> Tensor:
        """What the heads of the memory say, [..., H, D], as [..., hidden_size]."""
        return self.m_proj(o.flatten(-2))

    def _walk(
        self,
        tiles: _Tiles,
        retrieval: Tensor,
        incoming: TitansMACState,
        grid: ChunkLayout,
        write: bool,
    ) -> tuple[Tensor, Tensor, TitansMACState]:
        """Step through the segments of all pieces.

        Returns:
            y [M, segment, hidden_size]; o [tokens, H, D] in the order of their slots; the state
            after each piece, in the order of the pieces.
        """
        state = incoming.select(grid.order)
        state = dataclasses.replace(
            state,
            weights=self.memory.start(state.weights, state.fresh),
            segment_weights=self.memory.start(state.segment_weights, state.fresh),
        )
        counts = grid.counts
        steps = zip(*(part.split(counts) for part in vars(tiles).values()), strict=True)
        whole = (tiles.positions >= 0).all(1).split(counts)
        whole = torch.stack([part.all() for part in whole]).tolist()  # one transfer
        outputs, reads, ended = [], [], []
        for parts, queries, full, after in zip(
            steps, retrieval.split(counts), whole, [*counts[1:], 0], strict=True
        ):
            step = _Tiles(*parts)
            y, o, state = self._segment(step, queries, state, write, full)
            outputs.append(y)
            reads.append(o)
            if after < len(y):  # some documents end here
                ended.append(_rows(state, slice(after, None)))
                state = _rows(state, slice(0, after))
        final = _join(ended[::-1]).select(grid.inverse_order)
        return torch.cat(outputs), torch.cat(reads), final

    def _segment(
        self, tiles: _Tiles, retrieval: Tensor, state: TitansMACState, write: bool, full: bool
    ) -> tuple[Tensor, Tensor, TitansMACState]:
        """Steps 1 to 3 for one segment, or a part of one, of n documents; `full`: all whole."""
        count, segment, _ = tiles.x.shape
        filled = tiles.positions >= 0
        begins = filled[:, 0, None, None, None]
        held = zip(state.weights, state.segment_weights, strict=True)
        held = tuple(torch.where(begins, now, before) for now, before in held)
        index = None if full else filled.flatten().nonzero().squeeze(1)

        h = self.retrieved_norm(self._spread(self.memory.read(held, retrieval)))
        slots = torch.arange(segment, device=h.device).repeat(count)
        _, keys, values = self.attention.project(h.flatten(0, 1), slots)
        companions = [
            _fill(part.unflatten(0, (count, segment)), before, tiles.positions)
            for part, before in ((keys, state.keys), (values, state.values))
        ]
        places = _fill(tiles.positions, state.positions, tiles.positions)
        y = self.attention.attend(tiles.query, tiles.positions, (*companions, places), tiles.tokens)
        update = self.update_norm(tiles.x + y)
        borders = None
        if index is not None:
            update = update.flatten(0, 1)[index][None]
            borders = F.pad(filled.sum(1).cumsum(0), (1, 0))
        memory = TitansState(*(getattr(state, f.name) for f in dataclasses.fields(TitansState)))
        o, memory = self.memory(update, memory, borders, write)
        state = TitansMACState(
            **vars(memory),
            segment_weights=held,
            retrieval_conv=state.retrieval_conv,
            keys=companions[0].to(state.keys.dtype),
            values=companions[1].to(state.values.dtype),
            positions=places,
        )
        return y, o.flatten(0, 1), state

    def flops(self, tokens: int) -> int:
        """The memory and the attention, with a second set of keys and a second read."""
        linears = (self.m_proj, self.m_proj, self.gate.o_proj, self.memory.q_proj)
        linears += (self.attention.k_proj, self.attention.v_proj)
        matrices = sum(linear.weight.numel() for linear in linears)
        matrices += self.memory.heads * sum(a * b for a, b in self.memory.layer_shapes())
        segment, attention = self.config.segment, self.attention
        seen = 2 * tokens * segment * attention.num_heads * attention.head_dim
        return 2 * tokens * matrices + seen + self.memory.flops(tokens) + attention.flops(tokens)


def _fill(tiles: Tensor, before: Tensor, positions: Tensor) -> Tensor:
    """Tiles whose first len(before) have what came before in the slots without a position."""
    count = len(before)
    empty = (positions[:count] < 0).view(count, -1, *[1] * (tiles.ndim - 2))
    first = torch.where(empty, before.to(tiles.dtype), tiles[:count])
    return torch.cat([first, tiles[count:]])


def _rows(state: TitansMACState, rows: slice) -> TitansMACState:
    return type(state).from_state_dict({k: x[rows] for k, x in state.tensors().items()})


def _join(states: list[TitansMACState]) -> TitansMACState:
    """States one after the other."""
    parts = [state.tensors() for state in states]
    return TitansMACState.from_state_dict(
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    )
