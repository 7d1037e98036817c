"""Attention with persistent tokens: learned vectors that every token sees, whatever its window.

Behrouz et al., "Titans: Learning to Memorize at Test Time", arXiv 2501.00663, section 3.3. They
stand before the sequence in the paper. Here their keys have no position, so that a token at 50,000
scores them as one at 50: they meet queries that are not rotated.
"""

import types

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from memlm.layers.attention import Attention
from memlm.layers.attention_config import AttentionConfig
from memlm.layers.rotary import rotate


class PersistentAttention(Attention):
    """`Attention` through torch's scaled_dot_product_attention, with learned tokens before it.

    Args:
        spec: sizes of the attention.
        hidden_size: width of the stream.
        persistent_tokens: number of learned tokens, 0 for none.
        norm_eps: epsilon of the norms of queries and keys.
    """

    steps_natively = False

    def __init__(
        self,
        spec: AttentionConfig,
        hidden_size: int,
        persistent_tokens: int,
        norm_eps: float = 1e-6,
    ):
        # Flash attention knows no keys outside its window: a mask is needed, and sdpa takes one.
        backend = types.SimpleNamespace(hidden_size=hidden_size, _attn_implementation="sdpa")
        super().__init__(spec, backend, norm_eps)
        self.persistent = (
            nn.Parameter(torch.empty(persistent_tokens, hidden_size)) if persistent_tokens else None
        )
        self.init_weights()

    def init_weights(self) -> None:
        if self.persistent is not None:
            init.normal_(self.persistent)  # the scale of a normed token

    def _project(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.persistent is None or angles is None:
            return super()._project(hidden, angles)
        query, key, value = self._heads(hidden)
        # Twice the channels: the first half meets tokens, the second persistent ones.
        return torch.cat([rotate(query, *angles), query], -1), rotate(key, *angles), value

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if self.persistent is None:
            return super()._attend(query, keys, values, mask)
        if mask is None:
            columns = torch.arange(keys.shape[1], device=query.device)
            mask = (columns[-query.shape[1] :, None] >= columns)[None, None]
        first_keys, first_values = self._persistent_pairs(len(query), query.dtype)
        if self.rotary is not None:
            keys = F.pad(keys, (0, self.head_dim))
            first_keys = F.pad(first_keys, (self.head_dim, 0))
        keys = torch.cat([first_keys, keys], 1)
        values = torch.cat([first_values, values], 1)
        mask = F.pad(mask, (self.persistent.shape[0], 0), value=True)
        return super()._attend(query, keys, values, mask)

    def _persistent_pairs(self, batch_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, tokens, num_key_value_heads, head_dim]."""
        _, key, value = self._heads(self.persistent)
        return tuple(x.to(dtype).expand(batch_size, -1, -1, -1) for x in (key, value))

    def flops(self, tokens: int) -> int:
        if self.persistent is None:
            return super().flops(tokens)
        seen = 4 * tokens * self.persistent.shape[0] * self.num_heads * self.head_dim
        return super().flops(tokens) + seen
