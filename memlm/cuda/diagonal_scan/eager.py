"""The diagonal scan in chunks, plain torch.

A run of tokens maps the h before it to ``product h + total``, exactly and for any coefficients:
product is the product of its a, total the h it ends with from zero. Chunk by chunk these pairs give
the h that enters each chunk; then all chunks of a segment step through their tokens side by side.
A cumulative sum of logarithms would need positive numbers and lose digits over long sequences.

The gradient g_t of h_t, all later tokens included, is a scan of the same form from the last token
to the first: ``g_t = a_{t+1} g_{t+1} + dh_t``.
"""

import dataclasses

import torch
from torch import Tensor

from memlm.cuda.diagonal_scan.inputs import Inputs

# Elements that one step of all chunks of a segment should touch: 2^16 float32 of the tensors in
# use fit a core's second cache.
STEP_CPU = 1 << 16
MIN_CHUNKS = 8  # side by side, also where the rows alone fill a step


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Tokens of a row whose results are given, whatever comes before them: where sequences begin.

    A coefficient of zero would not do: NaN of one sequence would reach the next.

    Attributes:
        tokens: int64 [S] on the CPU, rising.
        values: [S, D].
    """

    tokens: Tensor
    values: Tensor

    def within(self, start: int, end: int, size: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Of tokens [start, end) in chunks of `size`, by place in the chunk: the chunks, int64,
        and the values."""
        low, high = torch.searchsorted(self.tokens, torch.tensor([start, end])).tolist()
        tokens, device = self.tokens[low:high] - start, self.values.device
        order = (tokens % size).argsort(stable=True)
        places, counts = torch.unique_consecutive((tokens % size)[order], return_counts=True)
        chunks = (tokens // size)[order].to(device).split(counts.tolist())
        values = self.values[low:high][order.to(device)].split(counts.tolist())
        return dict(zip(places.tolist(), zip(chunks, values, strict=True), strict=True))


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """See `diagonal_scan`."""
    _, T, D = inputs.b.shape
    a, b = inputs.a.to(inputs.state_dtype), inputs.b.to(inputs.state_dtype)
    state = inputs.initial_state
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    if T == 0:
        return h.to(inputs.b.dtype), state.clone(memory_format=torch.contiguous_format)
    if inputs.cu_seqlens is None:
        _scan(a, b, state, None, h)
        return h.to(inputs.b.dtype), h[:, -1].clone(memory_format=torch.contiguous_format)
    filled, starts, ends = _filled(inputs.cu_seqlens)
    values = torch.addcmul(b[0, starts], a[0, starts], state[filled])
    _scan(a, b, b.new_zeros(1, D), Fixed(starts.cpu(), values), h)
    final = state.clone(memory_format=torch.contiguous_format)
    return h.to(inputs.b.dtype), final.index_copy_(0, filled, h[0, ends])


def backward(
    inputs: Inputs, h: Tensor, dh: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the initial states from those of h and of the final states."""
    a, h, dh = (x.to(inputs.state_dtype) for x in (inputs.a, h, dh))
    state = inputs.initial_state
    g = torch.empty_like(h, memory_format=torch.contiguous_format)
    da = torch.empty_like(g)
    dinitial = dstate.clone(memory_format=torch.contiguous_format)
    if h.shape[1] == 0:
        return da.to(inputs.a.dtype), g.to(inputs.b.dtype), dinitial
    if inputs.cu_seqlens is None:
        torch.add(dh[:, -1], dstate, out=g[:, -1])
        _scan(a[:, 1:], dh[:, :-1], g[:, -1], None, g[:, :-1], reverse=True)
        torch.mul(g[:, 0], a[:, 0], out=dinitial)
        torch.mul(g[:, 0], state, out=da[:, 0])
        torch.mul(g[:, 1:], h[:, :-1], out=da[:, 1:])
    else:
        filled, starts, ends = _filled(inputs.cu_seqlens)
        lasts = dh[0, ends] + dstate[filled]
        g[0, -1] = lasts[-1]
        _scan(a[:, 1:], dh[:, :-1], g[:, -1], Fixed(ends.cpu(), lasts), g[:, :-1], reverse=True)
        firsts = g[0, starts]
        torch.mul(g[:, 1:], h[:, :-1], out=da[:, 1:])
        da[0].index_copy_(0, starts, firsts * state[filled])
        dinitial.index_copy_(0, filled, firsts * a[0, starts])
    return da.to(inputs.a.dtype), g.to(inputs.b.dtype), dinitial


def _filled(cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sequences that are not empty, their first and their last tokens, int64."""
    bounds = cu_seqlens.long()
    filled = bounds.diff().nonzero().squeeze(1)
    return filled, bounds[filled], bounds[filled + 1] - 1


def _scan(
    a: Tensor,
    b: Tensor,
    entering: Tensor,
    fixed: Fixed | None,
    out: Tensor,
    reverse: bool = False,
) -> None:
    """out_t = a_t out_{t-1} + b_t, or with `reverse` a_t out_{t+1} + b_t, all [B, T, D].

    entering: [B, D], what comes before the first token. fixed: only with B = 1.
    """
    B, T, D = b.shape
    for start, end, size in _segments(T, B * D, b.device):
        last = end == T
        if reverse:
            start, end = T - end, T - start
        chunks = [x[:, start:end].unflatten(1, (-1, size)) for x in (a, b, out)]
        given = {} if fixed is None else fixed.within(start, end, size)
        entering = _segment(*chunks, entering, given, reverse, last)


def _segments(T: int, width: int, device: torch.device) -> list[tuple[int, int, int]]:
    """[start, end) of the segments in the order of the scan, and the tokens of their chunks.

    The borders of chunks depend on T only, so that a row has the same bits in every batch.
    """
    # A segment takes three operations per token of a chunk and some per chunk.
    size = 1 << max(2, min(7, T.bit_length() // 2 - 1))
    whole = T // size * size
    step = max(whole, 1)
    if device.type == "cpu":
        step = size * max(MIN_CHUNKS, STEP_CPU * torch.get_num_threads() // max(width, 1))
    found = [(start, min(start + step, whole), size) for start in range(0, whole, step)]
    return found if whole == T else [*found, (whole, T, T - whole)]


def _segment(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    entering: Tensor,
    fixed: dict[int, tuple[Tensor, Tensor]],
    reverse: bool,
    last: bool,
) -> Tensor:
    """Write out, [B, chunks, size, D] as a and b; returns what enters the next segment, [B, D].

    fixed: by place, as of `Fixed.within`. last: nothing comes after, what is returned is void.
    """
    _, chunks, size, _ = b.shape
    places = range(size)[::-1] if reverse else range(size)
    before = entering[:, None]
    if chunks > 1 or not last:
        product, total = _summaries(a, b, fixed, places)
        before = torch.empty_like(total)
        cut = set()
        for found, _ in fixed.values():
            cut.update(found.tolist())
        for chunk in range(chunks)[::-1] if reverse else range(chunks):
            before[:, chunk] = entering
            if chunk in cut:
                entering = total[:, chunk]
            else:
                # A product beyond the largest number must leave an h of zero zero, as its factors
                # do one by one.
                carried = (product[:, chunk] * entering).masked_fill_(entering == 0, 0)
                entering = carried.add_(total[:, chunk])
    for place in places:
        step = out[:, :, place]
        torch.addcmul(b[:, :, place], a[:, :, place], before, out=step)
        if place in fixed:
            step[0].index_copy_(0, *fixed[place])
        before = step
    return entering


def _summaries(
    a: Tensor, b: Tensor, fixed: dict[int, tuple[Tensor, Tensor]], places: range
) -> tuple[Tensor, Tensor]:
    """product and total of every chunk, [B, chunks, D]; see the head of this file."""
    product = torch.ones_like(b[:, :, 0], memory_format=torch.contiguous_format)
    total = torch.zeros_like(product)
    for place in places:
        product.mul_(a[:, :, place])
        torch.addcmul(b[:, :, place], a[:, :, place], total, out=total)
        if place in fixed:
            total[0].index_copy_(0, *fixed[place])
    return product, total
