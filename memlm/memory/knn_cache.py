"""kNN cache: a store of compressed hidden states, of which each token retrieves the nearest.

After Safaya and Yuret 2024, "Neurocache", arXiv 2407.02486, with the search of Wu et al. 2022,
"Memorizing Transformers", arXiv 2203.08913: cosine keys and exact top-k.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm.cuda.knn_step import native as native_step
from memlm.layers.attention_weights import AttentionWeights
from memlm.memory.base import CallContext, MemoryModule, register
from memlm.memory.knn_cache_config import KnnCacheConfig
from memlm.memory.knn_retrieval import Compressor, Found, KnnCacheState, Retriever


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
        self.key_size, H, D = config.sizes(hidden_size)
        self.num_heads, self.head_size = H, D
        self.compressor = Compressor(hidden_size, self.key_size) if config.share is None else None
        self.q_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.k_proj = nn.Linear(self.key_size, H * D, bias=False)
        self.v_proj = nn.Linear(self.key_size, H * D, bias=False)
        self.o_proj = nn.Linear(H * D, hidden_size, bias=False)
        self.log_temperature = nn.Parameter(torch.empty(H))
        self.sink = nn.Parameter(torch.empty(H))
        self.place_bias = nn.Parameter(torch.empty(H, config.context * config.neighborhood))
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

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> None:
        if (weights.num_heads, weights.head_dim) != (self.num_heads, self.head_size):
            return
        if self.key_size > self.hidden_size:
            return
        self.q_proj.weight.copy_(weights.q)
        self.o_proj.weight.copy_(weights.o)
        groups = weights.num_heads // weights.num_kv_heads
        for linear, weight in ((self.k_proj, weights.k), (self.v_proj, weights.v)):
            heads = weight[:, : self.key_size].unflatten(0, (weights.num_kv_heads, -1))
            linear.weight.copy_(heads.repeat_interleave(groups, 0).flatten(0, 1))

    def init_state(self, batch_size: int, device=None, dtype=None) -> KnnCacheState:
        return KnnCacheState.empty_cache(
            self.config, self.hidden_size, batch_size, device, dtype, slots=not self.follows
        )

    def forward(
        self, hidden: Tensor, state: KnnCacheState, context: CallContext
    ) -> tuple[Tensor, KnnCacheState]:
        if hidden.shape[1] == 0:
            return torch.zeros_like(hidden), state
        if self.config.share is None:
            found, state = Retriever(self.config, self.compressor).retrieve(hidden, state, context)
            return self._attend(hidden, found), state
        # A name with a dot: no module can be called so.
        place = f"{self.config.share}.retrieval"
        owner, found = context.shared.get(place, (self, None))
        # The owner finds its own result when gradient checkpointing runs it a second time.
        if owner is self:
            retriever = Retriever(self.config, context.shared[self.config.share])
            found, state = retriever.retrieve(hidden, state, context)
            context.shared[place] = (self, found)
        return self._attend(hidden, found), state

    def _attend(self, hidden: Tensor, found: Found) -> Tensor:
        B, T, _ = hidden.shape
        H, config = self.num_heads, self.config
        q = self.q_proj(hidden)
        weights = (self.k_proj.weight, self.v_proj.weight, self.log_temperature, self.sink)
        parts = (q, *weights, self.place_bias, found.entries, found.similarity)
        if T == 1 and native_step.refusal(*parts) is None:
            out = native_step.attend(
                *parts, found.exists, neighborhood=config.neighborhood, reads=config.reads
            )
            return self.o_proj(out)
        q = q.unflatten(-1, (H, -1))  # [B, T, H, D]
        # q.(K z) = (K^T q).z and sum p (V z) = V (sum p z): what was found is never projected.
        k_weight = self.k_proj.weight.unflatten(0, (H, -1))
        v_weight = self.v_proj.weight.unflatten(0, (H, -1))
        entries = found.entries.to(q.dtype)  # [B, T, K, r]
        q_z = torch.einsum("bthd,hdr->bthr", q, k_weight) * q.shape[-1] ** -0.5
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = (q_z @ entries.transpose(-1, -2)).to(wide)  # [B, T, H, K]
        temperature = self.log_temperature.to(wide).exp()[:, None]
        shape = (H, config.context, config.top_k, config.neighborhood)
        bias = self.place_bias.to(wide).view(H, shape[1], 1, -1).expand(shape).flatten(1)
        logits = logits + temperature * found.similarity.to(wide)[:, :, None] + bias
        logits = logits.masked_fill(~found.exists[:, :, None], -torch.inf)
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
        read = 2 * self.num_heads * config.context * config.reads * self.key_size
        return 2 * tokens * (matrices + searched + read)
