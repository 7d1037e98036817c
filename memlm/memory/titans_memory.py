"""The neural memory that all Titans variants contain: projections, gates, learned initial weights.

Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time", arXiv 2501.00663.
"""

import dataclasses
import itertools
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from memlm.cuda import NeuralMemoryState, neural_memory, short_convolution
from memlm.cuda.neural_memory.network import forward as read_with
from memlm.layers.context import SequenceLayout
from memlm.layers.convolution import ShortConvolution
from memlm.memory.base import MemoryState
from memlm.memory.records import Surprise, UpdateCounts
from memlm.memory.titans_config import READS, TitansConfig

Layers = tuple[Tensor, ...]


@dataclasses.dataclass
class TitansState(MemoryState):
    """Constant in size; exact at any cut of a document.

    Attributes:
        conv: [B, conv_size - 1, channels], the last inputs of the convolution (no tokens without).
        anchor, weights, momentum: per layer [B, H, d_in, d_out], float32 (NeuralMemoryState); the
            exact linear memory has one anchor, [B, 0].
        offset: int64 [B], tokens of the current chunk seen so far.
        fresh: bool [B], rows whose weights are the module's learned initial ones.
    """

    conv: Tensor
    anchor: Layers
    weights: Layers
    momentum: Layers
    offset: Tensor
    fresh: Tensor

    def reset(self, rows: Tensor | None = None) -> "TitansState":
        if rows is None:
            rows = torch.ones_like(self.fresh)
        cleared = self._map(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0))
        return dataclasses.replace(cleared, fresh=self.fresh | rows)


