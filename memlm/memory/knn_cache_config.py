"""Sizes and choices of the kNN cache."""

import dataclasses
from typing import Literal, Self

import torch

from memlm.errors import UserError
from memlm.layers.attention_weights import AttentionWeights
from memlm.memory.base import MemoryConfig


@dataclasses.dataclass(kw_only=True)
class KnnCacheConfig(MemoryConfig):
    """Sizes and choices.

    Attributes:
        capacity: compressed states kept per row.
        eviction: which state makes room for a new one: "fifo", the oldest; "lru", the one that was
            not read for the longest time, counted in segments.
        segment: states become visible when their segment of so many tokens is complete; not more
            than the window of the attention beside it.
        key_size: channels of a compressed state; default hidden_size / 4.
        store_dtype: type of the stored states; default that of the model.
        reproject: keep the hidden states beside the compressed ones, and compress again what is
            found wherever gradients are taken: the compressor then learns from what earlier calls
            stored.
        top_k: states found per token.
        neighborhood: consecutive states read around each hit, for 2 the hit and the next one.
        context: each token reads what it found and what the context - 1 tokens before it found.
        metric: how states are compared, see `memlm.cuda.topk_search`. Neurocache uses l2; of
            layer-normalised states the three rank almost alike.
        num_heads: heads of the attention over what was found; default hidden_size / head_size.
        head_size: channels per head; default hidden_size / num_heads, 64 without num_heads. Both
            are those of the model's attention where the cache is attached to it; its projections
            are the start values then.
        temperature: start value of the factor on the similarity of a hit, learned per head.
        gate: as in every memory; here the branch has a gain from the start.
    """

    capacity: int = 16384
    eviction: Literal["fifo", "lru"] = "fifo"
    segment: int = 64
    key_size: int | None = None
    store_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    reproject: bool = False
    top_k: int = 16
    neighborhood: int = 2
    context: int = 1
    metric: Literal["cosine", "dot", "l2"] = "cosine"
    num_heads: int | None = None
    head_size: int | None = None
    temperature: float = 10.0
    gate: float | None = 1.0

    @property
    def delay(self) -> int:
        return self.segment

    @property
    def reads(self) -> int:
        """States that a token finds, neighbours included."""
        return self.top_k * self.neighborhood

    def sizes(self, hidden_size: int) -> tuple[int, int, int]:
        """Channels of a compressed state, heads of the cache attention, channels of a head."""
        key_size = self.key_size if self.key_size is not None else max(1, hidden_size // 4)
        heads = self.num_heads
        if heads is None:
            heads = max(1, hidden_size // (self.head_size or 64))
        head_size = self.head_size if self.head_size is not None else hidden_size // max(heads, 1)
        return key_size, heads, head_size

    def state_dtypes(self, dtype: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
        """Of the stored states, and of the hidden states beside them, in a model of `dtype`."""
        dtype = dtype or torch.get_default_dtype()
        return (getattr(torch, self.store_dtype) if self.store_dtype else dtype), dtype

    def check_sizes(self, hidden_size: int) -> None:
        key_size, heads, head_size = self.sizes(hidden_size)
        for name, value in (
            ("capacity", self.capacity),
            ("segment", self.segment),
            ("key_size", key_size),
            ("top_k", self.top_k),
            ("neighborhood", self.neighborhood),
            ("context", self.context),
            ("num_heads", heads),
            ("head_size", head_size),
        ):
            if value < 1:
                raise UserError(f"knn_cache: {name} is {value}, it must be at least 1")
        for name in ("segment", "top_k", "neighborhood"):
            if getattr(self, name) > self.capacity:
                raise UserError(
                    f"knn_cache: {name} {getattr(self, name)} is more than capacity "
                    f"{self.capacity}; use {name} <= capacity"
                )
        if self.head_size is None and hidden_size % heads:
            raise UserError(
                f"knn_cache: num_heads {heads} does not divide the hidden size {hidden_size}; "
                "choose a divisor or give head_size"
            )
        if self.temperature <= 0:
            raise UserError(f"knn_cache: temperature is {self.temperature}, it must be positive")

    def for_attention(self, weights: AttentionWeights) -> Self:
        if self.num_heads is not None or self.head_size is not None:
            return self
        return dataclasses.replace(self, num_heads=weights.num_heads, head_size=weights.head_dim)
