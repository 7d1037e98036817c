"""Sequences cut into chunks, and the chunks into segments small enough to stay in a core's cache.

A segment is a run of steps for a run of sequences that all have a chunk at each of these steps. Its
chunks lie ``[steps, sequences]`` in memory, heads behind them, so that a loop over time takes
contiguous pieces, and the chunks of all segments lie one behind the other. Sequences are ranked by
their number of chunks, descending.
"""

import dataclasses

import torch
from torch import Tensor

from memlm.cuda.linear_recurrence.inputs import CHUNK, Inputs, first_chunk_slots

# Numbers a tensor of a segment has per thread: a dozen such tensors share the 2 MiB that a core's
# second-level cache has. On an accelerator the serial steps decide, and segments have no bound.
CACHED = 1 << 16
UNBOUNDED = 1 << 62


def chunk_size(inputs: Inputs) -> int:
    """Tokens per chunk: on a CPU the work within a chunk decides, elsewhere the serial steps."""
    if inputs.q.shape[1] <= 16:
        return 16
    return 32 if inputs.q.device.type == "cpu" else CHUNK


def chunk_bound(inputs: Inputs) -> int:
    """Chunks there are at most; known without the lengths of packed sequences."""
    B, T = inputs.q.shape[:2]
    size = chunk_size(inputs)
    return B * -(-T // size) if inputs.cu_seqlens is None else T // size + inputs.sequences


@dataclasses.dataclass(frozen=True)
class Segment:
    """Sequences `ranks` at `steps`; their chunks are `chunks` among those of all segments.

    starts, stops: flat token positions of the sequences, by rank; even: whether they follow each
    other at equal distance and all their chunks here are full; padded: whether slots stay empty.
    """

    ranks: range
    steps: range
    chunks: slice
    starts: list[int]
    stops: list[int]
    even: bool
    padded: bool


class Segments:
    """The chunks of a call.

    Attributes:
        size: slots per chunk.
        chunks, widest: how many there are, in all and in the largest segment.
        parts: the segments, later steps of a sequence behind earlier ones.
        token: int64 ``[chunks, size]``, the flat position of the token in every slot; empty slots
            repeat their sequence's last one.
        empty: bool ``[chunks, size]``, or None where every slot has a token.
        order: int64 ``[sequences]``, the sequence of every rank, or None where they are the same.
    """

    def __init__(self, inputs: Inputs):
        B, T, _, HV, K, V = inputs.sizes
        device = inputs.q.device
        self.size = size = chunk_size(inputs)
        bounds = [row * T for row in range(B + 1)]
        if inputs.cu_seqlens is not None:
            bounds = inputs.cu_seqlens.tolist()
        count = [-(-(bounds[n + 1] - bounds[n]) // size) for n in range(len(bounds) - 1)]
        ranked = list(range(len(count)))
        self.order = None
        if inputs.cu_seqlens is not None:
            ranked.sort(key=lambda n: -count[n])
            self.order = torch.tensor(ranked, device=device)
        at_once = UNBOUNDED
        if device.type == "cpu":
            at_once = CACHED * torch.get_num_threads() // (size * max(K, V) * HV)
        first, stop = [], []
        self.parts: list[Segment] = []
        for ranks, steps in _runs([count[n] for n in ranked], max(1, at_once)):
            starts = [bounds[ranked[rank]] for rank in ranks]
            stops = [bounds[ranked[rank] + 1] for rank in ranks]
            begun = len(first)
            for step in steps:
                first += [start + step * size for start in starts]
                stop += stops
            length = min(b - a for a, b in zip(starts, stops, strict=True))
            padded = length < steps.stop * size
            even = not padded and (len(ranks) == 1 or inputs.cu_seqlens is None)
            chunks = slice(begun, len(first))
            self.parts.append(Segment(ranks, steps, chunks, starts, stops, even, padded))
        self.chunks = len(first)
        self.widest = max((p.chunks.stop - p.chunks.start for p in self.parts), default=0)
        slots = torch.arange(size, device=device)
        self.token = torch.tensor(first, dtype=torch.int64, device=device)[:, None] + slots
        self.empty = None
        if any(part.padded for part in self.parts):
            stops = torch.tensor(stop, dtype=torch.int64, device=device)[:, None]
            self.empty = self.token >= stops
            self.token = torch.minimum(self.token, stops - 1)

    def gates(self, x: Tensor) -> Tensor:
        """``[tokens, heads]`` to ``[chunks * heads, size]``, zero in empty slots."""
        x = x[self.token.flatten()].view(self.chunks, self.size, -1)
        if self.empty is not None:
            x.masked_fill_(self.empty[:, :, None], 0)
        return x.mT.flatten(0, 1)

    def ungates(self, x: Tensor, tokens: int) -> Tensor:
        """Inverse of `gates`: ``[chunks * heads, size]`` to ``[tokens, heads]``."""
        rows = x.unflatten(0, (self.chunks, -1)).mT.flatten(0, 1)
        places = self.token.flatten()
        if self.empty is not None:
            full = ~self.empty.flatten()
            rows, places = rows[full], places[full]
        return rows.new_empty(tokens, rows.shape[1]).index_copy_(0, places, rows)

    def gather(self, part: Segment, x: Tensor) -> Tensor:
        """Of ``[tokens, heads, width]`` a segment: ``[steps, sequences, heads, size, width]``.

        What empty slots hold is of no meaning.
        """
        steps = len(part.steps)
        if not part.even:
            rows = x.index_select(0, self.token[part.chunks].flatten())
            rows = rows.view(steps, len(part.ranks), self.size, *x.shape[1:])
        else:
            rows = self._rows(part, x).unflatten(1, (steps, self.size)).transpose(0, 1)
        return rows.transpose(2, 3)

    def scatter(self, part: Segment, x: Tensor, out: Tensor) -> None:
        """Inverse of `gather`: write a segment's ``[chunks * heads, size, width]`` into `out`."""
        steps, sequences = len(part.steps), len(part.ranks)
        x = x.view(steps, sequences, -1, self.size, x.shape[-1]).transpose(2, 3)
        if part.even:
            rows = self._rows(part, out).unflatten(1, (steps, self.size))
            rows.copy_(x.transpose(0, 1))
            return
        begin, end = (self.size * step for step in (part.steps.start, part.steps.stop))
        for n, (start, stop) in enumerate(zip(part.starts, part.stops, strict=True)):
            full, rest = divmod(min(end, stop - start) - begin, self.size)
            rows = out[start + begin :]
            rows[: full * self.size].unflatten(0, (full, self.size)).copy_(x[:full, n])
            if rest:
                rows[full * self.size :][:rest] = x[full, n, :rest]

    def clear(self, part: Segment, x: Tensor) -> None:
        """Zero the empty slots of a segment's ``[chunks, heads, size, *]``."""
        if part.padded:
            x.masked_fill_(self.empty[part.chunks][:, None, :, None], 0)

    def _rows(self, part: Segment, x: Tensor) -> Tensor:
        """The tokens of an even segment, ``[sequences, steps * size, *]``, a view."""
        begin, end = (self.size * step for step in (part.steps.start, part.steps.stop))
        start, stop = part.starts[0], part.stops[0]
        if len(part.ranks) == 1:
            return x[start + begin : start + end].unsqueeze(0)
        length = stop - start
        return x[start:].unflatten(0, (-1, length))[: len(part.ranks), begin:end]

    def ranked(self, state: Tensor) -> Tensor:
        """States of the sequences ``[N, *]`` by rank, a new tensor."""
        return state.clone() if self.order is None else state[self.order]

    def unranked(self, state: Tensor) -> Tensor:
        """Inverse of `ranked`."""
        return (
            state
            if self.order is None
            else torch.empty_like(state).index_copy_(0, self.order, state)
        )

    def keep_states(
        self, part: Segment, states: Tensor, cu_seqlens: Tensor | None, out: Tensor
    ) -> None:
        """Write those of a segment's start states ``[chunks * HV, K, V]`` that begin a CHUNK."""
        states = states.view(len(part.steps), len(part.ranks), *out.shape[2:])
        every = CHUNK // self.size
        skipped = -part.steps.start % every
        states = states[skipped::every]
        if not len(states):
            return
        step = (part.steps.start + skipped) // every
        if cu_seqlens is None:
            where = out[part.ranks.start : part.ranks.stop, step : step + len(states)]
            where.copy_(states.transpose(0, 1))
            return
        sequences = self.order[part.ranks.start : part.ranks.stop]
        slots = first_chunk_slots(cu_seqlens)[sequences] + step
        slots = slots + torch.arange(len(states), device=slots.device)[:, None]
        out.flatten(0, 1).index_copy_(0, slots.flatten(), states.flatten(0, 1))


def _runs(count: list[int], at_once: int):
    """Runs of ranks and steps with at most `at_once` chunks, or one step of one sequence.

    `count` has the chunks of every rank, descending; those with none are in no run.
    """
    ranks = sum(chunks > 0 for chunks in count)
    group = min(at_once, ranks)
    for begin in range(0, ranks, max(1, group)):
        active, step = min(begin + group, ranks), 0
        while active > begin:
            end = count[active - 1]
            pieces = max(1, -(-(end - step) * (active - begin) // at_once))
            pieces = min(pieces, end - step)
            for piece in range(pieces):
                low, high = (step + (end - step) * (piece + i) // pieces for i in (0, 1))
                yield range(begin, active), range(low, high)
            step = end
            while active > begin and count[active - 1] == end:
                active -= 1
