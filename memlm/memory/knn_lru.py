"""The kNN cache with least-recently-used eviction: what a call's segments do, one after the other.

The tokens of a segment search what the segments before it left. At its end the entries that any of
them read count as used now, and its own states take the free slots or those of the entries that
were not used for the longest time. A call may hold parts of several segments, of several documents,
different ones in every row: step i does the i-th part of each row.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memlm.memory.base import CallContext
from memlm.memory.segment_store import Store
from memlm.retrieval.vector_store import take_rows

if TYPE_CHECKING:
    from memlm.memory.knn_retrieval import Found, KnnCacheState, Retriever


class PositionStore(Store):
    """Entries in any order: the neighbours of an entry are looked up by position."""

    def neighbors(
        self, hits: Tensor, first: Tensor, last: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        if width == 1:
            return hits.clamp(min=0).unsqueeze(-1), (hits >= 0).unsqueeze(-1)
        before = (width - 1) // 2
        offsets = torch.arange(-before, width - before, device=hits.device)
        ranked, order = self.places.sort(dim=1)
        place = self.places.gather(1, hits.clamp(min=0).flatten(1)).view_as(hits)
        place = place.unsqueeze(-1) + offsets
        rank = torch.searchsorted(ranked, place.flatten(1)).clamp(max=ranked.shape[1] - 1)
        found = (hits >= 0).unsqueeze(-1) & (ranked.gather(1, rank).view_as(place) == place)
        found &= (place >= first[:, :, None, None]) & (place < last[:, :, None, None])
        return order.gather(1, rank).view_as(place), found


def retrieve_lru(
    retriever: "Retriever",
    z: Tensor,
    values: tuple[Tensor, ...],
    state: "KnnCacheState",
    context: CallContext,
) -> tuple["Found", "KnnCacheState"]:
    """What the tokens of a call find, and the state after it.

    Args:
        retriever: finds.
        z: [B, T, key_size], the states of the call.
        values: what is stored beside them, each [B, T, ...].
        state: of the B rows.
        context: the documents of the call; with `context.write` False the same state comes back.
    """
    layout, segment = context.layout, retriever.config.segment
    parts, tokens = segment_parts(context, segment)
    document = torch.zeros_like(state.written)
    before, found = state, []
    for columns, valid in parts:
        here = valid[:, 0]
        positions = context.position_ids.gather(1, columns)
        own = layout.document.gather(1, columns[:, :1]).squeeze(1)
        begins = here & (own != document)
        document = torch.where(here, own, document)
        if bool(begins.any()):
            state = state.reset(begins)
        boundary = positions // segment * segment
        newest = state.pending_positions.amax(1)
        state = _complete(state, here & (newest >= 0) & (newest < boundary[:, 0]))
        store = PositionStore(
            state.keys,
            state.values,
            torch.where(state.valid, state.positions, -1),
            state.start,
            positions,
            torch.zeros_like(positions),
        )
        part = take_rows(z, columns)
        result, slots = retriever.find(part, store, torch.zeros_like(boundary), boundary)
        found.append(result)
        if not context.write:
            continue
        state = _use(state, slots, result.exists & valid.unsqueeze(-1))
        state = _wait(
            state, (part, *(take_rows(value, columns) for value in values)), positions, valid
        )
        newest = state.pending_positions.amax(1)
        state = _complete(state, (newest >= 0) & ((newest + 1) % segment == 0))
    return found[0].then(*found[1:]).at(tokens), state if context.write else before


def segment_parts(context: CallContext, segment: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The runs of tokens of one segment of one document, row by row.

    Returns:
        For each step (columns int64 [B, L], bool [B, L]): which tokens of the call are each row's
        next run, and which of the L are there, those first. And int64 [B, T], where each token of
        the call is in all steps laid end to end.
    """
    valid = context.layout.valid
    columns = valid.logical_not().int().argsort(dim=1, stable=True)
    present = valid.gather(1, columns)
    run = torch.stack((context.layout.document, context.position_ids // segment), -1)
    run = take_rows(run, columns)
    changes = (run[:, 1:] != run[:, :-1]).any(-1)
    step = torch.nn.functional.pad(changes.cumsum(1), (1, 0)).masked_fill(~present, -1)
    parts, place, done = [], torch.zeros_like(columns), 0
    for index in range(int(step.max()) + 1):
        mine = step == index
        length = int(mine.sum(1).max())
        order = mine.logical_not().int().argsort(dim=1, stable=True)[:, :length]
        at, there = columns.gather(1, order), mine.gather(1, order)
        rows, slots = there.nonzero(as_tuple=True)
        place[rows, at[rows, slots]] = done + slots
        parts.append((at, there))
        done += length
    return parts, place


def _use(state: "KnnCacheState", slots: Tensor, read: Tensor) -> "KnnCacheState":
    """Remember the slots [B, L, K] that were read (bool) until the segment is complete."""
    used = state.used.int().scatter_reduce(1, slots.flatten(1), read.flatten(1).int(), "amax")
    return dataclasses.replace(state, used=used.bool())


def _wait(
    state: "KnnCacheState", entries: tuple[Tensor, ...], positions: Tensor, valid: Tensor
) -> "KnnCacheState":
    """Put entries [B, L, ...] of the unfinished segment behind those that wait."""
    places = torch.cat((state.pending_positions, positions.masked_fill(~valid, -1)), 1)
    segment = state.pending_positions.shape[1]
    order = (places >= 0).int().argsort(dim=1, stable=True)[:, -segment:]
    places = places.gather(1, order)
    waiting = []
    for old, new in zip((state.pending, *state.pending_values), entries, strict=True):
        part = take_rows(torch.cat((old, new.to(old.dtype)), 1), order)
        waiting.append(part.masked_fill((places < 0).unsqueeze(-1), 0))
    return dataclasses.replace(
        state,
        pending=waiting[0],
        pending_values=tuple(waiting[1:]),
        pending_positions=places,
    )


def _complete(state: "KnnCacheState", rows: Tensor) -> "KnnCacheState":
    """End the waiting segment of `rows` (bool [B])."""
    if not bool(rows.any()):
        return state
    slots = torch.arange(state.capacity, device=rows.device)
    state = state.touch(torch.where(state.used & rows[:, None], slots, -1), state.written)
    ready = rows[:, None] & (state.pending_positions >= 0)
    state = state.write(
        state.pending, state.pending_positions, valid=ready, values=state.pending_values
    )
    done = rows[:, None, None]
    return dataclasses.replace(
        state,
        pending=state.pending.masked_fill(done, 0),
        pending_values=tuple(part.masked_fill(done, 0) for part in state.pending_values),
        pending_positions=state.pending_positions.masked_fill(rows[:, None], -1),
        used=state.used.masked_fill(rows[:, None], False),
    )
