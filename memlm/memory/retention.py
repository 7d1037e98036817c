"""Retention: a matrix per head that fades at a rate of its own.

Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models",
arXiv 2307.08621. The paper's score normalisations are left out: the norm of each head cancels
them.
"""

import dataclasses

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from memlm.errors import UserError
from memlm.layers.gated_norm import GatedRMSNorm
from memlm.layers.rotary import Rotary
from memlm.memory.base import CallContext, MemoryConfig, MemoryModule, register
from memlm.memory.matrix_state import MatrixState, read_and_write, zero_matrices


@dataclasses.dataclass(kw_only=True)
class RetentionConfig(MemoryConfig):
    """Sizes and decays.

    Attributes:
        num_heads: default: one per 256 channels, or per 32 in models narrower than 512; at least 1.
        head_dim: channels of a key, even; default hidden_size / num_heads.
        expand_v: channels of a value per channel of a key.
        rope_theta: base of the rotary frequencies.
        first_exponent, last_exponent: head h keeps 1 - 2^-e of its matrix per token, with e evenly
            spaced from the first to the last; last_exponent None = first_exponent + heads - 1, the
            paper's 1 - 2^(-5 - h).
    """

    num_heads: int | None = None
    head_dim: int | None = None
    expand_v: float = 2.0
    rope_theta: float = 10000.0
    first_exponent: float = 5.0
    last_exponent: float | None = None

    def sizes(self, hidden_size: int) -> tuple[int, int, int]:
        """Heads, channels of a key, channels of a value."""
        heads = self.num_heads
        if heads is None:
            heads = max(1, hidden_size // (256 if hidden_size >= 512 else 32))
        head_dim = self.head_dim or hidden_size // heads
        return heads, head_dim, int(head_dim * self.expand_v)

    def exponents(self, hidden_size: int) -> tuple[float, float]:
        """e of the first and of the last head."""
        last = self.last_exponent
        if last is None:
            last = self.first_exponent + self.sizes(hidden_size)[0] - 1
        return self.first_exponent, last

    def check_sizes(self, hidden_size: int) -> None:
        for name in ("num_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"retention: {name} is {value}, it must be at least 1")
        heads, head_dim, value_dim = self.sizes(hidden_size)
        if self.head_dim is None and hidden_size % heads:
            raise UserError(
                f"retention: hidden_size {hidden_size} is not a multiple of num_heads {heads}; "
                "choose a divisor or give head_dim"
            )
        if head_dim < 2 or head_dim % 2:
            raise UserError(f"retention: rotary positions need an even head_dim, got {head_dim}")
        if value_dim < 1 or value_dim != head_dim * self.expand_v:
            raise UserError(
                f"retention: expand_v {self.expand_v} times head_dim {head_dim} is not a whole "
                "number of channels"
            )
        if self.rope_theta <= 0:
            raise UserError(f"retention: rope_theta is {self.rope_theta}, it must be positive")
        first, last = self.exponents(hidden_size)
        if not 0 < first <= last:
            raise UserError(
                f"retention: first_exponent {first} and last_exponent {last} must satisfy "
                "0 < first_exponent <= last_exponent"
            )


@register("retention", RetentionConfig)
class Retention(MemoryModule):
    """x -> q, k, v -> rotary positions on q, k -> fading sum of k v^T -> gated norm -> output.

    A token reads after its own write. With `context.write` False, tokens read the given state as
    it is: it neither fades nor takes anything up between them.
    """

    shares_sequence = True

    def __init__(self, config: RetentionConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        H, K, V = self.sizes = config.sizes(hidden_size)
        self.q_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.k_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.v_proj = nn.Linear(hidden_size, H * V, bias=False)
        self.g_proj = nn.Linear(hidden_size, H * V, bias=False)
        self.o_norm = GatedRMSNorm(V, norm_eps)
        self.o_proj = nn.Linear(H * V, hidden_size, bias=False)

    def init_weights(self) -> None:
        """Nothing but linear layers and a norm, which the model sets."""

    def init_state(self, batch_size: int, device=None, dtype=None) -> MatrixState:
        return MatrixState(zero_matrices(batch_size, self.sizes, device, dtype))

    def log_decay(self, like: Tensor) -> Tensor:
        """log(1 - 2^-e) of every head, [heads], on the device of `like`, at least float32."""
        # Not a buffer, which loading on the meta device would leave uninitialised.
        first, last = self.config.exponents(self.hidden_size)
        wide = torch.promote_types(like.dtype, torch.float32)
        exponents = torch.linspace(first, last, self.sizes[0], device=like.device, dtype=wide)
        return torch.log1p(-torch.exp2(-exponents))

    def forward(
        self, hidden: Tensor, state: MatrixState, context: CallContext
    ) -> tuple[Tensor, MatrixState]:
        H, K, V = self.sizes
        layout = context.layout
        x = layout.pack(hidden)
        q = self.q_proj(x).unflatten(-1, (H, K))
        k = self.k_proj(x).unflatten(-1, (H, K))
        positions = layout.pack(context.position_ids)
        cos, sin = Rotary(K, self.config.rope_theta).angles(positions, q.dtype)
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        o, recurrent = read_and_write(
            q,
            k if context.write else torch.zeros_like(k),
            self.v_proj(x).unflatten(-1, (H, V)),
            self.log_decay(x) if context.write else None,
            None,
            state.recurrent,
            context,
        )
        o = self.o_norm(o, self.g_proj(x))
        output = layout.unpack(self.o_proj(o.flatten(-2)))
        return output, MatrixState(recurrent) if context.write else state

    def flops(self, tokens: int) -> int:
        """Projections and the recurrence token by token (5 per state entry)."""
        H, K, V = self.sizes
        matrices = sum(p.numel() for p in self.parameters() if p.ndim > 1)
        return tokens * (2 * matrices + 5 * H * K * V)