class TitansMemory(nn.Module):
    """x -> q, k, v -> convolution, SiLU -> unit q, k -> the neural memory, per head.

    The gates are per token and head. The initial weights are learned; they also stand for what the
    memory would make of persistent tokens before every document, as the paper has it: both are a
    start that is learned and the same for all documents.
    """

    # Set by record_surprise and count_updates.
    surprise: Surprise | None = None
    updates: UpdateCounts | None = None

    def __init__(self, config: TitansConfig, hidden_size: int):
        super().__init__()
        self.config = config
        H, D = self.heads, self.head_dim = config.sizes(hidden_size)
        self.q_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.k_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.v_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.conv1d = ShortConvolution(3 * H * D, config.conv_size) if config.conv_size else None
        present = {"alpha": config.decay, "eta": config.momentum, "theta": True}
        self.gates = [name for name, used in present.items() if used]
        self.gates_proj = nn.Linear(hidden_size, len(self.gates) * H, bias=False)
        # Not the linear layer's own bias: transformers passes over the init_weights of a module
        # without parameters of its own.
        self.gates_bias = nn.Parameter(torch.empty(len(self.gates) * H))
        self.initial_weights = nn.ParameterList(
            torch.empty(H, *shape) for shape in self.layer_shapes()
        )
        # Saved with the weights, so that loading them under others is noticed.
        self.register_buffer("conventions", self._conventions())
        self.register_load_state_dict_post_hook(_after_loading)
        self.init_weights()

    def _conventions(self) -> Tensor:
        return torch.tensor(list(self.config.conventions().values()))

    def warn_of_conventions(self) -> None:
        """Warn where the loaded weights were trained with other conventions than the config's."""
        ours = self.config.conventions()
        loaded = dict(zip(ours, self.conventions.tolist(), strict=True))
        differing = [
            f"{name} {_label(name, loaded[name])} (now {_label(name, ours[name])})"
            for name in ours
            if ours[name] != loaded[name]
            # Exact gradients have no chunk size to tell.
            and not (name == "chunk_size" and ours["exact"] != loaded["exact"])
        ]
        if differing:
            warnings.warn(
                f"titans: these weights were trained with {', '.join(differing)}. That is part of "
                "the function, not of its speed: outputs will be wrong unless you train on.",
                stacklevel=3,
            )

    def layer_shapes(self) -> list[tuple[int, int]]:
        """Inputs and outputs of every layer of the memory."""
        widths = [self.head_dim * self.config.expansion] * (self.config.depth - 1)
        widths = [self.head_dim, *widths, self.head_dim]
        return list(itertools.pairwise(widths))

    def init_weights(self) -> None:
        config = self.config
        start = {"alpha": config.decay_bias, "eta": config.eta_bias, "theta": config.theta_bias}
        biases = [start[name] for name in self.gates]
        init.copy_(self.conventions, self._conventions())
        init.copy_(self.gates_bias, torch.tensor(biases).repeat_interleave(self.heads))
        if self.config.depth == 1:
            init.zeros_(self.initial_weights[0])
            return
        # Keys have unit length: only weights of unit scale bring gelu out of its linear part.
        init.normal_(self.initial_weights[0])
        for weights in self.initial_weights[1:]:
            init.normal_(weights, std=weights.shape[1] ** -0.5)

    def init_state(self, batch_size: int, device=None, dtype=None) -> TitansState:
        """The state before the first token; reads no parameter."""
        wide = torch.promote_types(dtype or torch.float32, torch.float32)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=wide)

        anchor, weights, momentum = (
            tuple(zeros(self.heads, *shape) for shape in self.layer_shapes()) for _ in range(3)
        )
        channels = 3 * self.heads * self.head_dim
        reach = self.config.conv_size - 1 if self.config.conv_size else 0
        return TitansState(
            torch.zeros(batch_size, reach, channels, device=device, dtype=dtype),
            (zeros(0),) if self.config.exact else anchor,
            weights,
            momentum,
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            torch.ones(batch_size, dtype=torch.bool, device=device),
        )

    def forward(
        self, x: Tensor, state: TitansState, cu_seqlens: Tensor | None, write: bool = True
    ) -> tuple[Tensor, TitansState]:
        """Learn from packed pieces and read.

        Args:
            x: [B, T, hidden_size], or packed [1, total, hidden_size].
            state: of the N pieces.
            cu_seqlens: int [N + 1], where each piece starts; None = one per row.
            write: False = tokens read the given weights (with read: chunk_start those at the start
                of the chunk) as they are.

        Returns:
            [B, T, H, D] and the state after each piece; without writing the given one, but for the
            inputs of the convolution.
        """
        (q, k, v), tail = self._convolve(x, state.conv, cu_seqlens)
        config, memory = self.config, self._memory(state)
        alpha, eta, theta = self._gates(x)
        read, refresh = config.read, config.refresh
        if not write:
            alpha = eta = theta = torch.zeros_like(theta)
            if read == "chunk_start":  # a chunk's end would not leave the weights as they are
                memory = dataclasses.replace(memory, weights=memory.anchor)
                read, refresh = "inclusive", "never"
        # A bound on gradients measures them anyway.
        measure = self.surprise is not None or (self.updates and config.clip is not None)
        o, memory, *statistics = neural_memory(
            q,
            k,
            v,
            alpha,
            eta,
            theta,
            memory,
            config.chunk_size,
            read,
            refresh,
            config.exact,
            config.clip,
            cu_seqlens,
            bool(measure),
        )
        if self.surprise is not None:
            self.surprise.take(statistics[0].surprise)
        if self.updates is not None:
            clipped = statistics[0].gradient_norm > config.clip if config.clip else None
            self.updates.take(x, o, memory.weights, clipped)
        tail = tail.to(state.conv.dtype)
        if not write:
            return o, dataclasses.replace(state, conv=tail)
        return o, TitansState(
            tail,
            memory.anchor or state.anchor,
            memory.weights,
            memory.momentum,
            memory.offset,
            torch.zeros_like(state.fresh),
        )

    def finish(self, layout: SequenceLayout, order: Tensor | None = None) -> None:
        """The call of the model is over: what was recorded of its packed tokens goes into rows.

        `order` is where each token stands among those recorded; None = at its own place.
        """
        if self.surprise is None:
            return
        shape = layout.valid.shape if layout.uniform else (1, layout.num_tokens)
        self.surprise.finish(
            lambda x: layout.unpack((x if order is None else x[order]).unflatten(0, shape))
        )

    def read(self, weights: Layers, q: Tensor) -> Tensor:
        """The memory with fixed weights: per layer [N, H, d_in, d_out], q [N, T, H, D]."""
        with torch.autocast(q.device.type, enabled=False):
            y = read_with(q.to(weights[0].dtype).transpose(1, 2), weights)
            return y.transpose(1, 2).to(q.dtype)

    def _convolve(
        self, x: Tensor, tail: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k, v [B, T, H, D], q and k of unit length, and the new tails."""
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)
        if self.conv1d is not None:
            split = [(self.heads, self.head_dim, normalize) for normalize in (True, True, False)]
            return short_convolution(qkv, self.conv1d.weight, tail, cu_seqlens, "silu", split=split)
        q, k, v = F.silu(qkv).unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        return (unit_length(q), unit_length(k), v), tail

    def _gates(self, x: Tensor) -> list[Tensor]:
        """Decay alpha, momentum eta and step theta, [B, T, H], at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        values = (self.gates_proj(x).to(wide) + self.gates_bias.to(wide)).sigmoid()
        gates = dict(zip(self.gates, values.chunk(len(self.gates), -1), strict=True))
        theta = self.config.step_bound * gates["theta"]
        alpha, eta = (
            gates[name] if name in gates else torch.zeros_like(theta) for name in ("alpha", "eta")
        )
        if self.config.average_momentum:
            theta = (1 - eta) * theta
        return [alpha, eta, theta]

    def start(self, layers: Layers, fresh: Tensor) -> Layers:
        """The layers [B, H, ...] with the learned initial weights in fresh rows."""
        fresh = fresh[:, None, None, None]
        pairs = zip(self.initial_weights, layers, strict=True)
        return tuple(torch.where(fresh, w0.to(w.dtype), w) for w0, w in pairs)

    def _memory(self, state: TitansState) -> NeuralMemoryState:
        """The state of the operation."""
        anchor = () if self.config.exact else state.anchor
        weights = state.weights
        if not self._begun(state.fresh):
            anchor, weights = (self.start(x, state.fresh) if x else x for x in (anchor, weights))
        return NeuralMemoryState(anchor, weights, state.momentum, state.offset)

    def _begun(self, fresh: Tensor) -> bool:
        """Whether no row is fresh, where a CPU in decoding may ask: copies take it long."""
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        return fresh.device.type == "cpu" and not recorded and not bool(fresh.any())

    def flops(self, tokens: int) -> int:
        """Projections and the memory: forward and backward of a key, the outer products of the
        updates, the reads with weights and momentum, and the sums within a chunk."""
        matrices = sum(
            p.numel() for name, p in self.named_parameters() if name.endswith("proj.weight")
        )
        matrices += self.conv1d.weight.numel() if self.conv1d is not None else 0
        entries = sum(a * b for a, b in self.layer_shapes())
        chunk = self.config.chunk_size * sum(a + b for a, b in self.layer_shapes())
        return tokens * (2 * matrices + self.heads * (11 * entries + chunk))


def _after_loading(module: TitansMemory, _keys: object) -> None:
    module.warn_of_conventions()


def _label(name: str, value: int) -> str:
    if name == "read":
        return READS[value]
    return {-1: "chunk", 0: "never"}.get(value, str(value)) if name == "refresh" else str(value)


def unit_length(x: Tensor) -> Tensor:
    """x divided by its length over the last dimension, as `short_convolution` does it."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
