"""Gated DeltaNet: a matrix per head, rewritten by the gated delta rule.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule",
arXiv 2412.06464. Parameter names follow flash-linear-attention's layer, whose three short
convolutions are one here (over q, k and v side by side). With `decay: false, use_gate: false` it is
DeltaNet (Schlag et al., arXiv 2102.11174; Yang et al., arXiv 2406.06484).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from memlm.errors import UserError
from memlm.layers.convolution import ShortConvolution
from memlm.layers.gated_norm import GatedRMSNorm
from memlm.layers.row_convolution import convolve_rows
from memlm.memory.base import CallContext, MemoryConfig, MemoryModule, register
from memlm.memory.matrix_state import MatrixState, read_and_write, zero_matrices


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
        conv_size: tokens the short convolution sees; None = no convolution, q, k and v are SiLU of
            their projections.
        conv_bias: whether that convolution has a bias.
        use_gate: whether gate_activation(g_proj x) gates the normed output.
        gate_activation: "silu" (the paper's) or "sigmoid".
        norm_eps: epsilon of the norm of the output, o_norm; None = the model's.
        decay: whether the matrix fades; False has neither a_proj nor A_log nor dt_bias.
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
    conv_size: int | None = 4
    conv_bias: bool = False
    use_gate: bool = True
    gate_activation: Literal["silu", "sigmoid"] = "silu"
    norm_eps: float | None = None
    decay: bool = True
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
        return heads, self.num_v_heads or heads, head_dim, round(head_dim * self.expand_v)

    def check_sizes(self, hidden_size: int) -> None:
        for name in ("num_heads", "num_v_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"gated_delta: {name} is {value}, it must be at least 1")
        if not 0 < self.expand_v < math.inf:
            raise UserError(
                f"gated_delta: expand_v is {self.expand_v}, it must be positive and finite"
            )
        heads, value_heads, head_dim, value_dim = self.sizes(hidden_size)
        if value_heads % heads:
            raise UserError(
                f"gated_delta: num_v_heads {value_heads} is not a multiple of num_heads {heads}"
            )
        # A third of 24 channels is 8, whatever the last bit of the fraction.
        if not math.isclose(value_dim, head_dim * self.expand_v, rel_tol=1e-9):
            raise UserError(
                f"gated_delta: expand_v {self.expand_v} times head_dim {head_dim} is not a "
                "whole number of channels"
            )
        if self.conv_size is not None and self.conv_size < 1:
            raise UserError(
                f"gated_delta: conv_size is {self.conv_size}, it must be at least 1, or null for "
                "no convolution"
            )
        if self.conv_bias and self.conv_size is None:
            raise UserError("gated_delta: conv_bias needs a convolution, conv_size is null")
        if self.gate_activation != "silu" and not self.use_gate:
            raise UserError("gated_delta: gate_activation needs a gate, use_gate is false")
        if self.norm_eps is not None and not 0 <= self.norm_eps < math.inf:
            raise UserError(
                f"gated_delta: norm_eps is {self.norm_eps}, it must be at least 0 and finite, or "
                "null for the model's"
            )
        for low, high in (("dt_min", "dt_max"), ("A_min", "A_max")):
            if not 0 < getattr(self, low) <= getattr(self, high) < math.inf:
                raise UserError(
                    f"gated_delta: {low} {getattr(self, low)} and {high} {getattr(self, high)} "
                    f"must satisfy 0 < {low} <= {high} and be finite"
                )
        if self.beta_bias is not None and not math.isfinite(self.beta_bias):
            raise UserError(f"gated_delta: beta_bias is {self.beta_bias}, it must be finite")


@dataclasses.dataclass
class GatedDeltaState(MatrixState):
    """As MatrixState; conv: [B, conv_size - 1, channels], the last inputs of the convolution (no
    tokens without one)."""

    conv: Tensor


@register("gated_delta", GatedDeltaConfig)
class GatedDelta(MemoryModule):
    """x -> q, k, v -> convolution, SiLU -> unit q, k -> gated delta rule -> gated norm -> output.

    The decay of a token is exp(-exp(A_log) softplus(a_proj x + dt_bias)), its write strength
    sigmoid(b_proj x). A token reads after its own write. With `context.write` False, tokens read
    the given state as it is: it neither decays nor takes anything up between them.
    """

    shares_sequence = True

    def __init__(self, config: GatedDeltaConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        H, HV, K, V = self.sizes = config.sizes(hidden_size)
        self.q_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.k_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.v_proj = nn.Linear(hidden_size, HV * V, bias=False)
        channels = 2 * H * K + HV * V
        self.conv1d = (
            ShortConvolution(channels, config.conv_size, bias=config.conv_bias)
            if config.conv_size
            else None
        )
        self.a_proj = nn.Linear(hidden_size, HV, bias=False) if config.decay else None
        self.b_proj = nn.Linear(hidden_size, HV, bias=config.beta_bias is not None)
        self.A_log = nn.Parameter(torch.empty(HV)) if config.decay else None
        self.dt_bias = nn.Parameter(torch.empty(HV)) if config.decay else None
        self.g_proj = nn.Linear(hidden_size, HV * V, bias=False) if config.use_gate else None
        eps = norm_eps if config.norm_eps is None else config.norm_eps
        self.o_norm = GatedRMSNorm(V, eps, config.gate_activation)
        self.o_proj = nn.Linear(HV * V, hidden_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        config = self.config
        if config.decay:
            uniform = torch.rand(2, len(self.A_log))
            rate = torch.lerp(*_pair(config.A_min, config.A_max), uniform[0])
            init.copy_(self.A_log, rate.log())
            log_dt = torch.lerp(
                *_pair(math.log(config.dt_min), math.log(config.dt_max)), uniform[1]
            )
            # The inverse of softplus, so that softplus(dt_bias) = dt.
            init.copy_(self.dt_bias, log_dt.exp().expm1().log())
        if config.beta_bias is not None:
            init.constant_(self.b_proj.bias, config.beta_bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GatedDelta":
        """Casts to a narrower type leave A_log and dt_bias, this module's own parameters, float32:
        a rate of decay acts over thousands of tokens."""

        def wide(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype.itemsize >= 4 else tensor.to(found.device, torch.float32)

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(wide, recurse=False)

    def init_state(self, batch_size: int, device=None, dtype=None) -> GatedDeltaState:
        H, HV, K, V = self.sizes
        if self.conv1d is not None:
            tail = self.conv1d.init_tail(batch_size, device, dtype)
        else:
            tail = torch.zeros(batch_size, 0, 2 * H * K + HV * V, device=device, dtype=dtype)
        return GatedDeltaState(zero_matrices(batch_size, (HV, K, V), device, dtype), tail)

    def forward(
        self, hidden: Tensor, state: GatedDeltaState, context: CallContext
    ) -> tuple[Tensor, GatedDeltaState]:
        layout = context.layout
        x = layout.pack(hidden)
        q, k, v, tail = self._queries_keys_values(x, state.conv, context)
        if context.write:
            gates = self._gates(x)
        else:
            k, gates = torch.zeros_like(k), {"log_decay": None, "beta": None}
        normalize = self.conv1d is None  # the convolution normalizes what it hands out
        o, recurrent = read_and_write(
            q, k, v, carried=state.recurrent, context=context, qk_l2norm=normalize, **gates
        )
        o = self.o_norm(o, None if self.g_proj is None else self.g_proj(x))
        output = layout.unpack(self.o_proj(o.flatten(-2)))
        if not context.write:
            return output, state
        return output, GatedDeltaState(recurrent, tail.to(state.conv.dtype))

    def _queries_keys_values(
        self, x: Tensor, tail: Tensor, context: CallContext
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k [B, T, H, K] and v [B, T, HV, V] of packed tokens, and the new tails of the rows."""
        H, HV, K, V = self.sizes
        projected = [layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        if self.conv1d is None:
            shapes = ((H, K), (H, K), (HV, V))
            parts = zip(projected, shapes, strict=True)
            q, k, v = (F.silu(part).unflatten(-1, shape) for part, shape in parts)
        else:
            split = ((H, K, True), (H, K, True), (HV, V, False))
            inputs = torch.cat(projected, -1)
            (q, k, v), tail = convolve_rows(self.conv1d, inputs, tail, context, split)
        return q, k, v, tail

    def _gates(self, x: Tensor) -> dict[str, Any]:
        """What the operation makes decay and write strength from."""
        return {
            "log_decay": None if self.a_proj is None else self.a_proj(x),
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "beta": self.b_proj(x),
            "beta_sigmoid": True,
            "allow_neg_eigval": self.config.allow_neg_eigval,
        }

    def flops(self, tokens: int) -> int:
        """Projections, convolution and the recurrence token by token (7 per state entry)."""
        _, HV, K, V = self.sizes
        matrices = sum(p.numel() for p in self.parameters() if p.ndim > 1)
        return tokens * (2 * matrices + 7 * HV * K * V)


def _pair(low: float, high: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(low), torch.tensor(high)
