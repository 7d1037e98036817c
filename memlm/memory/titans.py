"""Titans' neural long-term memory: a small network per head that learns while it reads.

Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time", arXiv 2501.00663. Variant
lmm: the memory is a token mixer of its own.

Where the paper is silent or ambiguous:

- Gates are per token and head, the read is inclusive, the gradient is taken at the weights of the
  chunk's start; `chunk_size` belongs to the function and must not change after training.
- The inner learning rate is bounded, ``theta = theta_max * sigmoid(...)``, and the momentum is an
  average, ``S_t = eta S_{t-1} - (1 - eta) theta grad``: with the paper's form the step is larger by
  ``1 / (1 - eta)``, which together with gradients that are stale for a whole chunk diverges on
  repeated keys. ``average_momentum: false`` gives the paper's form.
- The initial weights are learned.
"""

import dataclasses

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm.cuda import NeuralMemoryState, neural_memory
from memlm.errors import UserError, nearest
from memlm.layers.context import SequenceLayout
from memlm.layers.convolution import ShortConvolution
from memlm.layers.gated_norm import GatedRMSNorm
from memlm.memory.base import CallContext, MemoryConfig, MemoryModule, MemoryState, register


@dataclasses.dataclass(kw_only=True)
class TitansConfig(MemoryConfig):
    """Sizes and start values.

    Attributes:
        variant: "lmm", the memory as the only mixer of its site.
        depth: layers of the memory: 1, x W; or 2, x + LN(gelu(x W1) W2).
        num_heads: default: as many as fill the hidden size.
        head_dim: channels of a head; default 64, or 32 in models narrower than 512.
        expansion: hidden channels per channel of a head, at depth 2.
        chunk_size: tokens that take their gradient at the same weights.
        conv_size: tokens the short convolution sees.
        theta_max: upper bound of the step size; default min(0.1, 1.6 / chunk_size), since the
            steps of a chunk add up on keys that repeat.
        average_momentum: S = eta S - (1 - eta) theta grad instead of S = eta S - theta grad.
        alpha_bias, eta_bias, theta_bias: start values of the biases of decay, momentum and step
            (before the sigmoid).
    """

    variant: str = "lmm"
    depth: int = 2
    num_heads: int | None = None
    head_dim: int | None = None
    expansion: int = 4
    chunk_size: int = 16
    conv_size: int = 4
    theta_max: float | None = None
    average_momentum: bool = True
    alpha_bias: float = -6.0
    eta_bias: float = 2.0
    theta_bias: float = 0.0

    def sizes(self, hidden_size: int) -> tuple[int, int]:
        """Heads and channels of a head."""
        head_dim = self.head_dim
        if head_dim is None:
            head_dim = 64 if hidden_size >= 512 else 32
            if self.num_heads is not None:
                head_dim = max(1, hidden_size // self.num_heads)
        return self.num_heads or max(1, hidden_size // head_dim), head_dim

    @property
    def step_bound(self) -> float:
        """The largest step size."""
        return min(0.1, 1.6 / self.chunk_size) if self.theta_max is None else self.theta_max

    def check_sizes(self, hidden_size: int) -> None:
        if self.variant != "lmm":
            raise UserError(
                f"titans: variant {self.variant!r} is not implemented, 'lmm' is"
                f"{nearest(self.variant, ['lmm'])}"
            )
        if self.depth not in (1, 2):
            raise UserError(f"titans: depth is {self.depth}, it must be 1 or 2")
        for name in ("num_heads", "head_dim", "expansion", "chunk_size", "conv_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"titans: {name} is {value}, it must be at least 1")
        if self.step_bound <= 0:
            raise UserError(f"titans: theta_max is {self.theta_max}, it must be positive")


@dataclasses.dataclass
class TitansState(MemoryState):
    """Constant in size; exact at any cut of a document.

    Attributes:
        conv: [B, conv_size - 1, channels], the last inputs of the convolution.
        anchor, weights, momentum: per layer [B, H, d_in, d_out], float32 (NeuralMemoryState).
        offset: int64 [B], tokens of the current chunk seen so far.
        fresh: bool [B], rows whose weights are the module's learned initial ones.
    """

    conv: Tensor
    anchor: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    offset: Tensor
    fresh: Tensor

    def reset(self, rows: Tensor | None = None) -> "TitansState":
        if rows is None:
            rows = torch.ones_like(self.fresh)
        cleared = self._map(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0))
        return dataclasses.replace(cleared, fresh=self.fresh | rows)


@register("titans", TitansConfig)
class Titans(MemoryModule):
    """x -> q, k, v -> convolution, SiLU -> unit q, k -> neural memory -> gated norm -> output.

    A token reads after its own write. With `context.write` False, tokens read the given weights
    as they are: nothing decays, no momentum is added, nothing is learned between them.
    """

    def __init__(self, config: TitansConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        H, D = self.heads, self.head_dim = config.sizes(hidden_size)
        self.q_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.k_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.v_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.conv1d = ShortConvolution(3 * H * D, config.conv_size)
        self.gates_proj = nn.Linear(hidden_size, 3 * H, bias=False)  # alpha, eta, theta per head
        # Not the linear layer's own bias: transformers passes over the init_weights of a module
        # without parameters of its own.
        self.gates_bias = nn.Parameter(torch.empty(3 * H))
        self.initial_weights = nn.ParameterList(
            torch.empty(H, *shape) for shape in self._layer_shapes()
        )
        self.g_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.o_norm = GatedRMSNorm(D, norm_eps)
        self.o_proj = nn.Linear(H * D, hidden_size, bias=False)
        self.init_weights()

    def _layer_shapes(self) -> list[tuple[int, int]]:
        D = self.head_dim
        hidden = D * self.config.expansion
        return [(D, D)] if self.config.depth == 1 else [(D, hidden), (hidden, D)]

    def init_weights(self) -> None:
        config = self.config
        biases = torch.tensor([config.alpha_bias, config.eta_bias, config.theta_bias])
        init.copy_(self.gates_bias, biases.repeat_interleave(self.heads))
        if config.depth == 1:
            init.zeros_(self.initial_weights[0])
        else:
            # Keys have unit length: only weights of unit scale bring gelu out of its linear part.
            init.normal_(self.initial_weights[0])
            init.normal_(self.initial_weights[1], std=(self.head_dim * config.expansion) ** -0.5)

    def init_state(self, batch_size: int, device=None, dtype=None) -> TitansState:
        wide = torch.promote_types(dtype or torch.float32, torch.float32)
        layers = [
            tuple(
                torch.zeros(batch_size, self.heads, *shape, device=device, dtype=wide)
                for shape in self._layer_shapes()
            )
            for _ in range(3)
        ]
        return TitansState(
            self.conv1d.init_tail(batch_size, device, dtype),
            *layers,
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            torch.ones(batch_size, dtype=torch.bool, device=device),
        )

    def forward(
        self, hidden: Tensor, state: TitansState, context: CallContext
    ) -> tuple[Tensor, TitansState]:
        layout = context.layout
        x = layout.pack(hidden)
        incoming = layout.incoming(state)
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)
        split = [(self.heads, self.head_dim, normalize) for normalize in (True, True, False)]
        (q, k, v), tail = self.conv1d(qkv, incoming.conv, layout, split)
        alpha, eta, theta = self._gates(x)
        if not context.write:
            alpha = eta = theta = torch.zeros_like(alpha)
        o, memory = neural_memory(
            q,
            k,
            v,
            alpha,
            eta,
            theta,
            self._memory(incoming),
            self.config.chunk_size,
            layout.cu_seqlens,
        )
        o = self.o_norm(o, self.g_proj(x))
        output = layout.unpack(self.o_proj(o.flatten(-2)))
        if not context.write:
            return output, state
        return output, self._outgoing(memory, tail, incoming, state, layout)

    def _gates(self, x: Tensor) -> list[Tensor]:
        """Decay alpha, momentum eta and step theta, [B, T, H], at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        gates = self.gates_proj(x).to(wide) + self.gates_bias.to(wide)
        alpha, eta, theta = gates.sigmoid().chunk(3, -1)
        theta = self.config.step_bound * theta
        if self.config.average_momentum:
            theta = (1 - eta) * theta
        return [alpha, eta, theta]

    def _memory(self, state: TitansState) -> NeuralMemoryState:
        """The state of the operation, with the learned weights in fresh rows."""
        fresh = state.fresh[:, None, None, None]

        def start(layers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            pairs = zip(self.initial_weights, layers, strict=True)
            return tuple(torch.where(fresh, w0.to(w.dtype), w) for w0, w in pairs)

        return NeuralMemoryState(
            start(state.anchor), start(state.weights), state.momentum, state.offset
        )

    def _outgoing(
        self,
        memory: NeuralMemoryState,
        tail: Tensor,
        incoming: TitansState,
        state: TitansState,
        layout: SequenceLayout,
    ) -> TitansState:
        final = TitansState(
            tail.to(state.conv.dtype),
            memory.anchor,
            memory.weights,
            memory.momentum,
            memory.offset,
            torch.zeros_like(incoming.fresh),
        )
        return layout.outgoing(final, state)

    def flops(self, tokens: int) -> int:
        """Projections and the memory: forward and backward of a key, the outer products of the
        updates, the reads with weights and momentum, and the sums within a chunk."""
        matrices = sum(
            p.numel() for name, p in self.named_parameters() if name.endswith("proj.weight")
        )
        matrices += self.conv1d.weight.numel()
        entries = sum(a * b for a, b in self._layer_shapes())
        widths = sum(a + b for a, b in self._layer_shapes())
        chunk = self.config.chunk_size * widths
        return tokens * (2 * matrices + self.heads * (11 * entries + chunk))
