"""Gated DeltaNet: a matrix per head, rewritten by the gated delta rule.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule",
arXiv 2412.06464. Parameter names follow flash-linear-attention's layer, whose three short
convolutions are one here (over q, k and v side by side).
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from memlm.cuda import linear_recurrence
from memlm.errors import UserError
from memlm.layers.convolution import ShortConvolution
from memlm.layers.norm import l2_norm
from memlm.memory.base import CallContext, MemoryConfig, MemoryModule, MemoryState, register


@dataclasses.dataclass(kw_only=True)
class GatedDeltaConfig(MemoryConfig):
    """Sizes and start values.

    Attributes:
        num_heads: query and key heads; default: as many as give keys 0.75 of the hidden size in
            total, the paper's share.
        num_v_heads: value heads, a multiple of num_heads; default num_heads.
        head_dim: channels of a key; default 128, or 32 in models narrower than 512; with
            num_heads given, whatever gives keys 0.75 of the hidden size in total.
        expand_v: channels of a value per channel of a key.
        conv_size: tokens the short convolution sees.
        use_gate: whether silu(g_proj x) gates the normed output.
        allow_neg_eigval: write strengths up to 2 instead of 1, so that a key's old value can be
            negated.
        dt_min, dt_max: range of the start values of softplus(dt_bias), log-uniform.
        A_min, A_max: range of the start values of the decay rate A, uniform. The paper's range
            starts at 0, where log A is not finite.
        beta_bias: start value of a bias in the write strength beta = sigmoid(b_proj x); None, as
            in the paper, has no bias.
    """

    num_heads: int | None = None
    num_v_heads: int | None = None
    head_dim: int | None = None
    expand_v: float = 2.0
    conv_size: int = 4
    use_gate: bool = True
    allow_neg_eigval: bool = False
    dt_min: float = 1e-3
    dt_max: float = 0.1
    A_min: float = 0.01
    A_max: float = 16.0
    beta_bias: float | None = None

    def sizes(self, hidden_size: int) -> tuple[int, int, int, int]:
        """Heads, value heads, channels of a key, channels of a value."""
        head_dim, heads = self.head_dim, self.num_heads
        if head_dim is None:
            head_dim = 128 if hidden_size >= 512 else 32
            if heads is not None:
                head_dim = max(8, 3 * hidden_size // (4 * heads) // 8 * 8)
        if heads is None:
            heads = max(1, 3 * hidden_size // (4 * head_dim))
        return heads, self.num_v_heads or heads, head_dim, int(head_dim * self.expand_v)

    def check_sizes(self, hidden_size: int) -> None:
        for name in ("num_heads", "num_v_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"gated_delta: {name} is {value}, it must be at least 1")
        heads, value_heads, head_dim, value_dim = self.sizes(hidden_size)
        if value_heads % heads:
            raise UserError(
                f"gated_delta: num_v_heads {value_heads} is not a multiple of num_heads {heads}"
            )
        if value_dim < 1 or value_dim != head_dim * self.expand_v:
            raise UserError(
                f"gated_delta: expand_v {self.expand_v} times head_dim {head_dim} is not a "
                "whole number of channels"
            )
        if self.conv_size < 1:
            raise UserError(f"gated_delta: conv_size is {self.conv_size}, it must be at least 1")
        for low, high in (("dt_min", "dt_max"), ("A_min", "A_max")):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise UserError(
                    f"gated_delta: {low} {getattr(self, low)} and {high} {getattr(self, high)} "
                    f"must satisfy 0 < {low} <= {high}"
                )


@dataclasses.dataclass
class GatedDeltaState(MemoryState):
    """conv: [B, conv_size - 1, channels], the last inputs of the convolution;
    recurrent: [B, value heads, K, V], float32."""

    conv: Tensor
    recurrent: Tensor

    def reset(self, rows: Tensor | None = None) -> "GatedDeltaState":
        if rows is None:
            return self._map(torch.zeros_like)
        return self._map(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0))


@register("gated_delta", GatedDeltaConfig)
class GatedDelta(MemoryModule):
    """x -> q, k, v -> convolution, SiLU -> unit q, k -> gated delta rule -> gated norm -> output.

    The decay of a token is exp(-A softplus(a_proj x + dt_bias)), its write strength
    sigmoid(b_proj x). A token reads after its own write. With `context.write` False, tokens read
    the given state as it is: it neither decays nor takes anything up between them.
    """

    def __init__(self, config: GatedDeltaConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        H, HV, K, V = self.sizes = config.sizes(hidden_size)
        self.q_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.k_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.v_proj = nn.Linear(hidden_size, HV * V, bias=False)
        self.conv1d = ShortConvolution(2 * H * K + HV * V, config.conv_size)
        self.a_proj = nn.Linear(hidden_size, HV, bias=False)
        self.b_proj = nn.Linear(hidden_size, HV, bias=config.beta_bias is not None)
        self.A_log = nn.Parameter(torch.empty(HV))
        self.dt_bias = nn.Parameter(torch.empty(HV))
        self.g_proj = nn.Linear(hidden_size, HV * V, bias=False) if config.use_gate else None
        self.o_norm = nn.RMSNorm(V, norm_eps)
        self.o_proj = nn.Linear(HV * V, hidden_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        config = self.config
        uniform = torch.rand(2, len(self.A_log))
        init.copy_(self.A_log, torch.lerp(*_pair(config.A_min, config.A_max), uniform[0]).log())
        log_dt = torch.lerp(*_pair(math.log(config.dt_min), math.log(config.dt_max)), uniform[1])
        # The inverse of softplus, so that softplus(dt_bias) = dt.
        init.copy_(self.dt_bias, log_dt.exp().expm1().log())
        if config.beta_bias is not None:
            init.constant_(self.b_proj.bias, config.beta_bias)

    def init_state(self, batch_size: int, device=None, dtype=None) -> GatedDeltaState:
        _, HV, K, V = self.sizes
        wide = torch.promote_types(dtype or torch.float32, torch.float32)
        recurrent = torch.zeros(batch_size, HV, K, V, device=device, dtype=wide)
        return GatedDeltaState(self.conv1d.init_tail(batch_size, device, dtype), recurrent)

    def forward(
        self, hidden: Tensor, state: GatedDeltaState, context: CallContext
    ) -> tuple[Tensor, GatedDeltaState]:
        H, HV, K, V = self.sizes
        layout = context.layout
        x = layout.pack(hidden)
        incoming = layout.incoming(state)
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)
        qkv, tail = self.conv1d(qkv, incoming.conv, layout)
        q, k, v = qkv.split((H * K, H * K, HV * V), -1)
        q, k = (l2_norm(part.unflatten(-1, (H, K))) for part in (q, k))
        log_decay, beta = self._gates(x)
        if not context.write:
            k, log_decay, beta = torch.zeros_like(k), None, None
        o, recurrent = linear_recurrence(
            q,
            k,
            v.unflatten(-1, (HV, V)),
            log_decay,
            beta,
            initial_state=incoming.recurrent,
            cu_seqlens=layout.cu_seqlens,
            return_state=True,
        )
        o = self.o_norm(o)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(x)).view_as(o)
        output = layout.unpack(self.o_proj(o.flatten(-2)))
        if not context.write:
            return output, state
        final = GatedDeltaState(tail.to(state.conv.dtype), recurrent)
        return output, layout.outgoing(final, state)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay and write strength [B, T, HV], at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(self.a_proj(x).to(wide) + self.dt_bias.to(wide))
        beta = self.b_proj(x).to(wide).sigmoid()
        if self.config.allow_neg_eigval:
            beta = 2 * beta
        return -self.A_log.to(wide).exp() * dt, beta

    def flops(self, tokens: int) -> int:
        """Projections, convolution and the recurrence token by token (7 per state entry)."""
        _, HV, K, V = self.sizes
        matrices = sum(p.numel() for p in self.parameters() if p.ndim > 1)
        return tokens * (2 * matrices + 7 * HV * K * V)


def _pair(low: float, high: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(low), torch.tensor(high)
