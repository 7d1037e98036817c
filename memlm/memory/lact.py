"""LaCT: a SwiGLU network per head that takes one step per large chunk of tokens.

Zhang et al., "Test-Time Training Done Right", arXiv 2505.23884. All of it is large batched
products, so it trains at high utilisation without a kernel of its own.

A token reads the weights its chunk began with. It sees nothing of its own chunk here, so the memory
stands beside sliding attention whose window is at least a chunk.

Where this differs from the authors' code: a short convolution on queries, keys and values, which
are the memory's own instead of those of the attention beside it; no rotary positions on them (the
code notes that it works without); documents packed in a row have weights of their own.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from memlm.cuda import LargeChunkMemoryState, large_chunk_memory
from memlm.errors import UserError
from memlm.layers.context import SequenceLayout
from memlm.layers.convolution import ShortConvolution
from memlm.memory.base import CallContext, MemoryConfig, MemoryModule, MemoryState, register


@dataclasses.dataclass(kw_only=True)
class LaCTConfig(MemoryConfig):
    """Sizes and start values.

    Attributes:
        num_heads: default one per 256 channels of the model.
        head_dim: channels of a head; default hidden_size / num_heads.
        expansion: hidden channels of the network per channel of a head.
        chunk_size: tokens per step of the weights; not more than the window of the attention
            beside it.
        conv_size: tokens the short convolution sees.
        momentum: whether steps carry on those of earlier chunks, S = mean(eta) S + gradient.
        orthogonalise: whether a step is orthogonalised (Muon). A step then changes the weights by
            most of their own norm, so that recall is learned sooner; but the gradient of training
            grows with every chunk on its way, which makes it a choice for rows of a few chunks.
        step_size: start value of the step size of a token; default 16 / chunk_size, since the
            steps of a chunk add up. The paper starts at 1e-3 with chunks of 2048, where the first
            steps change the weights by less than a thousandth unless they are orthogonalised.
        momentum_bias: start value of the bias of the momentum (before the sigmoid).
    """

    num_heads: int | None = None
    head_dim: int | None = None
    expansion: float = 1.0
    chunk_size: int = 2048
    conv_size: int = 4
    momentum: bool = True
    orthogonalise: bool = False
    step_size: float | None = None
    momentum_bias: float = 0.0

    @property
    def delay(self) -> int:
        return self.chunk_size

    def sizes(self, hidden_size: int) -> tuple[int, int, int]:
        """Heads, channels of a head, hidden channels of its network."""
        if self.num_heads is not None:
            heads = self.num_heads
        else:
            heads = max(1, hidden_size // (self.head_dim or 256))
        head_dim = self.head_dim or max(1, hidden_size // heads)
        return heads, head_dim, int(head_dim * self.expansion)

    @property
    def first_step_size(self) -> float:
        """The step size of a token before training."""
        return 16 / self.chunk_size if self.step_size is None else self.step_size

    def check_sizes(self, hidden_size: int) -> None:
        for name in ("num_heads", "head_dim", "chunk_size", "conv_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"lact: {name} is {value}, it must be at least 1")
        _, head_dim, hidden = self.sizes(hidden_size)
        if hidden < 1 or hidden != head_dim * self.expansion:
            raise UserError(
                f"lact: expansion {self.expansion} times head_dim {head_dim} is not a whole number "
                "of channels"
            )
        if self.first_step_size <= 0:
            raise UserError(f"lact: step_size is {self.step_size}, it must be positive")


@dataclasses.dataclass
class LaCTState(MemoryState):
    """Constant in size; exact at any cut of a document.

    Attributes:
        conv: [B, conv_size - 1, channels], the last inputs of the convolution.
        weights, momentum, pending: W1 and W3 side by side [B, H, D, 2 h] and W2 [B, H, h, D],
            float32 (LargeChunkMemoryState). Momentum has no heads where there is none.
        gate_sum: [B, H], as momentum.
        offset: int64 [B], tokens of the current chunk seen so far.
        fresh: bool [B], rows whose weights are the module's learned initial ones.
    """

    conv: Tensor
    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    pending: tuple[Tensor, ...]
    gate_sum: Tensor
    offset: Tensor
    fresh: Tensor

    def reset(self, rows: Tensor | None = None) -> "LaCTState":
        if rows is None:
            rows = torch.ones_like(self.fresh)
        cleared = self._map(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0))
        return dataclasses.replace(cleared, fresh=self.fresh | rows)


@register("lact", LaCTConfig)
class LaCT(MemoryModule):
    """x -> q, k, v -> convolution, SiLU -> unit q, k -> large-chunk memory -> norm -> output.

    With `context.write` False, tokens read the given weights as they are.
    """

    def __init__(self, config: LaCTConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        H, D, hidden = self.heads, self.head_dim, self.hidden = config.sizes(hidden_size)
        self.q_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.k_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.v_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.conv1d = ShortConvolution(3 * H * D, config.conv_size)
        # Step sizes of W1, W3 and W2, then the momentum, per head.
        gates = H * (4 if config.momentum else 3)
        self.gates_proj = nn.Linear(hidden_size, gates, bias=False)
        # Not the linear layer's own bias: transformers passes over the init_weights of a module
        # without parameters of its own.
        self.gates_bias = nn.Parameter(torch.empty(gates))
        self.initial_up = nn.Parameter(torch.empty(H, D, 2 * hidden))  # W1 and W3
        self.initial_down = nn.Parameter(torch.empty(H, hidden, D))  # W2
        self.o_norm = nn.RMSNorm(D, norm_eps)
        self.o_proj = nn.Linear(H * D, hidden_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        H = self.heads
        # The inverse of softplus, so that a step starts at its start value.
        step_bias = math.log(math.expm1(self.config.first_step_size))
        biases = torch.full_like(self.gates_bias, step_bias)
        biases[3 * H :] = self.config.momentum_bias
        init.copy_(self.gates_bias, biases)
        init.normal_(self.initial_up, std=self.head_dim**-0.5)
        init.normal_(self.initial_down, std=self.hidden**-0.5)

    def init_state(self, batch_size: int, device=None, dtype=None) -> LaCTState:
        wide = torch.promote_types(dtype or torch.float32, torch.float32)
        H, D, hidden = self.heads, self.head_dim, self.hidden

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=wide)

        def layers(heads: int) -> tuple[Tensor, Tensor]:
            return zeros(heads, D, 2 * hidden), zeros(heads, hidden, D)

        momentum_heads = H if self.config.momentum else 0
        return LaCTState(
            self.conv1d.init_tail(batch_size, device, dtype),
            layers(H),
            layers(momentum_heads),
            layers(H),
            zeros(momentum_heads),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            torch.ones(batch_size, dtype=torch.bool, device=device),
        )

    def forward(
        self, hidden: Tensor, state: LaCTState, context: CallContext
    ) -> tuple[Tensor, LaCTState]:
        layout = context.layout
        x = layout.pack(hidden)
        incoming = layout.incoming(state)
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)
        split = [(self.heads, self.head_dim, normalize) for normalize in (True, True, False)]
        (q, k, v), tail = self.conv1d(qkv, incoming.conv, layout, split)
        steps, eta = self._gates(x)
        memory = self._memory(incoming)
        if not context.write:
            steps, eta = torch.zeros_like(steps), None
            nothing = tuple(map(torch.zeros_like, memory.pending))
            memory = dataclasses.replace(memory, pending=nothing)
        o, memory = large_chunk_memory(
            q,
            k,
            v,
            steps,
            eta,
            memory,
            self.config.chunk_size,
            self.config.orthogonalise,
            layout.cu_seqlens,
        )
        output = layout.unpack(self.o_proj(self.o_norm(o).flatten(-2)))
        if not context.write:
            return output, state
        return output, self._outgoing(memory, tail, incoming, state, layout)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Steps [B, T, H, 3] and momentum [B, T, H] or None, at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        gates = self.gates_proj(x).to(wide) + self.gates_bias.to(wide)
        steps = F.softplus(gates[..., : 3 * self.heads]).unflatten(-1, (self.heads, 3))
        eta = gates[..., 3 * self.heads :].sigmoid() if self.config.momentum else None
        return steps, eta

    def _memory(self, state: LaCTState) -> LargeChunkMemoryState:
        """The state of the operation, with the learned weights in fresh rows."""
        fresh = state.fresh[:, None, None, None]
        pairs = zip((self.initial_up, self.initial_down), state.weights, strict=True)
        weights = tuple(torch.where(fresh, w0.to(w.dtype), w) for w0, w in pairs)
        return LargeChunkMemoryState(
            weights, state.momentum, state.pending, state.gate_sum, state.offset
        )

    def _outgoing(
        self,
        memory: LargeChunkMemoryState,
        tail: Tensor,
        incoming: LaCTState,
        state: LaCTState,
        layout: SequenceLayout,
    ) -> LaCTState:
        final = LaCTState(
            tail.to(state.conv.dtype),
            memory.weights,
            memory.momentum,
            memory.pending,
            memory.gate_sum,
            memory.offset,
            torch.zeros_like(incoming.fresh),
        )
        return layout.outgoing(final, state)

    def flops(self, tokens: int) -> int:
        """Projections; per token the network forward for the query, forward and backward for the
        key and the sums of gradients; per chunk the orthogonalisation of its step."""
        matrices = sum(
            p.numel() for name, p in self.named_parameters() if name.endswith("proj.weight")
        )
        matrices += self.conv1d.weight.numel()
        D, hidden = self.head_dim, self.hidden
        network = 18 * D * hidden
        small, large = sorted((D, hidden))
        step = 3 * 5 * (4 * small**2 * large + 2 * small**3) if self.config.orthogonalise else 0
        per_chunk = tokens // self.config.chunk_size * step
        return tokens * (2 * matrices + self.heads * network) + self.heads * per_chunk
