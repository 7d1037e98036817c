"""minGRU: channels that each fade and take up at a rate the token chooses.

Feng et al., "Were RNNs All We Needed?", arXiv 2410.01201, section 3.1. The gate and the candidate
see the token alone, not the state before it, so that all tokens are computed at once. The paper's
scan over logarithms is replaced by `memlm.cuda.diagonal_scan`, which keeps its digits over long
sequences.
"""

import dataclasses
from abc import abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm.cuda import diagonal_scan
from memlm.cuda.recurrence_maps import diagonal_scan_map
from memlm.errors import UserError
from memlm.layers.affine_states import continue_rows
from memlm.layers.convolution import ShortConvolution
from memlm.layers.row_convolution import convolve_rows
from memlm.memory.base import CallContext, MemoryConfig, MemoryModule, MemoryState, register


@dataclasses.dataclass(kw_only=True)
class DiagonalConfig(MemoryConfig):
    """Sizes of a memory of single channels.

    Attributes:
        expansion: channels of the state per channel of the model.
        conv_size: tokens the short convolution before the layer sees, as in the paper's language
            models; None = no convolution.
    """

    memory: ClassVar[str]  # its name, for messages
    expansion: float = 2.0
    conv_size: int | None = 4

    def width(self, hidden_size: int) -> int:
        """Channels of the state."""
        return int(hidden_size * self.expansion)

    def check_sizes(self, hidden_size: int) -> None:
        width = self.width(hidden_size)
        if width < 1 or width != hidden_size * self.expansion:
            raise UserError(
                f"{self.memory}: expansion {self.expansion} times hidden_size {hidden_size} must "
                "be a whole number of channels, at least 1"
            )
        if self.conv_size is not None and self.conv_size < 1:
            raise UserError(
                f"{self.memory}: conv_size is {self.conv_size}, it must be at least 1, or null for "
                "no convolution"
            )


@dataclasses.dataclass
class ScanState(MemoryState):
    """recurrent: [B, width], at least float32; zero before the first token."""

    recurrent: Tensor

    def reset(self, rows: Tensor | None = None) -> Self:
        if rows is None:
            return self._map(torch.zeros_like)
        return self._map(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0))


@dataclasses.dataclass
class DiagonalState(ScanState):
    """As ScanState; conv: [B, conv_size - 1, hidden_size], the last inputs of the convolution (no
    tokens without one)."""

    conv: Tensor


class DiagonalMemory(MemoryModule):
    """x -> convolution -> gates and candidate -> h_t = a_t h_{t-1} + b_t -> output.

    A token reads after its own write. With `context.write` False, tokens read the given state as
    it is.
    """

    shares_sequence = True
    gates: ClassVar[tuple[str, ...]]  # names of the projections with a bias

    def __init__(self, config: DiagonalConfig, hidden_size: int, norm_eps: float = 1e-6):
        super().__init__(config, hidden_size, norm_eps)
        self.width = config.width(hidden_size)
        self.conv1d = None
        if config.conv_size is not None:
            self.conv1d = ShortConvolution(hidden_size, config.conv_size, activation=None)
        for name in self.gates:
            self.add_module(name, nn.Linear(hidden_size, self.width))
        self.h_proj = nn.Linear(hidden_size, self.width, bias=False)
        self.o_proj = nn.Linear(self.width, hidden_size, bias=False)
        self.init_weights()

    @abstractmethod
    def keep_and_take(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of the old state and of the candidate, [B, T, width], at least float32.

        x: [B, T, hidden_size].
        """

    def init_state(self, batch_size: int, device=None, dtype=None) -> DiagonalState:
        wide = torch.promote_types(dtype or torch.float32, torch.float32)
        recurrent = torch.zeros(batch_size, self.width, device=device, dtype=wide)
        if self.conv1d is not None:
            return DiagonalState(recurrent, self.conv1d.init_tail(batch_size, device, dtype))
        tail = torch.zeros(batch_size, 0, self.hidden_size, device=device, dtype=dtype)
        return DiagonalState(recurrent, tail)

    def forward(
        self, hidden: Tensor, state: DiagonalState, context: CallContext
    ) -> tuple[Tensor, DiagonalState]:
        x, tail = context.layout.pack(hidden), state.conv
        if self.conv1d is not None:
            x, tail = convolve_rows(self.conv1d, x, tail, context)
        candidate = self.h_proj(x)
        if context.write:
            keep, take = self.keep_and_take(x)
            b = (take * positive(candidate)).to(candidate.dtype)
        else:
            keep, b = torch.ones_like(candidate), torch.zeros_like(candidate)
        h, recurrent = _scan(keep, b, state.recurrent, context)
        output = context.layout.unpack(self.o_proj(h))
        if not context.write:
            return output, state
        return output, DiagonalState(recurrent, tail.to(state.conv.dtype))

    def flops(self, tokens: int) -> int:
        """Projections, convolution and three per channel of the state."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim > 1)
        return tokens * (2 * matrices + 3 * self.width)


def _scan(keep: Tensor, b: Tensor, carried: Tensor, context: CallContext) -> tuple[Tensor, Tensor]:
    """h of packed tokens and the new states of the rows [B, width], given those before the call:
    see `memlm.memory.matrix_state.read_and_write`."""
    layout = context.layout
    if context.sequence is not None:
        run = diagonal_scan_map(keep, b, layout.cu_seqlens)
        return continue_rows(run, carried, layout, context.sequence)
    state = ScanState(carried)
    before = layout.incoming(state).recurrent
    h, final = diagonal_scan(keep, b, before, layout.cu_seqlens, return_state=True)
    return h, layout.outgoing(ScanState(final), state).recurrent


def positive(x: Tensor) -> Tensor:
    """The paper's g: x + 1/2 where x >= 0, else sigmoid(x); computed at least in float32."""
    x = wide(x)
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def wide(x: Tensor) -> Tensor:
    """x in at least float32: a share of 1 - 2^-8 is the slowest that bfloat16 knows."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclasses.dataclass(kw_only=True)
class MinGRUConfig(DiagonalConfig):
    """As DiagonalConfig; update_bias: start value of the bias in the update gate z. Negative values
    let the state fade slowly from the start."""

    memory = "min_gru"
    update_bias: float = 0.0


@register("min_gru", MinGRUConfig)
class MinGRU(DiagonalMemory):
    """h_t = (1 - z_t) h_{t-1} + z_t g(h_proj x_t) with z_t = sigmoid(z_proj x_t)."""

    gates = ("z_proj",)

    def init_weights(self) -> None:
        init.constant_(self.z_proj.bias, self.config.update_bias)

    def keep_and_take(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = wide(self.z_proj(x))
        # Not 1 - z, which has no digits left where z is close to 1.
        return torch.sigmoid(-z), torch.sigmoid(z)
