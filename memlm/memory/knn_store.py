"""The store of the kNN cache: what a row has kept, what a call adds, and who may see what.

Inside a call every entry has a *place*: its position plus a multiple of a span for each document
of the row, -1 for padding and free slots. Places are unique in a row and grow with time, so one
search over rows with packed documents stays inside the documents.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.memory.base import CallContext, MemoryState


@dataclasses.dataclass
class KnnCacheState(MemoryState):
    """Entries of each row, oldest first, free slots in front.

    Attributes:
        keys: [B, capacity, r], entries of complete segments.
        positions: int64 [B, capacity], their positions in the document, -1 = free.
        pending: [B, segment, r], entries of the unfinished segment.
        pending_positions: int64 [B, segment], -1 = free.
    """

    keys: Tensor
    positions: Tensor
    pending: Tensor
    pending_positions: Tensor

    @classmethod
    def empty(
        cls, batch_size: int, capacity: int, segment: int, key_size: int, device=None, dtype=None
    ) -> "KnnCacheState":
        """A state without entries."""

        def slots(count: int) -> tuple[Tensor, Tensor]:
            keys = torch.zeros(batch_size, count, key_size, device=device, dtype=dtype)
            return keys, torch.full((batch_size, count), -1, device=device)

        return cls(*slots(capacity), *slots(segment))

    def reset(self, rows: Tensor | None = None) -> "KnnCacheState":
        if rows is None:
            rows = torch.ones(self.batch_size, dtype=torch.bool, device=self.keys.device)
        return KnnCacheState(
            self.keys.masked_fill(rows[:, None, None], 0),
            self.positions.masked_fill(rows[:, None], -1),
            self.pending.masked_fill(rows[:, None, None], 0),
            self.pending_positions.masked_fill(rows[:, None], -1),
        )


@dataclasses.dataclass
class Store:
    """What the tokens of one call may search.

    Attributes:
        keys: [B, M, r].
        places: int64 [B, M], growing along M after the free slots (-1).
        token_positions: int64 [B, T], positions of the tokens that search.
        token_base: int64 [B, T], place of position 0 of each token's document.
    """

    keys: Tensor
    places: Tensor
    token_positions: Tensor
    token_base: Tensor

    def visible(self, capacity: int, segment: int) -> tuple[Tensor, Tensor]:
        """(first, last) int64 [B, T]: a token sees first <= place < last."""
        boundary = self.token_positions // segment * segment
        first = (boundary - capacity).clamp(min=0)
        return self.token_base + first, self.token_base + boundary

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
        index = hits.unsqueeze(-1) + offsets
        inside = (hits >= 0).unsqueeze(-1) & (index >= 0) & (index < self.places.shape[1])
        index = torch.where(inside, index, 0)
        place = self.places.gather(1, index.flatten(1)).view_as(index)
        hit_place = self.places.gather(1, hits.clamp(min=0).flatten(1)).view_as(hits)
        found = inside & (place == hit_place.unsqueeze(-1) + offsets)
        found &= (place >= first[:, :, None, None]) & (place < last[:, :, None, None])
        return index, found


def read_store(
    state: KnnCacheState, z: Tensor, context: CallContext, segment: int
) -> tuple[Store, KnnCacheState]:
    """What this call's tokens may search, and the state after the call.

    Nothing of capacity size is copied unless a segment completes. With `context.write` False only
    the given entries are searched and the same state object comes back.

    Args:
        state: of the B rows.
        z: [B, T, r], T > 0, the entries of this call.
        context: the documents of the call.
        segment: entries become visible in groups of so many positions.
    """
    layout, positions = context.layout, context.position_ids
    tops = [part.max() for part in (positions, state.positions, state.pending_positions)]
    span = torch.stack(tops).max() + 1
    token_base = layout.document.clamp(min=0) * span
    keys, places = state.pending, state.pending_positions
    if context.write:
        token_places = torch.where(layout.valid, token_base + positions, -1)
        keys, places = torch.cat((keys, z), 1), torch.cat((places, token_places), 1)
    # Rows start with free slots of the pending part; leave out those that all rows have.
    free = int((state.pending_positions < 0).sum(1).min())
    keys, places = keys[:, free:], places[:, free:]
    if places.shape[1] == 0:
        return Store(state.keys, state.positions, positions, token_base), state

    newest = places.amax(1)  # [B], -1 where there is nothing new
    document_base = newest.clamp(min=0) // span * span
    complete = document_base + (newest - document_base + 1) // segment * segment
    complete = complete.masked_fill(newest < 0, torch.iinfo(torch.int64).max)
    used = places >= 0
    moves = context.write and bool(
        (used & (places < complete[:, None])).any() or (document_base > 0).any()
    )
    reach = torch.where(layout.valid, token_base + positions // segment * segment, 0).amax(1)
    searches_new = moves or bool((used & (places < reach[:, None])).any())
    if searches_new and bool((state.positions[:, -1] >= 0).any()):
        keys = torch.cat((state.keys, keys), 1)
        places = torch.cat((state.positions, places), 1)
    keys, places = _close_gaps(keys, places)
    searched = (keys, places) if searches_new else (state.keys, state.positions)
    store = Store(*searched, positions, token_base)
    if not context.write:
        return store, state

    none = torch.zeros_like(newest)
    pending = _last(keys, places, segment, none, complete, document_base)
    if not moves:
        return store, KnnCacheState(state.keys, state.positions, *pending)
    waiting = (places >= complete[:, None]).sum(1)
    kept = _last(keys, places, state.keys.shape[1], waiting, document_base, document_base)
    return store, KnnCacheState(*kept, *pending)


def _close_gaps(keys: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Free slots to the front of every row, the order of the entries kept."""
    used = places >= 0
    if not bool((used[:, :-1] & ~used[:, 1:]).any()):
        return keys, places
    order = used.int().argsort(dim=1, stable=True)
    return take_rows(keys, order), places.gather(1, order)


def _last(
    keys: Tensor, places: Tensor, count: int, skip: Tensor, least: Tensor, base: Tensor
) -> tuple[Tensor, Tensor]:
    """The last `count` entries of each row but for the last `skip`, if their place is >= `least`.

    Returns:
        Their keys [B, count, r], zero in free slots, and positions = place - base, -1 if free.
    """
    slots = torch.arange(count, device=places.device)
    index = places.shape[1] - count - skip[:, None] + slots
    kept = index >= 0
    index = index.clamp(min=0)
    place = places.gather(1, index)
    kept &= place >= least[:, None]
    keys = take_rows(keys, index).masked_fill(~kept.unsqueeze(-1), 0)
    return keys, torch.where(kept, place - base[:, None], -1)


def take_rows(keys: Tensor, index: Tensor) -> Tensor:
    """keys [B, M, r] at `index` [B, ...] of their own row -> [B, ..., r]."""
    batch_size, stored, _ = keys.shape
    rows = torch.arange(batch_size, device=keys.device) * stored
    flat = index + rows.view(-1, *[1] * (index.ndim - 1))
    return F.embedding(flat, keys.flatten(0, 1))
