"""Causal depthwise convolution over a few tokens, with the tail carried as state."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from memlm.cuda import short_convolution
from memlm.cuda.short_convolution.inputs import L2_NORM_EPS
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
    """y_t = activation(sum_j weight[:, j] * x_{t - kernel_size + 1 + j} + bias), by channels.

    The weight has the shape of `nn.Conv1d(groups=channels)`: [channels, 1, kernel_size]. A bias
    (default: none) starts at 0.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 4,
        activation: str | None = "silu",
        bias: bool = False,
    ):
        super().__init__()
        self.kernel_size = kernel_size
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.init_weights()

    def init_weights(self) -> None:
        # The scale of nn.Conv1d: a fan-in of kernel_size inputs per output channel.
        bound = self.kernel_size**-0.5
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.zeros_(self.bias)

    def init_tail(self, batch_size: int, device=None, dtype=None) -> Tensor:
        """Zeros [batch_size, kernel_size - 1, channels]."""
        return torch.zeros(
            batch_size, self.kernel_size - 1, self.weight.shape[0], device=device, dtype=dtype
        )

    def forward(
        self,
        x: Tensor,
        tail: Tensor,
        layout: SequenceLayout,
        split: Sequence[tuple[int, int, bool]] | None = None,
    ) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """Convolve packed pieces.

        Args:
            x: packed tokens, [B, T, channels] or [1, total, channels] (see SequenceLayout.pack);
                a view of a wider projection needs no copy.
            tail: [N, kernel_size - 1, channels], the inputs before each piece.
            layout: the pieces.
            split: (heads, head_dim, normalize) of consecutive channels, all of them in total.

        Returns:
            y, shaped as x, or with split a tuple of contiguous [B, T, heads, head_dim], their heads
            of unit length where normalize is true; and the new tails
            [N, kernel_size - 1, channels].

        Raises:
            ValueError: x, tail and split do not fit the layer (see memlm.cuda.short_convolution).
        """
        if self.bias is None:
            return short_convolution(
                x, self.weight, tail, layout.cu_seqlens, self.activation, split
            )
        # The fused operation has no bias, so what follows the sum is not fused either.
        y, tail = short_convolution(x, self.weight, tail, layout.cu_seqlens, None)
        wide = torch.promote_types(y.dtype, torch.float32)
        y = y.to(wide) + self.bias.to(wide)
        if self.activation is not None:
            y = F.silu(y)
        if split is None:
            return y.to(x.dtype), tail
        columns = y.split([heads * head_dim for heads, head_dim, _ in split], -1)
        parts = []
        for column, (heads, head_dim, normalize) in zip(columns, split, strict=True):
            part = column.unflatten(-1, (heads, head_dim))
            if normalize:
                part = part * (part.square().sum(-1, keepdim=True) + L2_NORM_EPS).rsqrt()
            parts.append(part.to(x.dtype).contiguous())
        return tuple(parts), tail
