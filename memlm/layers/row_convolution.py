"""A short convolution over the pieces of a call, with the tails of whole rows."""

from collections.abc import Sequence

from torch import Tensor

from memlm.layers.context import CallContext
from memlm.layers.convolution import ConvolutionState, ShortConvolution, carried_tail


def convolve_rows(
    convolution: ShortConvolution,
    inputs: Tensor,
    tail: Tensor,
    context: CallContext,
    split: Sequence[tuple[int, int, bool]] | None = None,
) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
    """Convolve packed tokens, also where several processes hold the rows.

    Args:
        convolution: the layer.
        inputs, split: as of the layer.
        tail: [B, kernel_size - 1, channels], the last inputs of the rows before the call; where
            several processes hold the rows, before the whole rows.
        context: the call.

    Returns:
        What the layer gives, and the new tails of the rows; where several processes hold the rows,
        those behind this process's columns.
    """
    layout = context.layout
    if context.sequence is not None:
        tail = carried_tail(layout.unpack(inputs), tail, layout, context.sequence)
    state = ConvolutionState(tail)
    outputs, last = convolution(inputs, layout.incoming(state).tail, layout, split)
    return outputs, layout.outgoing(ConvolutionState(last.to(tail.dtype)), state).tail
