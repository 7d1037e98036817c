"""Memorizing attention: heads that see a window and find further keys in a store of their own.

Wu et al. 2022, "Memorizing Transformers", arXiv 2203.08913.
"""

import dataclasses
import math
import types
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from memlm.cuda import gathered_dot, weighted_bag
from memlm.errors import UserError
from memlm.layers.attention import Attention
from memlm.layers.attention_config import AttentionConfig
from memlm.layers.attention_state import AttentionState
from memlm.layers.rotary import rotate_both
from memlm.memory.base import AttendingMemory, CallContext, MemoryConfig, register
from memlm.memory.segment_store import SegmentStore, Store, read_store
from memlm.retrieval.vector_store import ValueSpec, search_ring


@dataclasses.dataclass(kw_only=True)
class MemorizingAttentionConfig(MemoryConfig):
    """Sizes and choices.

    Attributes:
        num_heads: query heads; None = one per 64 channels (at least 1).
        num_key_value_heads: key/value heads; None = num_heads.
        head_dim: channels per head; None = hidden_size / num_heads.
        rope: rotary positions in the window; what is stored has no position.
        rope_theta: base of the rotary frequencies.
        window: tokens that the attention sees, itself included.
        capacity: tokens whose keys and values are kept per row, first in, first out.
        segment: tokens can be found when their segment of so many is complete; not more than the
            window.
        top_k: stored tokens that each head finds for each token.
        temperature: start value of the factor on the cosine of a query and a key, learned per head.
        head_gate: g of a learned number b per head, which starts at 0: "sigmoid" (the paper's),
            half of a head's output is from the store at first; "tanh", nothing is: the output is
            exactly that of the window, as when the store is added to trained attention.
    """

    num_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope: bool = True
    rope_theta: float = 10000.0
    window: int = 512
    capacity: int = 8192
    segment: int = 64
    top_k: int = 32
    temperature: float = 10.0
    head_gate: Literal["sigmoid", "tanh"] = "sigmoid"

    @property
    def delay(self) -> int:
        return self.segment

    @property
    def attention_window(self) -> int | None:
        return self.window

    def attention(self) -> AttentionConfig:
        """Sizes of the attention inside."""
        return AttentionConfig(
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            rope=self.rope,
            rope_theta=self.rope_theta,
            window=self.window,
        )

    def check_sizes(self, hidden_size: int) -> None:
        try:
            self.attention().check_sizes(hidden_size)
        except UserError as error:
            raise UserError(f"memorizing_attention: {error}") from error
        for name in ("capacity", "segment", "top_k"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"memorizing_attention: {name} is {value}, it must be at least 1")
        for name, limit in (("segment", "window"), ("segment", "capacity"), ("top_k", "capacity")):
            value, most = getattr(self, name), getattr(self, limit)
            if value > most:
                raise UserError(
                    f"memorizing_attention: {name} {value} is more than {limit} {most}; "
                    f"use {name} <= {limit}"
                )
        if self.temperature <= 0:
            raise UserError(
                f"memorizing_attention: temperature is {self.temperature}, it must be positive"
            )


class CosineAttention(Attention):
    """`Attention` of queries and keys of length 1, with a learned temperature per head.

    Keys that are met long after they were made stay comparable that way.
    """

    def __init__(self, spec: AttentionConfig, hidden_size: int, temperature: float):
        backend = types.SimpleNamespace(hidden_size=hidden_size, _attn_implementation="sdpa")
        super().__init__(spec, backend)
        self.scaling = 1.0
        self.start_temperature = temperature
        self.log_temperature = nn.Parameter(torch.empty(self.num_heads))
        self.init_weights()

    def init_weights(self) -> None:
        init.constant_(self.log_temperature, math.log(self.start_temperature))

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [..., heads, head_dim] of [..., hidden_size], without positions.

        query . key is the logit.
        """
        query, key, value = self._heads(hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        query, key = (F.normalize(x.to(wide), dim=-1) for x in (query, key))
        query = query * self.log_temperature.to(wide).exp()[:, None]
        return query.to(value.dtype), key.to(value.dtype), value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, state: AttentionState, context: CallContext
    ) -> tuple[Tensor, AttentionState]:
        """Attend in the window: the heads' outputs [B, T, H, head_dim] and the new state."""
        if self.rotary is not None:
            angles = context.rotary_angles(self.rotary, query.dtype)
            query, key = rotate_both(query, key, *angles)
        output, state = self.over_documents(query, key, value, state, context)
        return output.unflatten(-1, (self.num_heads, self.head_dim)), state


