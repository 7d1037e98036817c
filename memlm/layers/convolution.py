"""Causal depthwise convolution over a few tokens, with the tail carried as state."""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from memlm.layers.context import SequenceLayout
from memlm.layers.state import MemoryState


@dataclasses.dataclass
class ConvolutionState(MemoryState):
    """tail: [B, kernel_size - 1, channels], the last inputs of each row, zero before its start."""

    tail: Tensor

    def reset(self, rows: Tensor | None = None) -> "ConvolutionState":
        if rows is None:
            return ConvolutionState(torch.zeros_like(self.tail))
        return ConvolutionState(self.tail.masked_fill(rows[:, None, None], 0))


class ShortConvolution(nn.Module):
    """y_t = activation(sum_j weight[:, j] * x_{t - kernel_size + 1 + j}), channel by channel.

    The weight has the shape of `nn.Conv1d(groups=channels)`: [channels, 1, kernel_size].
    """

    def __init__(self, channels: int, kernel_size: int = 4, activation: str | None = "silu"):
        super().__init__()
        self.kernel_size = kernel_size
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.init_weights()

    def init_weights(self) -> None:
        # The scale of nn.Conv1d: a fan-in of kernel_size inputs per output channel.
        bound = self.kernel_size**-0.5
        init.uniform_(self.weight, -bound, bound)

    def init_tail(self, batch_size: int, device=None, dtype=None) -> Tensor:
        """Zeros [batch_size, kernel_size - 1, channels]."""
        return torch.zeros(
            batch_size, self.kernel_size - 1, self.weight.shape[0], device=device, dtype=dtype
        )

    def forward(self, x: Tensor, tail: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Convolve packed pieces.

        Args:
            x: packed tokens, [B, T, channels] or [1, total, channels] (see SequenceLayout.pack).
            tail: [N, kernel_size - 1, channels], the inputs before each piece.
            layout: the pieces.

        Returns:
            y, shaped as x, and the new tails [N, kernel_size - 1, channels].
        """
        reach = self.kernel_size - 1
        if layout.uniform:
            padded = torch.cat([tail.to(x.dtype), x], dim=1)
            y = F.conv1d(padded.transpose(1, 2), self.weight, groups=x.shape[-1]).transpose(1, 2)
            # A view would keep the inputs of the whole call alive.
            new_tail = padded[:, padded.shape[1] - reach :].clone()
        else:
            # Each piece gets its own tail in front of it: then one convolution over the whole
            # stretch is right everywhere but on the tails, whose outputs are dropped.
            starts = layout.cu_seqlens[:-1]
            lengths = layout.cu_seqlens.diff()
            count = lengths.shape[0]
            tokens = torch.arange(x.shape[1], device=x.device)
            piece = torch.repeat_interleave(torch.arange(count, device=x.device), lengths)
            token_place = tokens + (piece + 1) * reach
            steps = torch.arange(reach, device=x.device)
            tail_place = (starts + torch.arange(count, device=x.device) * reach)[:, None] + steps
            stretch = x.new_zeros(x.shape[1] + count * reach, x.shape[2])
            stretch = stretch.index_copy(0, token_place, x.squeeze(0))
            stretch = stretch.index_copy(0, tail_place.flatten(), tail.to(x.dtype).flatten(0, 1))
            end_place = (layout.cu_seqlens[1:] + torch.arange(count, device=x.device) * reach)[
                :, None
            ]
            new_tail = stretch[end_place + steps]
            y = F.conv1d(stretch.t().unsqueeze(0), self.weight, groups=x.shape[-1])
            y = y.squeeze(0).t().index_select(0, token_place - reach).unsqueeze(0)
        return (F.silu(y) if self.activation == "silu" else y), new_tail
