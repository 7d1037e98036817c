"""What the kNN cache stores, and what its tokens find."""

import dataclasses
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from memlm.cuda.knn_step import native as native_step
from memlm.memory.base import CallContext
from memlm.memory.knn_cache_config import KnnCacheConfig
from memlm.memory.knn_lru import retrieve_lru
from memlm.memory.segment_store import SegmentStore, Store, read_store
from memlm.retrieval.vector_store import ValueSpec, take_rows

# Steps per unit of a state in the search: products up to 16 units stay below 2^24, where float32
# counts exactly. Finer than bfloat16 at the size of a typical channel.
GRID = 1024


class Compressor(nn.Module):
    """z = LayerNorm(Linear(hidden_size, key_size)): what is stored, and what is searched for."""

    def __init__(self, hidden_size: int, key_size: int):
        super().__init__()
        self.proj = nn.Linear(hidden_size, key_size, bias=False)
        self.norm = nn.LayerNorm(key_size)
        self.init_weights()

    def init_weights(self) -> None:
        # Rows of unit length on average: the norm that follows takes the scale away anyway.
        init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.proj(hidden))


@dataclasses.dataclass
class Found:
    """What tokens found; the layers with the same `share` all read it.

    Attributes:
        entries: [B, T, K, key_size], the neighbours of the best hit first.
        similarity: [B, T, K], of a token and the hit that each entry belongs to, differentiable.
        exists: bool [B, T, K], False where there is no visible entry.
    """

    entries: Tensor
    similarity: Tensor
    exists: Tensor

    def at(self, tokens: Tensor) -> "Found":
        """What the tokens at int64 [B, N...] found, [B, N..., K, ...]."""
        entries = take_rows(self.entries.flatten(2), tokens)
        entries = entries.unflatten(-1, self.entries.shape[2:])
        return Found(entries, take_rows(self.similarity, tokens), take_rows(self.exists, tokens))

    def then(self, *later: "Found") -> "Found":
        """These tokens, then those of `later`."""
        parts = [(part.entries, part.similarity, part.exists) for part in (self, *later)]
        return Found(*(torch.cat(each, 1) for each in zip(*parts, strict=True)))


@dataclasses.dataclass(kw_only=True)
class KnnCacheState(SegmentStore):
    """The store, and what the last tokens found.

    Attributes:
        recent_entries: [B, context - 1, K, key_size], oldest token first.
        recent_similarity: [B, context - 1, K].
        recent_exists: bool [B, context - 1, K].
        used: bool [B, capacity], slots that the unfinished segment read; [B, 0] first in, first
            out.
    """

    recent_entries: Tensor
    recent_similarity: Tensor
    recent_exists: Tensor
    used: Tensor

    @classmethod
    def empty_cache(
        cls,
        config: KnnCacheConfig,
        hidden_size: int,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        slots: bool = True,
    ) -> Self:
        """The state before the first token; without `slots` that of a layer that stores nothing."""
        key_size = config.sizes(hidden_size)[0]
        key_dtype, dtype = config.state_dtypes(dtype)
        values = [ValueSpec((hidden_size,), dtype)] if config.reproject else []
        capacity, segment = (config.capacity, config.segment) if slots else (0, 0)
        store = SegmentStore.empty_segments(
            batch_size, capacity, segment, key_size, device, key_dtype, values, config.eviction
        )
        recent = (batch_size, config.context - 1 if slots else 0, config.reads)
        used = capacity if config.eviction == "lru" else 0
        return cls(
            **{field.name: getattr(store, field.name) for field in dataclasses.fields(store)},
            recent_entries=torch.zeros(*recent, key_size, device=device, dtype=key_dtype),
            recent_similarity=torch.zeros(
                recent, device=device, dtype=torch.promote_types(dtype, torch.float32)
            ),
            recent_exists=torch.zeros(recent, device=device, dtype=torch.bool),
            used=torch.zeros(batch_size, used, device=device, dtype=torch.bool),
        )

    def reset(self, rows: Tensor | None = None) -> Self:
        if rows is None:
            rows = torch.ones_like(self.written, dtype=torch.bool)
        return dataclasses.replace(
            super().reset(rows),
            recent_exists=self.recent_exists.masked_fill(rows[:, None, None], False),
            used=self.used.masked_fill(rows[:, None], False),
        )