class StoreAttention(nn.Module):
    """V = g V_store + (1 - g) V_window, with g of each head; where nothing is found, g is 0."""

    def __init__(self, config: MemorizingAttentionConfig, num_heads: int):
        super().__init__()
        self.config = config
        self.head_bias = nn.Parameter(torch.empty(num_heads))
        self.init_weights()

    def init_weights(self) -> None:
        init.zeros_(self.head_bias)

    def forward(self, query: Tensor, window: Tensor, store: Store) -> Tensor:
        """Mix what was found with what the window gave.

        Args:
            query: [B, T, H, D].
            window: [B, T, H, D].
            store: keys and values [B, M, Hkv * D].
        """
        hits = self._search(query, store)
        found = hits >= 0  # [B, T, H, K], best first
        anything = found[..., 0]
        # Rows of the tables [B * M * Hkv, D]; a missing hit reads the best one, with weight 0.
        B, _, H, D = query.shape
        M, kv_heads = store.keys.shape[1], store.keys.shape[2] // D
        head = torch.arange(H, device=hits.device) // (H // kv_heads)
        row = torch.arange(B, device=hits.device)[:, None, None, None]
        index = torch.where(found, hits, hits[..., :1])
        index = ((row * M + index) * kv_heads + head[:, None])[anything]
        keys, values = (x.reshape(-1, D) for x in (store.keys, store.values[0]))
        logits = gathered_dot(index, query[anything].to(keys.dtype), keys)
        weights = logits.masked_fill(~found[anything], -torch.inf).softmax(-1)
        recalled = weighted_bag(index, weights, values).to(window.dtype)

        activation = torch.sigmoid if self.config.head_gate == "sigmoid" else torch.tanh
        gate = activation(self.head_bias).to(window.dtype)[:, None].expand(*window.shape[:3], 1)
        gate = gate[anything]
        return window.masked_scatter(
            anything.unsqueeze(-1), gate * recalled + (1 - gate) * window[anything]
        )

    @torch.no_grad()
    def _search(self, query: Tensor, store: Store) -> Tensor:
        """int64 [B, T, H, K] into M, -1 where fewer are visible."""
        B, T, H, D = query.shape
        keys = store.keys.unflatten(-1, (-1, D)).transpose(1, 2)  # [B, Hkv, M, D]
        kv_heads = keys.shape[1]
        groups = H // kv_heads
        # The query heads of one key head search as if they were so many tokens.
        query = query.unflatten(2, (kv_heads, groups)).permute(0, 2, 1, 3, 4).flatten(2, 3)
        limits = store.visible(self.config.capacity, self.config.segment)
        first, last = (x.repeat_interleave(groups, 1) for x in limits)
        # Row by row: the keys of all heads are then one view, and they begin in the same slot.
        hits = torch.stack(
            [
                search_ring(
                    query[row].contiguous(),
                    keys[row],
                    store.places[row].expand(kv_heads, -1),
                    store.start[row].expand(kv_heads),
                    self.config.top_k,
                    "dot",
                    first[row].expand(kv_heads, -1),
                    last[row].expand(kv_heads, -1),
                )[1]
                for row in range(B)
            ]
        )
        return hits.unflatten(2, (T, groups)).permute(0, 2, 1, 3, 4).flatten(2, 3)


@register("memorizing_attention", MemorizingAttentionConfig)
class MemorizingAttention(AttendingMemory):
    """Attention in a window whose heads also attend to stored keys and values of the document.

    Each key/value head keeps the keys and values of its own latest tokens. Each query head searches
    them with the query that it has for the window, and attends to the top_k nearest by a softmax of
    their own; a gate per head mixes the two outputs. A token at position p finds positions
    [b - capacity, b), b = (p // segment) * segment, so what it sees does not depend on how calls
    were cut; window and store overlap. Off, the window alone remains.

    Where the paper is silent or differs: positions in the window are rotary (relative biases
    there), the temperature is learned, and what a call stores keeps its gradient until the call's
    end, so that keys learn to be found by later segments of the row; the paper's rows are one
    segment long and its store takes no gradient.
    """

    def __init__(self, config: MemorizingAttentionConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        self.attention = CosineAttention(config.attention(), hidden_size, config.temperature)
        self.memory = StoreAttention(config, self.attention.num_heads)

    def init_weights(self) -> None:
        """Nothing beside the parts' own and linear layers."""

    def init_state(self, batch_size: int, device=None, dtype=None) -> SegmentStore:
        config = self.config
        width = self.attention.num_key_value_heads * self.attention.head_dim
        values = [ValueSpec((width,), dtype or torch.get_default_dtype())]
        return SegmentStore.empty_segments(
            batch_size, config.capacity, config.segment, width, device, dtype, values
        )

    def init_attention_state(self, batch_size: int, device=None, dtype=None) -> AttentionState:
        return self.attention.init_state(batch_size, device, dtype)

    def forward(
        self,
        hidden: Tensor,
        state: SegmentStore,
        context: CallContext,
        attention_state: AttentionState,
        use_memory: bool = True,
    ) -> tuple[Tensor, SegmentStore, AttentionState]:
        query, key, value = self.attention.heads(hidden)
        output, attention_state = self.attention.attend(query, key, value, attention_state, context)
        if use_memory and hidden.shape[1]:
            store, state = read_store(
                state, key.flatten(2), context, self.config.segment, (value.flatten(2),)
            )
            output = self.memory(query, output, store)
        return self.attention.output(output.flatten(2), hidden), state, attention_state

    def flops(self, tokens: int) -> int:
        """The window's attention, the search of a full store and the attention to what is found."""
        searched = min(tokens, self.config.capacity) + 2 * self.config.top_k
        width = self.attention.num_heads * self.attention.head_dim
        return self.attention.flops(tokens) + 2 * tokens * searched * width
