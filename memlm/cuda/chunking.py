"""Sequences of different lengths cut into chunks that a serial loop can walk through together.

Chunks lie in step-major order: step ``j`` holds chunk ``j`` of every sequence that has one, and
the sequences are sorted by their number of chunks, descending. The sequences active at a step are
thus a prefix of those active at the step before, and a loop over time takes contiguous pieces
(`torch.split` by `counts`). Equal lengths degenerate to ``[steps, sequences]``.

Slots no token falls into (the rest of a last chunk, the start of a chunk resumed at an offset) are
zero after `to_chunks`; operations see to it that zeros are identity tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """Where every token of a packed stream lies in ``[chunks, heads, size]``.

    Attributes:
        size: slots per chunk.
        counts: sequences active at every step, descending; their sum is the number of chunks.
        order: int64 ``[sequences]``, the sequences by number of chunks, descending.
        inverse_order: int64 ``[sequences]``, the rank of every sequence in `order`.
        chunk, slot: int64 ``[tokens]``, the place of every token.
    """

    size: int
    counts: list[int]
    order: Tensor
    inverse_order: Tensor
    chunk: Tensor
    slot: Tensor

    @classmethod
    def build(
        cls,
        lengths: Tensor,
        size: int,
        offset: Tensor | None = None,
        period: int | None = None,
    ) -> "ChunkLayout":
        """Lay out sequences of `lengths` (int64 ``[sequences]``, zeros allowed).

        `offset` (int64 ``[sequences]``) is the place of every sequence's first token in its first
        period; default zero. A new chunk begins with every `period` tokens (default `size`), of
        which as many chunks as needed are made.
        """
        device = lengths.device
        period = size if period is None else period
        per_period = -(-period // size)
        if offset is None:
            offset = torch.zeros_like(lengths)

        def chunk_of(place: Tensor) -> Tensor:
            return place // period * per_period + place % period // size

        steps = torch.where(lengths > 0, chunk_of(offset + lengths - 1) + 1, 0)
        order = torch.argsort(steps, descending=True, stable=True)
        inverse_order = torch.argsort(order)
        longest = int(steps.max()) if len(steps) else 0
        active = (steps[:, None] > torch.arange(longest, device=device)).sum(0)  # [longest]
        first_chunk = torch.cumsum(active, 0) - active  # of every step
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        starts = torch.cumsum(lengths, 0) - lengths
        place = torch.arange(len(sequence), device=device) - (starts - offset)[sequence]
        chunk = first_chunk[chunk_of(place)] + inverse_order[sequence]
        slot = place % period % size
        return cls(size, active.tolist(), order, inverse_order, chunk, slot)

    @property
    def chunks(self) -> int:
        return sum(self.counts)

    def _rows(self, heads: int) -> tuple[Tensor, Tensor]:
        """For token-head rows the chunk row they lie in; for chunk rows the token-head row in them.

        Empty chunk rows name the row after the last one, where `_rearrange` has zeros.
        """
        head = torch.arange(heads, device=self.slot.device)
        place = ((self.chunk[:, None] * heads + head) * self.size + self.slot[:, None]).flatten()
        total = self.chunks * heads * self.size
        source = torch.full((total,), len(place), dtype=torch.int64, device=place.device)
        source[place] = torch.arange(len(place), device=place.device)
        return place, source

    def to_chunks(self, x: Tensor) -> Tensor:
        """``[tokens, heads, *]`` to ``[chunks * heads, size, *]``, zero in empty slots."""
        heads, rest = x.shape[1], x.shape[2:]
        place, source = self._rows(heads)
        rows = _Rearrange.apply(x.reshape(len(place), -1), source, place)
        return rows.view(self.chunks * heads, self.size, *rest)

    def from_chunks(self, x: Tensor, heads: int) -> Tensor:
        """``[chunks * heads, size, width]`` to ``[tokens, heads, width]``; inverse of to_chunks."""
        place, source = self._rows(heads)
        rows = _Rearrange.apply(x.reshape(len(source), -1), place, source)
        return rows.view(len(self.slot), heads, x.shape[-1])


class _Rearrange(torch.autograd.Function):
    """``y[i] = x[index[i]]``, rows past the end reading as zero; the backward is a gather as well.

    Each row of `x` is read at most once, by the row of `y` that `inverse` names, which spares the
    scatter with additions that the backward of indexing does.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        if len(index) > len(x):
            x = torch.cat((x, x.new_zeros(1, x.shape[1])))
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _Rearrange.apply(grad, inverse, index), None, None