class Retriever:
    """Stores the states of a call and finds the nearest of its tokens.

    Args:
        config: of the cache.
        compressor: what makes states.
    """

    def __init__(self, config: KnnCacheConfig, compressor: Compressor):
        self.config = config
        self.compressor = compressor

    def retrieve(
        self, hidden: Tensor, state: KnnCacheState, context: CallContext
    ) -> tuple[Found, KnnCacheState]:
        """What the tokens of a call read, context * top_k * neighborhood entries, and the state.

        Args:
            hidden: [B, T, hidden_size], T > 0.
            state: of the B rows.
            context: the documents of the call.
        """
        z = self.compressor(hidden)
        values = (hidden,) if self.config.reproject else ()
        if self.config.eviction == "lru":
            found, after = retrieve_lru(self, z, values, state, context)
        else:
            found, after = self._step(z, state, context) or self._call(z, state, context, values)
        if self.config.context == 1:
            return found, after
        found, recent = with_context(found, state, context, self.config.context)
        return found, dataclasses.replace(after, **recent) if context.write else state

    def _step(
        self, z: Tensor, state: KnnCacheState, context: CallContext
    ) -> tuple[Found, KnnCacheState] | None:
        """As `_call`, in decoding on a CPU; None where it is not for this call."""
        config = self.config
        if not (context.layout.is_step and context.write) or config.reproject or not len(z):
            return None
        if state.pending.shape[1] != config.segment:
            return None
        if native_step.refusal(z, state.keys, state.pending) is not None:
            return None
        parts = native_step.find(
            *(z, state.keys, state.positions, state.written),
            *(state.pending, state.pending_positions, context.position_ids),
            metric=config.metric,
            top_k=config.top_k,
            neighborhood=config.neighborhood,
            grid=GRID,
        )
        if parts is None:
            return None
        *found, pending, positions = parts
        after = dataclasses.replace(state, pending=pending, pending_positions=positions)
        return Found(*found), after

    def _call(
        self, z: Tensor, state: KnnCacheState, context: CallContext, values: tuple[Tensor, ...]
    ) -> tuple[Found, KnnCacheState]:
        """What the tokens find in a store that is first in, first out, and the new state."""
        config = self.config
        store, after = read_store(state, z, context, config.segment, values)
        found, _ = self.find(z, store, *store.visible(config.capacity, config.segment))
        return found, after

    def find(self, z: Tensor, store: Store, first: Tensor, last: Tensor) -> tuple[Found, Tensor]:
        """The nearest of tokens z [B, T, r] among the entries with first <= place < last [B, T].

        Returns:
            What was found, and where: int64 [B, T, K] into the store.
        """
        config = self.config
        metric = "dot" if config.metric == "cosine" else config.metric
        queries, keys = self._on_grid(z), self._on_grid(store.keys)
        _, hits = store.search(queries, keys, config.top_k, metric, first, last)
        index, exists = store.neighbors(hits, first, last, config.neighborhood)
        keys = store.keys
        if config.reproject and torch.is_grad_enabled():
            keys = self._compressed_again(store, index, exists)
        # [B, T, top_k, neighborhood, r]; a NaN in a free slot would pass through a weight of zero.
        entries = take_rows(keys, index).masked_fill(~exists.unsqueeze(-1), 0)
        at_hit = entries[:, :, :, (config.neighborhood - 1) // 2]
        similarity = self._similarity(z, hits, at_hit).unsqueeze(-1).expand(index.shape)
        parts = (part.flatten(2, 3) for part in (entries, similarity, exists))
        return Found(*parts), index.flatten(2)

    @torch.no_grad()
    def _on_grid(self, z: Tensor) -> Tensor:
        """States as whole numbers, of unit length (cosine) or unit scale times GRID.

        Their scores are whole numbers too, exact in any order of summation. Equal states then score
        equally in every call, and the older wins, however the calls are cut; the rounding errors of
        differently shaped products would choose among them at random.
        """
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        z = F.normalize(z, dim=-1) if self.config.metric == "cosine" else z * z.shape[-1] ** -0.5
        return (GRID * z).round()

    def _compressed_again(self, store: Store, index: Tensor, exists: Tensor) -> Tensor:
        """The keys [B, M, r], those that were found as the compressor makes them now."""
        row = torch.arange(index.shape[0], device=index.device) * store.keys.shape[1]
        read = (row[:, None, None, None] + index)[exists].unique()
        z = self.compressor(store.values[0].flatten(0, 1)[read]).to(store.keys.dtype)
        return store.keys.flatten(0, 1).index_put((read,), z).view_as(store.keys)

    def _similarity(self, z: Tensor, hits: Tensor, at_hit: Tensor) -> Tensor:
        """Of tokens [B, T, r] and their hits, [B, T, k]; on the scale of a cosine for every metric.

        Args:
            z: [B, T, r].
            hits: int64 [B, T, k] into the store, -1 for none.
            at_hit: the entries there, [B, T, k, r].
        """
        wide = torch.promote_types(z.dtype, torch.float32)
        z, at_hit = z.to(wide), at_hit.to(wide)
        scores = (at_hit @ z.unsqueeze(-1)).squeeze(-1)
        if self.config.metric == "dot":
            return scores / z.shape[-1]
        squares = at_hit.square().sum(-1).masked_fill(hits < 0, 1)
        if self.config.metric == "l2":
            return (2 * scores - squares) / z.shape[-1]
        return scores * (squares * z.square().sum(-1, keepdim=True)).clamp(min=1e-24).rsqrt()


def with_context(
    found: Found, state: KnnCacheState, context: CallContext, width: int
) -> tuple[Found, dict[str, Tensor]]:
    """Each token's findings with those of the width - 1 tokens of its document before it.

    Args:
        found: of the call's tokens, K entries each.
        state: holds those of the tokens before the call.
        context: the documents of the call.
        width: tokens whose findings each token reads.

    Returns:
        width * K entries for each token, its own first, and the `recent` fields of the new state.
    """
    layout, before = context.layout, width - 1
    recent = Found(state.recent_entries, state.recent_similarity, state.recent_exists)
    known = Found(
        recent.entries.to(found.entries.dtype),
        recent.similarity.to(found.similarity.dtype),
        recent.exists,
    ).then(found)
    valid = F.pad(layout.valid, (before, 0), value=True)
    document = F.pad(layout.document, (before, 0))
    columns = valid.logical_not().int().argsort(dim=1, stable=True)  # of each rank
    rank = valid.cumsum(1) - 1

    def read(ranks: Tensor, own: Tensor) -> Found:
        """At ranks [B, N, width] of the tokens of document `own` [B, N, 1]."""
        at = columns.gather(1, ranks.clamp(min=0).flatten(1))
        same = document.gather(1, at).view_as(ranks) == own
        part = known.at(at.view_as(ranks))
        return Found(part.entries, part.similarity, part.exists & same.unsqueeze(-1))

    steps = torch.arange(width, device=rank.device)
    wide = read(rank[:, before:, None] - steps, layout.document.unsqueeze(-1))
    wide = Found(*(getattr(wide, f.name).flatten(2, 3) for f in dataclasses.fields(wide)))
    if not context.write:
        return wide, {}
    newest = valid.sum(1, keepdim=True) - 1
    own = document.gather(1, columns.gather(1, newest))
    kept = read((newest - before + 1 + steps[:before]).unsqueeze(1), own.unsqueeze(1))
    return wide, {
        "recent_entries": kept.entries.squeeze(1).to(recent.entries.dtype),
        "recent_similarity": kept.similarity.squeeze(1).to(recent.similarity.dtype),
        "recent_exists": kept.exists.squeeze(1),
    }
