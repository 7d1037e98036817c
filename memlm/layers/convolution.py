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
from memlm.layers.sequence_group import SequenceGroup, tied
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


def carried_tail(
    inputs: Tensor, tail: Tensor, layout: SequenceLayout, sequence: SequenceGroup
) -> Tensor:
    """The inputs of a convolution that this process's columns carry in, from the columns before.

    A module that shares rows with other processes puts it in place of the tail of its state, and
    does the rest as with whole rows: `layout.incoming`, the convolution of the packed inputs,
    `layout.outgoing`. The new tail on the last process is then that of the whole rows.

    It is exact wherever padding and the borders of documents lie: columns that hold fewer than
    kernel_size - 1 tokens of the document leave room for those before them, and columns in which
    the document starts leave none. Gradients reach the inputs on their processes.

    Args:
        inputs: [B, T / size, C], what is convolved, of this process's columns and not packed
            (anything at padding).
        tail: [B, kernel_size - 1, C], of the state at the start of the whole rows.
        layout: of this process's columns.
        sequence: the processes; a collective, to which each gives B (kernel_size - 1) (C + 2)
            numbers.

    Returns:
        [B, kernel_size - 1, C], of the wider type of both.
    """
    reach = tail.shape[1]
    if not reach:
        return tail
    carried = tail.to(torch.promote_types(inputs.dtype, tail.dtype))
    values, filled, begins = _last_inputs(inputs.to(carried.dtype), reach, layout)
    # The flags travel as channels of 0 and 1, which every type holds.
    flags = torch.stack([filled, begins.expand_as(filled)], -1).to(values.dtype)
    slots = torch.arange(reach, device=inputs.device)
    everywhere = sequence.all(torch.cat([values, flags], -1))
    for columns in everywhere[: sequence.rank]:
        values, (filled, begins) = columns[..., :-2], (columns[..., -2:] > 0).unbind(-1)
        # Older inputs make room for newer ones, and for a document that begins they are none.
        source = (slots + filled.sum(1, keepdim=True)).clamp(max=reach - 1)
        older = carried.gather(1, source[..., None].expand_as(carried))
        carried = torch.where(filled[..., None], values, older.masked_fill(begins[..., None], 0))
    return tied(carried, *everywhere)


def _last_inputs(
    inputs: Tensor, reach: int, layout: SequenceLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """What the columns have of the last document of each row, at the right of `reach` slots.

    Returns:
        [B, reach, C], bool [B, reach] which slots hold a token, and bool [B, 1] whether the
        document begins in these columns.
    """
    document = F.pad(layout.document, (reach, 0), value=-1)
    last = document.amax(1, keepdim=True)
    kept = (document == last) & (last >= 0)
    inputs = F.pad(inputs, (0, 0, reach, 0))
    if layout.uniform:
        return inputs[:, -reach:], kept[:, -reach:], last > 0
    order = kept.to(torch.int8).sort(dim=1, stable=True).indices[:, -reach:]
    index = order[..., None].expand(-1, -1, inputs.shape[2])
    return inputs.gather(1, index), kept.gather(1, order), last > 0
