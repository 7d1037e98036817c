"""A ring buffer of vectors for each row of a batch, with exact search."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda import topk_search
from memlm.cuda.ordered_topk import ordered_topk
from memlm.errors import UserError, nearest
from memlm.layers.state import MemoryState

Eviction = Literal["fifo", "lru"]


@dataclasses.dataclass(frozen=True)
class ValueSpec:
    """What is kept beside each key: a tensor of `shape` per entry (() for a number)."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes per entry."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(kw_only=True)
class VectorStore(MemoryState):
    """The latest (or the most recently used) `capacity` entries of each row.

    What a slot holds is decided by the row's counter alone: a row that wrote n entries has valid
    slots 0 .. min(n, capacity) - 1, whatever stands in them. First in, first out, entry n of a row
    lies in slot n % capacity; with least-recently-used eviction a new entry takes the slot whose
    entry was not found for the longest time.

    As with every state, no operation changes the store it is called on.

    Attributes:
        keys: [B, capacity, key_size].
        positions: int64 [B, capacity], the position of each entry in its document.
        documents: int64 [B, capacity], the document of each entry.
        written: int64 [B], entries written since the row's last reset.
        newest: int64 [B, 2], document and position of the last entry written, -1 before the first.
        last_used: int64 [B, capacity], the time at which an entry was last found or written, with
            least-recently-used eviction; else [B, 0].
        values: what is kept beside the keys, each [B, capacity, ...].
    """

    keys: Tensor
    positions: Tensor
    documents: Tensor
    written: Tensor
    newest: Tensor
    last_used: Tensor
    values: tuple[Tensor, ...] = ()

    @classmethod
    def empty(
        cls,
        batch_size: int,
        capacity: int,
        key_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        values: Sequence[ValueSpec] = (),
        eviction: Eviction = "fifo",
    ) -> Self:
        """A store without entries; all its memory, `bytes_of` the same sizes, is taken now.

        Raises:
            UserError: for keys that are no floating point numbers, or an unknown eviction.
        """
        if eviction not in get_args(Eviction):
            raise UserError(
                f"eviction {eviction!r} is not one of fifo, lru{nearest(eviction, ('fifo', 'lru'))}"
            )
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"keys of {dtype} would lose what they are; use a floating point type")

        def slots(*shape: int, dtype: torch.dtype | None = torch.int64) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        return cls(
            keys=slots(capacity, key_size, dtype=dtype),
            positions=slots(capacity),
            documents=slots(capacity),
            written=slots(),
            newest=slots(2) - 1,
            last_used=slots(capacity if eviction == "lru" else 0),
            values=tuple(slots(capacity, *spec.shape, dtype=spec.dtype) for spec in values),
        )

    @staticmethod
    def bytes_of(
        batch_size: int,
        capacity: int,
        key_size: int,
        dtype: torch.dtype,
        values: Sequence[ValueSpec] = (),
        eviction: Eviction = "fifo",
    ) -> int:
        """Bytes of a store of these sizes, known before it is made."""
        entry = key_size * dtype.itemsize + sum(spec.nbytes for spec in values)
        entry += (3 if eviction == "lru" else 2) * torch.int64.itemsize
        return batch_size * (capacity * entry + 3 * torch.int64.itemsize)

    @classmethod
    def capacity_within(
        cls,
        max_bytes: int,
        batch_size: int,
        key_size: int,
        dtype: torch.dtype,
        values: Sequence[ValueSpec] = (),
        eviction: Eviction = "fifo",
    ) -> int:
        """The largest capacity whose store takes no more than `max_bytes`.

        Raises:
            UserError: when not even one entry per row fits.
        """

        def total(capacity: int) -> int:
            return cls.bytes_of(batch_size, capacity, key_size, dtype, values, eviction)

        capacity = (max_bytes - total(0)) // (total(1) - total(0))
        if capacity < 1:
            raise UserError(
                f"a budget of {max_bytes} bytes does not hold one entry per row; "
                f"it must be at least {total(1)}"
            )
        return capacity

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.keys.shape[1]

    @property
    def count(self) -> Tensor:
        """int64 [B], entries of each row."""
        return self.written.clamp(max=self.capacity)

    @property
    def valid(self) -> Tensor:
        """bool [B, capacity], slots that hold an entry."""
        slots = torch.arange(self.capacity, device=self.written.device)
        return slots < self.written[:, None]

    @property
    def start(self) -> Tensor:
        """int64 [B], the slot of the oldest entry, first in, first out; 0 with `last_used`."""
        if self.last_used.shape[1]:
            return torch.zeros_like(self.written)
        return torch.where(self.written > self.capacity, self.written % max(self.capacity, 1), 0)

    def reset(self, rows: Tensor | None = None) -> Self:
        if rows is None:
            rows = torch.ones_like(self.written, dtype=torch.bool)
        return dataclasses.replace(
            self,
            written=self.written.masked_fill(rows, 0),
            newest=self.newest.masked_fill(rows[:, None], -1),
        )

    def write(
        self,
        keys: Tensor,
        positions: Tensor,
        documents: Tensor | None = None,
        valid: Tensor | None = None,
        values: Sequence[Tensor] = (),
        time: Tensor | None = None,
    ) -> Self:
        """The store with new entries; it is copied once.

        Writes are idempotent by position: an entry of the newest document at or before the newest
        position is there already, and is left out. Gradients of `keys` and `values` are kept.

        Args:
            keys: [B, T, key_size].
            positions: int64 [B, T], growing along T within a document.
            documents: int64 [B, T], at least 0, not shrinking along T; None = document 0.
            valid: bool [B, T], the entries to write; None = all.
            values: each [B, T, ...].
            time: int64 [B], with `last_used`: the time of this writing, not before that of the
                last one.
        """
        if positions.shape[1] == 0:
            return self
        documents = torch.zeros_like(positions) if documents is None else documents
        valid = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
        document, position = self.newest.unsqueeze(1).unbind(-1)  # [B, 1]
        valid = valid & ((documents > document) | (documents == document) & (positions > position))
        added = valid.sum(1)
        rank = valid.cumsum(1) - 1
        kept = valid & (added[:, None] - rank <= self.capacity)
        if self.last_used.shape[1]:
            order = self._eviction_order()
            late = rank - (added[:, None] - self.capacity).clamp(min=0)
            slots = order.gather(1, late.clamp(0, self.capacity - 1))
        else:
            slots = (self.written[:, None] + rank) % max(self.capacity, 1)
        rows, columns = kept.nonzero(as_tuple=True)
        place = (rows, slots[rows, columns])

        def put(target: Tensor, source: Tensor) -> Tensor:
            return target.index_put(place, source[rows, columns].to(target.dtype))

        last_used = self.last_used
        if last_used.shape[1]:
            time = self.written if time is None else time
            last_used = put(last_used, time[:, None].expand_as(positions))
        last = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1).amax(1)
        pair = torch.stack((documents, positions), -1)
        newest = pair[torch.arange(len(last), device=last.device), last.clamp(min=0)]
        return dataclasses.replace(
            self,
            keys=put(self.keys, keys),
            positions=put(self.positions, positions),
            documents=put(self.documents, documents),
            written=self.written + added,
            newest=torch.where(added[:, None] > 0, newest, self.newest),
            last_used=last_used,
            values=tuple(put(old, new) for old, new in zip(self.values, values, strict=True)),
        )

    def _eviction_order(self) -> Tensor:
        """Slots [B, capacity]: free ones first, then the least recently used, older ones first."""
        free = ~self.valid
        order = torch.arange(self.capacity, device=free.device).expand_as(free)
        for key in (self.positions, self.documents, self.last_used):  # the last one counts most
            key = key.masked_fill(free, -1).gather(1, order)
            order = order.gather(1, key.argsort(dim=1, stable=True))
        return order

    def touch(self, slots: Tensor, time: Tensor) -> Self:
        """The store in which the entries at `slots` (int64 [B, N], -1 = none) were used at `time`.

        Args:
            slots: int64 [B, N], as `search` returns them.
            time: int64 [B].
        """
        found = slots >= 0
        source = torch.where(found, time[:, None], -1)
        last_used = self.last_used.scatter_reduce(1, slots.clamp(min=0), source, "amax")
        return dataclasses.replace(self, last_used=last_used)

    def search(
        self,
        queries: Tensor,
        k: int,
        metric: str = "dot",
        first: Tensor | None = None,
        last: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k best entries of each query among those that it may see.

        Args:
            queries: [B, T, key_size].
            k: results per query.
            metric: see `memlm.cuda.topk_search`.
            first, last: int64 [B, T]: a query sees positions [first, last); None = all.
            documents: int64 [B, T]: a query sees entries of this document; None = of every one.

        Returns:
            scores [B, T, k] and slots int64 [B, T, k], best first, equal scores oldest first (with
            `last_used` lowest slot first); -inf and -1 where there are fewer.
        """
        places = torch.where(self.valid, self.positions, -1)
        limits = F.pad(places, (1, 0), value=-1).amax(1, keepdim=True) + 1
        limits = limits.expand(queries.shape[:2])
        first = torch.zeros_like(limits) if first is None else first.clamp(min=0)
        last = limits if last is None else last
        if documents is not None and documents.numel():
            # Positions of the documents asked for are moved apart, so that one range names both.
            span = limits.amax()
            asked, number = documents.unique(return_inverse=True)
            mine = torch.searchsorted(asked, self.documents).clamp(max=len(asked) - 1)
            known = self.valid & (asked[mine] == self.documents)
            places = torch.where(known, places + mine * span, -1)
            first, last = (number * span + at.clamp(max=span) for at in (first, last))
        return search_ring(queries, self.keys, places, self.start, k, metric, first, last)

    def take(self, slots: Tensor) -> tuple[Tensor, ...]:
        """Keys and values [B, ...] at `slots`, int64 [B, ...]; -1, for none, reads slot 0."""
        return tuple(take_rows(part, slots.clamp(min=0)) for part in (self.keys, *self.values))


def search_ring(
    queries: Tensor,
    keys: Tensor,
    places: Tensor,
    start: Tensor,
    k: int,
    metric: str,
    first: Tensor,
    last: Tensor,
) -> tuple[Tensor, Tensor]:
    """`topk_search` in ring buffers: among equal scores the oldest entry wins.

    Args:
        queries: [B, T, D].
        keys: [B, M, D].
        places: int64 [B, M]; a query sees the entries with first <= place < last.
        start: int64 [B], the slot of each row's oldest entry.
        k: results per query.
        metric: see `memlm.cuda.topk_search`.
        first, last: int64 [B, T].

    Returns:
        scores [B, T, k] and slots int64 [B, T, k].
    """

    def search(part: slice) -> tuple[Tensor, Tensor]:
        visible = (places[:, part], first, last)
        return topk_search(queries, keys[:, part], k, metric, positions=visible)

    starts = start.tolist()
    if not any(starts):
        return search(slice(None))
    if len(set(starts)) == 1:
        older, newer = search(slice(starts[0], None)), search(slice(starts[0]))
        older_slots = torch.where(older[1] >= 0, older[1] + starts[0], -1)
        scores, best = ordered_topk(torch.cat((older[0], newer[0]), -1), k)
        return scores, torch.cat((older_slots, newer[1]), -1).gather(-1, best)
    order = ring_order(start, keys.shape[1])
    visible = (places.gather(1, order), first, last)
    scores, index = topk_search(queries, take_rows(keys, order), k, metric, positions=visible)
    slots = order.gather(1, index.clamp(min=0).flatten(1)).view_as(index)
    return scores, torch.where(index >= 0, slots, -1)


def ring_order(start: Tensor, capacity: int) -> Tensor:
    """Slots int64 [B, capacity] from each row's `start` (int64 [B]) on, round the ring."""
    return (start[:, None] + torch.arange(capacity, device=start.device)) % capacity


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, M, ...] at `index` [B, N...] of their own row -> [B, N..., ...]."""
    batch_size, stored = rows.shape[:2]
    offset = torch.arange(batch_size, device=rows.device) * stored
    flat = index + offset.view(-1, *[1] * (index.ndim - 1))
    table = rows.flatten(0, 1)
    if table.ndim != 2 or not table.is_floating_point():
        return table[flat]
    return F.embedding(flat, table)  # its backward pass is faster than that of indexing
