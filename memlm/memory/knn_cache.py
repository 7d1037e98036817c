"""kNN cache: a store of compressed hidden states, of which each token retrieves the nearest.

After Safaya and Yuret 2024, "Neurocache", arXiv 2407.02486, with the search of Wu et al. 2022,
"Memorizing Transformers", arXiv 2203.08913: cosine keys and exact top-k.
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from memlm.errors import UserError
from memlm.memory.base import CallContext, MemoryConfig, MemoryModule, register
from memlm.memory.segment_store import SegmentStore, read_store
from memlm.retrieval.vector_store import take_rows

# Steps per unit of a state in the search: products up to 16 units stay below 2^24, where float32
# counts exactly. Finer than bfloat16 at the size of a typical channel.
GRID = 1024


@dataclasses.dataclass(kw_only=True)
class KnnCacheConfig(MemoryConfig):
    """Sizes and choices.

    Attributes:
        capacity: compressed states kept per row, first in, first out.
        segment: states become visible when their segment of so many tokens is complete; not more
            than the window of the attention beside it.
        key_size: channels of a compressed state; default hidden_size / 4.
        top_k: states found per token.
        neighborhood: consecutive states read around each hit, for 2 the hit and the next one.
        metric: how states are compared, see `memlm.cuda.topk_search`. Neurocache uses l2; of
            layer-normalised states the three rank almost alike.
        num_heads: heads of the attention over what was found; default one per 64 channels.
        temperature: start value of the factor on the similarity of a hit, learned per head.
        gate: as in every memory; here the branch has a gain from the start.
    """

    capacity: int = 16384
    segment: int = 64
    key_size: int | None = None
    top_k: int = 16
    neighborhood: int = 2
    metric: Literal["cosine", "dot", "l2"] = "cosine"
    num_heads: int | None = None
    temperature: float = 10.0
    gate: float | None = 1.0

    @property
    def delay(self) -> int:
        return self.segment

    def sizes(self, hidden_size: int) -> tuple[int, int]:
        """Channels of a compressed state and heads of the cache attention."""
        key_size = self.key_size if self.key_size is not None else max(1, hidden_size // 4)
        heads = self.num_heads if self.num_heads is not None else max(1, hidden_size // 64)
        return key_size, heads

    def check_sizes(self, hidden_size: int) -> None:
        key_size, heads = self.sizes(hidden_size)
        for name, value in (
            ("capacity", self.capacity),
            ("segment", self.segment),
            ("key_size", key_size),
            ("top_k", self.top_k),
            ("neighborhood", self.neighborhood),
            ("num_heads", heads),
        ):
            if value < 1:
                raise UserError(f"knn_cache: {name} is {value}, it must be at least 1")
        for name in ("segment", "top_k", "neighborhood"):
            if getattr(self, name) > self.capacity:
                raise UserError(
                    f"knn_cache: {name} {getattr(self, name)} is more than capacity "
                    f"{self.capacity}; use {name} <= capacity"
                )
        if hidden_size % heads:
            raise UserError(
                f"knn_cache: num_heads {heads} does not divide the hidden size {hidden_size}"
            )
        if self.temperature <= 0:
            raise UserError(f"knn_cache: temperature is {self.temperature}, it must be positive")


@dataclasses.dataclass
class Retrieval:
    """What one call's tokens found; the layers with the same `share` all read it.

    Attributes:
        owner: the layer that searched.
        entries: [B, T, top_k * neighborhood, key_size], the neighbours of the best hit first.
        similarity: [B, T, top_k * neighborhood], of the token and the hit that each entry belongs
            to, differentiable.
        found: bool [B, T, top_k * neighborhood], False where there is no visible entry.
    """

    owner: nn.Module
    entries: Tensor
    similarity: Tensor
    found: Tensor


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


@register("knn_cache", KnnCacheConfig)
class KnnCache(MemoryModule):
    """Store compressed states, find the nearest for every token, attend to what was found.

    A token at position p of its document searches the stored states of positions
    [b - capacity, b), b = (p // segment) * segment, so what it sees does not depend on how calls
    were cut. States of an unfinished segment wait in the pending part of the state. The states of
    the call are stored with their gradient, so training reaches the keys and values that were
    retrieved.

    Attention over the entries found, per head: logit = q.k / sqrt(head size) + temperature *
    similarity of the hit + a bias for the place in the neighbourhood, so that "what came after the
    most similar state" is one step away. A sink with a learned logit and the value zero takes the
    rest: a token may ignore the cache, and an empty cache gives exactly zero.

    Layers with the same `share` use one compressor and one retrieval per token: the first layer
    of a call stores and searches, the others attend to what it found with their own projections
    and leave their own state as it is; when they know that they follow, it has no slots.
    """

    def __init__(self, config: KnnCacheConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        self.key_size, H = config.sizes(hidden_size)
        self.num_heads = H
        self.compressor = Compressor(hidden_size, self.key_size) if config.share is None else None
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(self.key_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(self.key_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.log_temperature = nn.Parameter(torch.empty(H))
        self.sink = nn.Parameter(torch.empty(H))
        self.place_bias = nn.Parameter(torch.empty(H, config.neighborhood))
        self.init_weights()

    @classmethod
    def build_shared(cls, config: KnnCacheConfig, hidden_size: int) -> Compressor:
        return Compressor(hidden_size, config.sizes(hidden_size)[0])

    def init_weights(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init.normal_(linear.weight, std=linear.in_features**-0.5)
        init.constant_(self.log_temperature, math.log(self.config.temperature))
        init.constant_(self.sink, 0.5 * self.config.temperature)
        init.zeros_(self.place_bias)

    def init_state(self, batch_size: int, device=None, dtype=None) -> SegmentStore:
        slots = (0, 0) if self.follows else (self.config.capacity, self.config.segment)
        return SegmentStore.empty_segments(batch_size, *slots, self.key_size, device, dtype)

    def forward(
        self, hidden: Tensor, state: SegmentStore, context: CallContext
    ) -> tuple[Tensor, SegmentStore]:
        if hidden.shape[1] == 0:
            return torch.zeros_like(hidden), state
        if self.config.share is None:
            retrieval, state = self._retrieve(self.compressor, hidden, state, context)
            return self._attend(hidden, retrieval), state
        # A name with a dot: no module can be called so.
        place = f"{self.config.share}.retrieval"
        retrieval = context.shared.get(place)
        # The owner finds its own result when gradient checkpointing runs it a second time.
        if retrieval is None or retrieval.owner is self:
            compressor = context.shared[self.config.share]
            retrieval, state = self._retrieve(compressor, hidden, state, context)
            context.shared[place] = retrieval
        return self._attend(hidden, retrieval), state

    def _retrieve(
        self, compressor: Compressor, hidden: Tensor, state: SegmentStore, context: CallContext
    ) -> tuple[Retrieval, SegmentStore]:
        config = self.config
        z = compressor(hidden).to(state.keys.dtype)
        store, new_state = read_store(state, z, context, config.segment)
        first, last = store.visible(config.capacity, config.segment)
        metric = "dot" if config.metric == "cosine" else config.metric
        queries, keys = self._on_grid(z), self._on_grid(store.keys)
        _, hits = store.search(queries, keys, config.top_k, metric, first, last)
        index, found = store.neighbors(hits, first, last, config.neighborhood)
        entries = take_rows(store.keys, index)  # [B, T, top_k, neighborhood, r]
        at_hit = entries[:, :, :, (config.neighborhood - 1) // 2]
        similarity = self._similarity(z, store.keys, hits, at_hit)
        similarity = similarity.unsqueeze(-1).expand(index.shape)
        parts = (part.flatten(2, 3) for part in (entries, similarity, found))
        return Retrieval(self, *parts), new_state

    @torch.no_grad()
    def _on_grid(self, z: Tensor) -> Tensor:
        """States as whole numbers, of unit length (cosine) or unit scale times GRID.

        Their scores are whole numbers too, exact in any order of summation. Equal states then score
        equally in every call, and the older wins, however the calls are cut; the rounding errors of
        differently shaped products would choose among them at random.
        """
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        z = F.normalize(z, dim=-1) if self.config.metric == "cosine" else z * self.key_size**-0.5
        return (GRID * z).round()

    def _similarity(self, z: Tensor, keys: Tensor, hits: Tensor, at_hit: Tensor) -> Tensor:
        """Of tokens [B, T, r] and their hits, [B, T, k]; on the scale of a cosine for every metric.

        Args:
            z: [B, T, r].
            keys: the store [B, M, r].
            hits: int64 [B, T, k] into M.
            at_hit: the entries there, [B, T, k, r].
        """
        scores = (at_hit @ z.unsqueeze(-1)).squeeze(-1)
        if self.config.metric == "dot":
            return scores / self.key_size
        # Once per entry of the store instead of once per hit.
        squares = keys.square().sum(-1).gather(1, hits.clamp(min=0).flatten(1)).view_as(hits)
        if self.config.metric == "l2":
            return (2 * scores - squares) / self.key_size
        return scores * (squares * z.square().sum(-1, keepdim=True)).clamp(min=1e-24).rsqrt()

    def _attend(self, hidden: Tensor, retrieval: Retrieval) -> Tensor:
        B, T, _ = hidden.shape
        H = self.num_heads
        q = self.q_proj(hidden).unflatten(-1, (H, -1))  # [B, T, H, D]
        # q.(K z) = (K^T q).z and sum p (V z) = V (sum p z): what was found is never projected.
        k_weight = self.k_proj.weight.unflatten(0, (H, -1))
        v_weight = self.v_proj.weight.unflatten(0, (H, -1))
        entries = retrieval.entries.to(q.dtype)  # [B, T, K, r]
        q_z = torch.einsum("bthd,hdr->bthr", q, k_weight) * q.shape[-1] ** -0.5
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = (q_z @ entries.transpose(-1, -2)).to(wide)  # [B, T, H, K]
        temperature = self.log_temperature.to(wide).exp()[:, None]
        bias = self.place_bias.to(wide).repeat(1, self.config.top_k)
        logits = logits + temperature * retrieval.similarity.to(wide)[:, :, None] + bias
        logits = logits.masked_fill(~retrieval.found[:, :, None], -torch.inf)
        sink = self.sink.to(wide).view(H, 1).expand(B, T, H, 1)
        weights = torch.cat((logits, sink), -1).softmax(-1)[..., :-1].to(entries.dtype)
        out = torch.einsum("bthr,hdr->bthd", weights @ entries, v_weight)
        return self.o_proj(out.flatten(2))

    def flops(self, tokens: int) -> int:
        """Projections, the search of a full store and the attention over what is found."""
        config = self.config
        linears = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        matrices = sum(linear.weight.numel() for linear in linears)
        matrices += self.hidden_size * self.key_size
        searched = min(tokens, config.capacity) * self.key_size
        read = 2 * self.num_heads * config.top_k * config.neighborhood * self.key_size
        return 2 * tokens * (matrices + searched + read)
