"""Linear attention: a matrix per head that sums what was said, and forgets nothing.

Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs: Fast Autoregressive Transformers with
Linear Attention", arXiv 2006.16236.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.errors import UserError
from memlm.memory.base import CallContext, MemoryConfig, MemoryModule, register
from memlm.memory.matrix_state import MatrixState, read_and_write, zero_matrices

# Beside a sum of products of positive features; keeps the first read of an empty state finite.
NORMALIZER_EPS = 1e-6


@dataclasses.dataclass(kw_only=True)
class LinearAttentionConfig(MemoryConfig):
    """Sizes and features.

    Attributes:
        num_heads: default: one per 64 channels, at least 1.
        head_dim: channels of queries, keys and values; default hidden_size / num_heads.
        feature_map: of queries and keys: "elu", elu(x) + 1 (the paper); "relu" (Kasai et al.,
            arXiv 2103.13076); "identity" (as in Yang et al., arXiv 2312.06635), which needs
            `normalizer: false`.
        normalizer: divide what a query reads by the sum of its products with all keys, so that it
            is an average of values; False leaves the scale to the output norm (Qin et al.,
            arXiv 2210.10340).
        output_norm: RMSNorm over all heads together before the output projection; False is the
            paper's form. A norm of each head would cancel the normalizer.
    """

    num_heads: int | None = None
    head_dim: int | None = None
    feature_map: Literal["elu", "relu", "identity"] = "elu"
    normalizer: bool = True
    output_norm: bool = True

    def sizes(self, hidden_size: int) -> tuple[int, int]:
        """Heads, channels of each."""
        heads = max(1, hidden_size // 64) if self.num_heads is None else self.num_heads
        return heads, self.head_dim or hidden_size // heads

    def check_sizes(self, hidden_size: int) -> None:
        for name in ("num_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"linear_attention: {name} is {value}, it must be at least 1")
        heads, _ = self.sizes(hidden_size)
        if self.head_dim is None and hidden_size % heads:
            raise UserError(
                f"linear_attention: hidden_size {hidden_size} is not a multiple of num_heads "
                f"{heads}; choose a divisor or give head_dim"
            )
        if self.normalizer and self.feature_map == "identity":
            raise UserError(
                "linear_attention: feature_map 'identity' has products of both signs, whose sum "
                "cannot be divided by; set normalizer: false, or feature_map to elu or relu"
            )
        if not (self.normalizer or self.output_norm):
            raise UserError(
                "linear_attention: without normalizer and output_norm the output grows with the "
                "document; set one of them to true"
            )


@register("linear_attention", LinearAttentionConfig)
class LinearAttention(MemoryModule):
    """x -> q, k, v -> features of q, k -> sum of k v^T, read by q -> average -> norm -> output.

    The state has one more column than values have channels: the sum of the keys. A token reads
    after its own write. With `context.write` False, tokens read the given state as it is.
    """

    shares_sequence = True

    def __init__(self, config: LinearAttentionConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        H, D = self.sizes = config.sizes(hidden_size)
        self.q_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.k_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.v_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.o_norm = nn.RMSNorm(H * D, norm_eps) if config.output_norm else nn.Identity()
        self.o_proj = nn.Linear(H * D, hidden_size, bias=False)

    def init_weights(self) -> None:
        """Nothing but linear layers and a norm, which the model sets."""

    def init_state(self, batch_size: int, device=None, dtype=None) -> MatrixState:
        H, D = self.sizes
        sizes = (H, D, D + self.config.normalizer)
        return MatrixState(zero_matrices(batch_size, sizes, device, dtype))

    def forward(
        self, hidden: Tensor, state: MatrixState, context: CallContext
    ) -> tuple[Tensor, MatrixState]:
        layout = context.layout
        x = layout.pack(hidden)
        heads = [layer(x).unflatten(-1, self.sizes) for layer in (self.q_proj, self.k_proj)]
        q, k = (_features(part, self.config.feature_map) for part in heads)
        v = self.v_proj(x).unflatten(-1, self.sizes)
        if self.config.normalizer:
            v = F.pad(v, (0, 1), value=1.0)  # sums the keys themselves
        o, recurrent = read_and_write(
            q,
            k if context.write else torch.zeros_like(k),
            v,
            None,
            None,
            state.recurrent,
            context,
            scale=1.0,
        )
        if self.config.normalizer:
            o = o[..., :-1] / (o[..., -1:] + NORMALIZER_EPS)
        output = layout.unpack(self.o_proj(self.o_norm(o.flatten(-2))))
        return output, MatrixState(recurrent) if context.write else state

    def flops(self, tokens: int) -> int:
        """Projections and the recurrence token by token (4 per state entry)."""
        H, D = self.sizes
        matrices = sum(p.numel() for p in self.parameters() if p.ndim > 1)
        return tokens * (2 * matrices + 4 * H * D * (D + self.config.normalizer))


def _features(x: Tensor, name: str) -> Tensor:
    if name == "elu":
        # elu(x) + 1; adding one after elu would cost exp(x) its digits.
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    return F.relu(x) if name == "relu" else x
