"""A store that is written segment by segment: what a call adds, and who may see what.

Inside a call every entry has a *place*: its position plus a multiple of a span for each document
of the row, -1 for padding and free slots. Places are unique in a row and grow with time, so one
search over rows with packed documents stays inside the documents.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from memlm.memory.base import CallContext
from memlm.retrieval.vector_store import (
    Eviction,
    ValueSpec,
    VectorStore,
    ring_order,
    search_ring,
    take_rows,
)


@dataclasses.dataclass(kw_only=True)
class SegmentStore(VectorStore):
    """The entries of complete segments, in a ring, and those of the unfinished one.

    Attributes:
        pending: [B, segment, key_size], keys of the unfinished segment, free slots in front.
        pending_positions: int64 [B, segment], -1 = free.
        pending_values: each [B, segment, ...].
    """

    pending: Tensor
    pending_positions: Tensor
    pending_values: tuple[Tensor, ...] = ()

    @classmethod
    def empty_segments(
        cls,
        batch_size: int,
        capacity: int,
        segment: int,
        key_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        values: Sequence[ValueSpec] = (),
        eviction: Eviction = "fifo",
    ) -> Self:
        """A store without entries."""
        ring = VectorStore.empty(batch_size, capacity, key_size, device, dtype, values, eviction)
        waiting = VectorStore.empty(batch_size, segment, key_size, device, dtype, values)
        return cls(
            **_fields(ring),
            pending=waiting.keys,
            pending_positions=waiting.positions - 1,
            pending_values=waiting.values,
        )

    def reset(self, rows: Tensor | None = None) -> Self:
        if rows is None:
            rows = torch.ones_like(self.written, dtype=torch.bool)
        fresh = super().reset(rows)
        return dataclasses.replace(
            fresh, pending_positions=self.pending_positions.masked_fill(rows[:, None], -1)
        )


def _fields(state: VectorStore) -> dict:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


@dataclasses.dataclass
class Store:
    """What the tokens of one call may search.

    Attributes:
        keys: [B, M, D].
        values: each [B, M, ...].
        places: int64 [B, M], -1 in free slots, growing with age along the ring.
        start: int64 [B], the slot of the oldest entry.
        token_positions: int64 [B, T], positions of the tokens that search.
        token_base: int64 [B, T], place of position 0 of each token's document.
    """

    keys: Tensor
    values: tuple[Tensor, ...]
    places: Tensor
    start: Tensor
    token_positions: Tensor
    token_base: Tensor

    def visible(self, capacity: int, segment: int) -> tuple[Tensor, Tensor]:
        """(first, last) int64 [B, T]: a token sees first <= place < last."""
        boundary = self.token_positions // segment * segment
        first = (boundary - capacity).clamp(min=0)
        return self.token_base + first, self.token_base + boundary

    def search(
        self, queries: Tensor, keys: Tensor, k: int, metric: str, first: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices [B, T, k] into M of the best visible entries, as `search_ring`.

        Args:
            queries: [B, T, D].
            keys: [B, M, D], the store's, or what stands for them in the search.
            k: results per query.
            metric: see `memlm.cuda.topk_search`.
            first, last: what each token sees, [B, T].
        """
        return search_ring(queries, keys, self.places, self.start, k, metric, first, last)

    def neighbors(
        self, hits: Tensor, first: Tensor, last: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        """Widen hits to runs of consecutive positions.

        Args:
            hits: int64 [B, T, k] into M, -1 for none.
            first, last: what each token sees, [B, T].
            width: entries around a hit: (width - 1) // 2 before it, the hit, the rest after it.

        Returns:
            Indices [B, T, k, width] into M, and bool of that shape: whether the entry exists, is
            visible and belongs to the hit's run.
        """
        before = (width - 1) // 2
        offsets = torch.arange(-before, width - before, device=hits.device)
        index = (hits.unsqueeze(-1) + offsets) % max(self.places.shape[1], 1)
        index = torch.where((hits >= 0).unsqueeze(-1), index, 0)
        place = self.places.gather(1, index.flatten(1)).view_as(index)
        hit_place = self.places.gather(1, hits.clamp(min=0).flatten(1)).view_as(hits)
        found = (hits >= 0).unsqueeze(-1) & (place == hit_place.unsqueeze(-1) + offsets)
        found &= (place >= first[:, :, None, None]) & (place < last[:, :, None, None])
        return index, found


@dataclasses.dataclass
class _Entries:
    """Entries [B, M, ...] of each row with their places [B, M], -1 = free."""

    parts: tuple[Tensor, ...]
    places: Tensor

    def __add__(self, later: "_Entries") -> "_Entries":
        parts = zip(self.parts, later.parts, strict=True)
        return _Entries(
            tuple(torch.cat((mine, new.to(mine.dtype)), 1) for mine, new in parts),
            torch.cat((self.places, later.places), 1),
        )

    def at(self, index: Tensor) -> "_Entries":
        """The entries at `index` [B, N]."""
        parts = tuple(take_rows(part, index) for part in self.parts)
        return _Entries(parts, self.places.gather(1, index))

    def without_first(self, count: int) -> "_Entries":
        return _Entries(tuple(part[:, count:] for part in self.parts), self.places[:, count:])

    def without_gaps(self) -> "_Entries":
        """Free slots to the front of every row, the order of the entries kept."""
        used = self.places >= 0
        if not bool((used[:, :-1] & ~used[:, 1:]).any()):
            return self
        return self.at(used.int().argsort(dim=1, stable=True))


def read_store(
    state: SegmentStore,
    keys: Tensor,
    context: CallContext,
    segment: int,
    values: Sequence[Tensor] = (),
) -> tuple[Store, SegmentStore]:
    """What this call's tokens may search, and the state after the call.

    Nothing of capacity size is copied unless a segment completes. With `context.write` False only
    the given entries are searched and the same state object comes back.

    Args:
        state: of the B rows; its entries are those of one document per row.
        keys: [B, T, D], T > 0, the entries of this call.
        context: the documents of the call.
        segment: entries become visible in groups of so many positions.
        values: each [B, T, ...].
    """
    if context.layout.is_step and context.write and not torch.compiler.is_compiling():
        found = _step(state, keys, context, segment, values)
        if found is not None:
            return found
    layout, positions = context.layout, context.position_ids
    stored = torch.where(state.valid, state.positions, -1)
    tops = [part.max() for part in (positions, stored, state.pending_positions) if part.numel()]
    span = torch.stack(tops).max() + 1
    token_base = layout.document.clamp(min=0) * span
    new = _Entries((state.pending, *state.pending_values), state.pending_positions)
    if context.write:
        token_places = torch.where(layout.valid, token_base + positions, -1)
        new = new + _Entries((keys, *values), token_places)
    # Rows start with free slots of the pending part; leave out those that all rows have.
    new = new.without_first(int((state.pending_positions < 0).sum(1).min()))
    live = max(1, int(state.count.max()))  # slots behind have never been written
    ring = Store(
        state.keys[:, :live],
        tuple(part[:, :live] for part in state.values),
        stored[:, :live],
        state.start,
        positions,
        token_base,
    )
    if new.places.shape[1] == 0:
        return ring, state

    newest = new.places.amax(1)  # [B], -1 where there is nothing new
    document_base = newest.clamp(min=0) // span * span
    complete = document_base + (newest - document_base + 1) // segment * segment
    complete = complete.masked_fill(newest < 0, torch.iinfo(torch.int64).max)
    used = new.places >= 0
    ready = used & (new.places < complete[:, None])
    moves = context.write and bool(ready.any() or (document_base > 0).any())
    reach = torch.where(layout.valid, token_base + positions // segment * segment, 0).amax(1)
    new = new.without_gaps()
    store = ring
    if moves or bool((used & (new.places < reach[:, None])).any()):
        entries = new
        if bool((state.written > 0).any()):
            entries = (_oldest_first(state, stored) + new).without_gaps()
        start = torch.zeros_like(newest)
        store = Store(
            entries.parts[0], entries.parts[1:], entries.places, start, positions, token_base
        )
    if not context.write:
        return store, state

    pending = _waiting(new, segment, complete, document_base)
    after = dataclasses.replace(
        state,
        pending=pending.parts[0],
        pending_positions=pending.places,
        pending_values=pending.parts[1:],
    )
    if not moves:
        return store, after
    after = VectorStore.reset(after, document_base > 0)
    ready = (new.places >= document_base[:, None]) & (new.places < complete[:, None])
    ready &= new.places >= 0
    after = after.write(
        new.parts[0], new.places - document_base[:, None], valid=ready, values=new.parts[1:]
    )
    return store, after


def _step(
    state: SegmentStore,
    keys: Tensor,
    context: CallContext,
    segment: int,
    values: Sequence[Tensor],
) -> tuple[Store, SegmentStore] | None:
    """As `read_store`, of one token per row that continues its document; None where a segment
    completes or nothing is known of what waits."""
    positions = context.position_ids
    # What is to wait: the tokens of the unfinished segment, the last one on the right.
    waiting = state.pending_positions
    if waiting.shape[1] != segment:
        return None
    places = positions % segment
    expected = torch.arange(-segment, 0, device=waiting.device) + positions
    expected = expected.masked_fill(expected < positions - places, -1)
    complete = places == segment - 1
    if bool(complete.any()) or not torch.equal(waiting, expected):
        return None
    live = max(1, int(state.count.max()))
    stored = torch.where(state.valid, state.positions, -1)[:, :live]
    store = Store(
        state.keys[:, :live],
        tuple(part[:, :live] for part in state.values),
        stored,
        state.start,
        positions,
        torch.zeros_like(positions),
    )
    after = dataclasses.replace(
        state,
        pending=torch.cat((state.pending[:, 1:], keys.to(state.pending.dtype)), 1),
        pending_positions=torch.cat((waiting[:, 1:], positions), 1),
        pending_values=tuple(
            torch.cat((part[:, 1:], new.to(part.dtype)), 1)
            for part, new in zip(state.pending_values, values, strict=True)
        ),
    )
    return store, after


def _oldest_first(state: SegmentStore, stored: Tensor) -> _Entries:
    """The entries of the ring in the order in which they were written, free slots behind."""
    longest = int(state.count.max())
    entries = _Entries((state.keys, *state.values), stored)
    if not bool((state.start > 0).any()):
        parts = tuple(part[:, :longest] for part in entries.parts)
        return _Entries(parts, stored[:, :longest])
    return entries.at(ring_order(state.start, state.capacity))


def _waiting(entries: _Entries, segment: int, complete: Tensor, base: Tensor) -> _Entries:
    """The entries from place `complete` [B] on, in the last of `segment` slots.

    Their places count from `base` [B]; free slots hold zeros.
    """
    slots = torch.arange(segment, device=base.device)
    index = entries.places.shape[1] - segment + slots.expand(len(base), -1)
    kept = index >= 0
    chosen = entries.at(index.clamp(min=0))
    kept &= chosen.places >= complete[:, None]
    parts = tuple(
        part.masked_fill(~kept.view(*kept.shape, *[1] * (part.ndim - 2)), 0)
        for part in chosen.parts
    )
    return _Entries(parts, torch.where(kept, chosen.places - base[:, None], -1))
