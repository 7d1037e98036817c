"""Neural cache: what followed hidden states of the same document that are like the present one.

Grave, Joulin and Usunier 2017, "Improving Neural Language Models with a Continuous Cache", arXiv
1612.04426: p_cache(w) is proportional to the sum of exp(theta h_t.h_i) over earlier tokens i whose
next token x_{i+1} is w; theta is 1 / temperature here.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda import topk_search
from memlm.errors import UserError
from memlm.layers.context import CallContext
from memlm.memory.output_memory import (
    BLOCK,
    Evidence,
    OutputMemory,
    OutputMemoryConfig,
    register_output,
)
from memlm.retrieval.vector_store import ValueSpec, VectorStore, ring_order, take_rows

NEXT_TOKEN = ValueSpec((), torch.int64)


@dataclasses.dataclass(kw_only=True)
class NeuralCacheConfig(OutputMemoryConfig):
    """Sizes and choices.

    Attributes:
        capacity: hidden states kept per row, first in, first out.
        metric: cosine of two hidden states, or their dot product as in the paper; the scale of the
            second, and with it the temperature, depends on the model.
        temperature: 1 / theta of the paper.
        top_k: hidden states that a token uses, the nearest ones; None = all.
    """

    capacity: int = 2000
    weight: float = 0.1
    temperature: float = 0.1
    metric: Literal["cosine", "dot"] = "cosine"
    top_k: int | None = None

    def check(self) -> None:
        super().check()
        if self.capacity < 1:
            raise UserError(f"capacity is {self.capacity}, it must be at least 1")
        if self.top_k is not None and not 1 <= self.top_k <= self.capacity:
            raise UserError(
                f"top_k is {self.top_k}, it must be at least 1 and at most the capacity "
                f"({self.capacity})"
            )


@dataclasses.dataclass(kw_only=True)
class NeuralCacheState(VectorStore):
    """Hidden states with the token that followed each (`values[0]`), and the newest one.

    Attributes:
        pending: [B, hidden_size], the last hidden state, whose next token has not been read yet.
        pending_position: int64 [B], its position in the document, -1 = none.
    """

    pending: Tensor
    pending_position: Tensor

    def reset(self, rows: Tensor | None = None) -> Self:
        position = self.pending_position
        position = torch.full_like(position, -1) if rows is None else position.masked_fill(rows, -1)
        return dataclasses.replace(super().reset(rows), pending_position=position)


@dataclasses.dataclass
class _Searched:
    """What the tokens of a call may search.

    An entry's place is its position plus a multiple of a span for each document of the row, -1 in
    free slots. A token sees the entries with first <= place < last.

    Attributes:
        keys: [B, M, hidden_size].
        tokens: int64 [B, M], what followed each entry.
        places: int64 [B, M].
        first, last: int64 [B, T].
    """

    keys: Tensor
    tokens: Tensor
    places: Tensor
    first: Tensor
    last: Tensor


@register_output("neural_cache", NeuralCacheConfig)
class NeuralCache(OutputMemory):
    """Keep the hidden states of the document and find those like the present one.

    A token at position p of its document sees the entries of positions [p - capacity, p), however
    the calls are cut: the entry of position i is the input of the head there and the token at
    i + 1. The newest one waits in the state until its next token is read. Two tokens follow each
    other when their positions do; what was read while the memory was off leaves no wrong pair.

    Scores are differentiable, also with respect to the entries of the call.
    """

    def init_state(self, batch_size: int, device=None, dtype=None) -> NeuralCacheState:
        capacity, size = self.config.capacity, self.hidden_size
        ring = VectorStore.empty(batch_size, capacity, size, device, dtype, [NEXT_TOKEN])
        fields = {field.name: getattr(ring, field.name) for field in dataclasses.fields(ring)}
        return NeuralCacheState(
            **fields,
            pending=torch.zeros(batch_size, size, device=device, dtype=dtype),
            pending_position=torch.full((batch_size,), -1, dtype=torch.int64, device=device),
        )

    def read(
        self,
        hidden: Tensor,
        state: NeuralCacheState,
        context: CallContext,
        columns: Tensor,
    ) -> tuple[Iterator[Evidence], NeuralCacheState]:
        """See `OutputMemory.read`.

        Raises:
            UserError: when something is to be written and only embeddings were given.
        """
        layout, positions = context.layout, context.position_ids
        stored = torch.where(state.valid, state.positions, -1)
        span = torch.stack([part.max() for part in (positions, stored, state.pending_position)])
        base = layout.document.clamp(min=0) * (span.max() + 2)  # places of position 0
        longest = max(int(state.count.max()), 1)  # a free slot, which nothing sees, is no bother
        parts = [(state.keys[:, :longest], state.values[0][:, :longest], stored[:, :longest])]
        after = state
        if context.write:
            new, after = self._entries(hidden, state, context, base)
            parts.append(new)
        keys, tokens, places = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        # Padding sees nothing.
        last = torch.where(layout.valid, base + positions, 0)
        first = torch.where(layout.valid, base + (positions - self.config.capacity).clamp(min=0), 0)
        searched = _Searched(keys, tokens, places, first[:, columns], last[:, columns])
        if self.config.top_k is not None:
            order = ring_order(state.start, state.capacity)[:, :longest]
            searched = _oldest_first(searched, order)
        return self._search(hidden[:, columns].to(keys.dtype), searched), after

    def _entries(
        self, hidden: Tensor, state: NeuralCacheState, context: CallContext, base: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], NeuralCacheState]:
        """Keys, next tokens and places [B, 1 + T] of the waiting state and the call; new state."""
        if context.input_ids is None:
            raise UserError(
                "the neural cache stores the tokens that are read: pass input_ids instead of "
                "inputs_embeds, or write_memory=False"
            )
        layout = context.layout
        pad = (1, 0)
        keys = torch.cat((state.pending[:, None], hidden.to(state.pending.dtype)), 1)
        waiting = state.pending_position[:, None]
        places = torch.where(layout.valid, base + context.position_ids, -1)
        places = torch.cat((waiting, places), 1)
        ids = F.pad(context.input_ids, pad)
        # The next valid column of each, itself where there is none.
        columns = torch.arange(places.shape[1], device=places.device)
        beyond = len(columns)
        later = torch.where(places >= 0, columns, beyond).flip(1).cummin(1).values.flip(1)
        following = F.pad(later[:, 1:], (0, 1), value=beyond)
        following = torch.where(following < beyond, following, columns)
        complete = (places >= 0) & (places.gather(1, following) == places + 1)
        tokens = ids.gather(1, following)

        newest = torch.where(places >= 0, columns, -1).amax(1, keepdim=True)  # [B, 1]
        document = F.pad(layout.document, pad)
        current = document.gather(1, newest.clamp(min=0))  # the document that is carried on
        current_base = F.pad(base, pad).gather(1, newest.clamp(min=0))
        ready = complete & (document == current)
        after = state.reset((current > 0).squeeze(1)).write(
            keys, places - current_base, valid=ready, values=(tokens,)
        )
        at = newest.clamp(min=0)
        after = dataclasses.replace(
            after,
            pending=take_rows(keys, at.squeeze(1)[:, None]).squeeze(1),
            pending_position=torch.where(
                newest >= 0, places.gather(1, at) - current_base, -1
            ).squeeze(1),
        )
        return (keys, tokens, torch.where(complete, places, -1)), after

    def _search(self, queries: Tensor, searched: _Searched) -> Iterator[Evidence]:
        """Blocks of the evidence of queries [B, N, hidden_size]."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        keys = searched.keys.to(wide)
        cosine = self.config.metric == "cosine"
        if cosine:
            keys = F.normalize(keys, dim=-1)
        # A block of as many tokens as the capacity looks back on twice as many entries.
        width = min(keys.shape[1], 2 * self.config.capacity)
        step = max(1, min(self.config.capacity, BLOCK // (len(queries) * width)))
        for start in range(0, queries.shape[1], step):
            part = slice(start, start + step)
            block = queries[:, part].to(wide)
            if cosine:
                block = F.normalize(block, dim=-1)
            limits = (searched.first[:, part], searched.last[:, part])
            if self.config.top_k is None:
                yield _all_entries(block, keys, searched, *limits)
            else:
                yield _nearest(block, keys, searched, *limits, self.config.top_k)

    def flops(self, tokens: int) -> int:
        """The search of a full cache."""
        return 2 * tokens * min(tokens, self.config.capacity) * self.hidden_size


def _oldest_first(searched: _Searched, order: Tensor) -> _Searched:
    """The ring's entries, which stand in front, in `order` (int64 [B, M']): ties go to the oldest.

    Free slots may stand among them.
    """
    count = order.shape[1]

    def sort(part: Tensor) -> Tensor:
        return torch.cat((take_rows(part[:, :count], order), part[:, count:]), 1)

    return dataclasses.replace(
        searched,
        keys=sort(searched.keys),
        tokens=sort(searched.tokens),
        places=sort(searched.places),
    )


def _all_entries(
    queries: Tensor, keys: Tensor, searched: _Searched, first: Tensor, last: Tensor
) -> Evidence:
    """Evidence of every entry that a query sees.

    Args:
        queries: [B, t, D].
        keys: [B, M, D], those of `searched`, ready to be compared.
        searched: the entries.
        first, last: int64 [B, t].
    """
    places = searched.places
    seen = (places >= first.amin(1, keepdim=True)) & (places < last.amax(1, keepdim=True))
    seen = seen.any(0).nonzero()
    reach = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0)
    places = places[:, None, reach]
    visible = (places >= first.unsqueeze(-1)) & (places < last.unsqueeze(-1))
    scores = queries @ keys[:, reach].transpose(1, 2)
    tokens = searched.tokens[:, None, reach].expand(scores.shape)
    return Evidence(scores.masked_fill(~visible, -torch.inf), tokens)


def _nearest(
    queries: Tensor, keys: Tensor, searched: _Searched, first: Tensor, last: Tensor, k: int
) -> Evidence:
    """Evidence of the k nearest entries; arguments as in `_all_entries`."""
    found, index = topk_search(queries, keys, k, positions=(searched.places, first, last))
    index = index.clamp(min=0)
    # Once more, for the gradient.
    scores = (take_rows(keys, index) @ queries.unsqueeze(-1)).squeeze(-1)
    scores = scores.masked_fill(found == -torch.inf, -torch.inf)
    return Evidence(scores, take_rows(searched.tokens, index))
