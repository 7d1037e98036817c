"""Sizes and choices of the attention mixers."""

import dataclasses
import math

from memlm.errors import UserError, nearest
from memlm.layers.rope_scaling import check_rope_scaling


@dataclasses.dataclass(kw_only=True)
class AttentionConfig:
    """Sizes of the `attention` mixer.

    Attributes:
        num_heads: query heads; None = one per 64 channels (at least 1).
        num_key_value_heads: key/value heads; None = num_heads.
        head_dim: channels per head; None = hidden_size / num_heads.
        rope: rotary positions, or no position encoding.
        rope_theta: base of the rotary frequencies.
        rope_fraction: share of a head's channels that rotary positions turn: the first ones,
            rounded down to a whole number, which must be even.
        rope_scaling: how the frequencies are stretched: the `rope_parameters` of transformers
            without rope_theta, `{rope_type: linear, factor: 2.0}`, or the keys of llama3 (Llama
            3.1) or yarn (Peng et al., arXiv 2309.00071); None = not.
        qkv_bias: biases in the projections to queries, keys, values and gates.
        output_bias: a bias in the projection of the output.
        qk_norm: RMSNorm on the queries and keys: true, of each head; "all_heads", over the
            channels of all heads side by side (OLMo 2, arXiv 2501.00656).
        output_gate: times sigmoid(g_proj x), channel by channel, before the projection of the
            output (Qiu et al., "Gated Attention for Large Language Models", arXiv 2505.06708).
        conv_size: kernel of a causal depthwise convolution added to the input; None = none.
        window: how many tokens a query sees, itself included; None = all.
    """

    num_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope: bool = True
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0
    rope_scaling: dict | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool | str = False
    output_gate: bool = False
    conv_size: int | None = None
    window: int | None = None

    @property
    def attention_window(self) -> int | None:
        """Tokens that a query sees, under the name it has in all mixers."""
        return self.window

    def heads(self, hidden_size: int) -> tuple[int, int, int]:
        """Query heads, key/value heads and channels per head in a model of that width."""
        num_heads = self.num_heads or max(1, hidden_size // 64)
        return (
            num_heads,
            self.num_key_value_heads or num_heads,
            (self.head_dim or hidden_size // num_heads),
        )

    def rotary_channels(self, head_dim: int) -> int:
        """Channels of a head that rotary positions turn."""
        return int(head_dim * self.rope_fraction)

    def check_sizes(self, hidden_size: int) -> None:
        """Raise UserError for sizes that cannot work in a model of width `hidden_size`."""
        for name in ("num_heads", "num_key_value_heads", "head_dim", "window", "conv_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        num_heads, num_key_value_heads, head_dim = self.heads(hidden_size)
        if self.head_dim is None and hidden_size % num_heads:
            raise UserError(
                f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}; "
                "choose a divisor or give head_dim"
            )
        if num_heads % num_key_value_heads:
            raise UserError(
                f"num_heads {num_heads} is not a multiple of num_key_value_heads "
                f"{num_key_value_heads}"
            )
        if self.qk_norm not in (False, True, "all_heads"):
            raise UserError(
                f"qk_norm is {self.qk_norm!r}, it must be true, false or 'all_heads'"
                f"{nearest(self.qk_norm, ['all_heads'])}"
            )
        if self.rope:
            self._check_rotary(head_dim)
        elif self.rope_fraction != 1 or self.rope_scaling is not None:
            name = "rope_fraction" if self.rope_scaling is None else "rope_scaling"
            raise UserError(f"{name} is given, but rope is false: nothing is turned; leave it out")

    def _check_rotary(self, head_dim: int) -> None:
        if not 0 < self.rope_fraction <= 1:
            raise UserError(f"rope_fraction must be in (0, 1], got {self.rope_fraction}")
        turned = self.rotary_channels(head_dim)
        if turned == head_dim and head_dim % 2:
            raise UserError(f"rotary positions need an even head_dim, got {head_dim}")
        if turned < 2 or turned % 2:
            raise UserError(
                f"rope_fraction {self.rope_fraction} of head_dim {head_dim} is {turned} channels; "
                "rotary positions need an even number of them"
            )
        if not 0 < self.rope_theta < math.inf:
            raise UserError(f"rope_theta must be positive and finite, got {self.rope_theta}")
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling, self.rope_theta)


@dataclasses.dataclass(kw_only=True)
class SlidingAttentionConfig(AttentionConfig):
    """Sizes of the `sliding_attention` mixer: as `attention`, with a window."""

    window: int | None = 512
