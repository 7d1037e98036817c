"""Triton kernels of the diagonal scan and their launches.

A program owns `BLOCK` channels of one slot, a run of consecutive tokens of one sequence, and walks
through it with h (backward: the gradient of h) in registers. Loads do not depend on h: those of the
next `AHEAD` tokens are on their way while these are computed. Every number is read or written once.

Where rows and channels are too few to fill a card, slots are `size` tokens long and scanned side by
side: a first kernel finds the pair (product, total) that maps the h before a slot to
``product h + total``, exactly; a second one walks from slot to slot and leaves the h that enters
each. Sequence n of a packed call owns the slots from ``cu_seqlens[n] // size + n`` on, at least
one, so that no length is ever read back. Otherwise a slot is a sequence.

Backward, with the gradients g_t of h_t and u_t of h_{t-1}, all later tokens included:

    g_t = dh_t + u_{t+1}      u_t = a_t g_t      da_t = g_t h_{t-1}      db_t = g_t
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlm.cuda.boundaries import boundaries_beside
from memlm.cuda.diagonal_scan.inputs import Inputs
from memlm.cuda.linear_recurrence.triton_split import SPLIT_VARIABLE
from memlm.cuda.triton_slots import locate_slot

BLOCK = 64  # channels of a program: two per lane of one warp
AHEAD = 8  # tokens whose loads are under way; with their successors 64 registers of float32 pairs
SLOT = 128  # fewest tokens of a slot of a split sequence
MAX_SLOTS = 128  # of a sequence: they are walked through one by one
FULL = 1 << 17  # channels of all rows that fill a card without a split


@triton.jit
def _push(values, value):
    """The tuple with one more value at its end."""
    return values + (value,)  # noqa: RUF005 (the compiler knows no stars)


@triton.jit
def _ahead(
    x, x_row, p, low, high, inside, NEUTRAL: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr
):
    """Tokens p, p + STEP, ... of a sequence, N in all; NEUTRAL outside [low, high).

    NEUTRAL is a float: the interpreter takes an integer for the bits of a bfloat16.
    """
    values = ()
    for i in tl.static_range(N):
        q = p + i * STEP
        live = inside & (q >= low) & (q < high)
        values = _push(values, tl.load(x + q.to(tl.int64) * x_row, mask=live, other=NEUTRAL))
    return values


@triton.jit(do_not_specialize=["T", "sequences", "size"])
def forward_kernel(
    a,
    a_row,
    b,
    b_row,
    entering,
    cu_seqlens,
    h,
    state,
    T,
    sequences,
    size,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    ACC: tl.constexpr,
):
    """h [tokens, D] and the final states [N, D]; grid (slots, blocks of channels).

    a and b have tokens a_row and b_row apart. entering [slots, D] is what comes before each slot.
    """
    slot = tl.program_id(0)
    n, start, length, position = locate_slot(slot, T, sequences, size, cu_seqlens)
    if (position > 0) & (position >= length):
        return
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    a += start * a_row + channel
    b += start * b_row + channel
    h += start * D + channel
    end = tl.minimum(length, position + size)
    x = tl.load(entering + slot.to(tl.int64) * D + channel, mask=inside, other=0).to(ACC)
    next_a = _ahead(a, a_row, position, position, end, inside, 1.0, 1, AHEAD)
    next_b = _ahead(b, b_row, position, position, end, inside, 0.0, 1, AHEAD)
    for i in range(0, end - position, AHEAD):
        these_a = next_a
        these_b = next_b
        p = position + i
        next_a = _ahead(a, a_row, p + AHEAD, position, end, inside, 1.0, 1, AHEAD)
        next_b = _ahead(b, b_row, p + AHEAD, position, end, inside, 0.0, 1, AHEAD)
        for j in tl.static_range(AHEAD):
            x = these_a[j].to(ACC) * x + these_b[j].to(ACC)
            rows = h + (p + j).to(tl.int64) * D
            tl.store(rows, x.to(h.dtype.element_ty), mask=inside & (p + j < end))
    if end == length:
        tl.store(state + n.to(tl.int64) * D + channel, x, mask=inside)


@triton.jit(do_not_specialize=["T", "sequences", "size"])
def backward_kernel(
    a,
    a_row,
    h,
    dh,
    initial,
    entering,
    cu_seqlens,
    da,
    db,
    dinitial,
    T,
    sequences,
    size,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    ACC: tl.constexpr,
):
    """da, db [tokens, D] and dinitial [N, D]; grid as of `forward_kernel`.

    h, dh [tokens, D]; initial [N, D]; entering [slots, D] is the u that comes after each slot.
    """
    slot = tl.program_id(0)
    n, start, length, position = locate_slot(slot, T, sequences, size, cu_seqlens)
    if (position > 0) & (position >= length):
        return
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    a += start * a_row + channel
    h += (start - 1) * D + channel  # of the token before
    dh += start * D + channel
    da += start * D + channel
    db += start * D + channel
    end = tl.minimum(length, position + size)
    u = tl.load(entering + slot.to(tl.int64) * D + channel, mask=inside, other=0).to(ACC)
    first = tl.load(initial + n.to(tl.int64) * D + channel, mask=inside, other=0).to(ACC)
    next_a = _ahead(a, a_row, end - 1, position, end, inside, 1.0, -1, AHEAD)
    next_h = _ahead(h, D, end - 1, tl.maximum(position, 1), end, inside, 0.0, -1, AHEAD)
    next_g = _ahead(dh, D, end - 1, position, end, inside, 0.0, -1, AHEAD)
    for i in range(0, end - position, AHEAD):
        these_a = next_a
        these_h = next_h
        these_g = next_g
        p = end - 1 - i
        q = p - AHEAD
        next_a = _ahead(a, a_row, q, position, end, inside, 1.0, -1, AHEAD)
        next_h = _ahead(h, D, q, tl.maximum(position, 1), end, inside, 0.0, -1, AHEAD)
        next_g = _ahead(dh, D, q, position, end, inside, 0.0, -1, AHEAD)
        for j in tl.static_range(AHEAD):
            g = these_g[j].to(ACC) + u
            u = these_a[j].to(ACC) * g
            before = tl.where(p == j, first, these_h[j].to(ACC))
            rows = (p - j).to(tl.int64) * D
            live = inside & (p - j >= position)
            tl.store(da + rows, (g * before).to(da.dtype.element_ty), mask=live)
            tl.store(db + rows, g.to(db.dtype.element_ty), mask=live)
    if position == 0:
        tl.store(dinitial + n.to(tl.int64) * D + channel, u, mask=inside)


@triton.jit(do_not_specialize=["T", "sequences", "size"])
def summary_kernel(
    a,
    a_row,
    b,
    b_row,
    cu_seqlens,
    product,
    total,
    T,
    sequences,
    size,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    ACC: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """product and total [slots, D] of every slot that another one follows; grid (slots, blocks).

    Backward (REVERSE) b is dh, and the pair is that of u.
    """
    slot = tl.program_id(0)
    _, start, length, position = locate_slot(slot, T, sequences, size, cu_seqlens)
    if position >= length:
        return
    STEP: tl.constexpr = -1 if REVERSE else 1
    end = tl.minimum(length, position + size)
    p = position
    if REVERSE:
        p = end - 1
        if position == 0:
            return
    elif end == length:
        return
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    a += start * a_row + channel
    b += start * b_row + channel
    x = tl.zeros([BLOCK], ACC)
    factor = x + 1
    next_a = _ahead(a, a_row, p, position, end, inside, 1.0, STEP, AHEAD)
    next_b = _ahead(b, b_row, p, position, end, inside, 0.0, STEP, AHEAD)
    for _ in range(0, end - position, AHEAD):
        these_a = next_a
        these_b = next_b
        p += STEP * AHEAD
        next_a = _ahead(a, a_row, p, position, end, inside, 1.0, STEP, AHEAD)
        next_b = _ahead(b, b_row, p, position, end, inside, 0.0, STEP, AHEAD)
        for j in tl.static_range(AHEAD):
            coefficient = these_a[j].to(ACC)
            factor *= coefficient
            if REVERSE:
                x = coefficient * (x + these_b[j].to(ACC))
            else:
                x = coefficient * x + these_b[j].to(ACC)
    rows = slot.to(tl.int64) * D + channel
    tl.store(product + rows, factor, mask=inside)
    tl.store(total + rows, x, mask=inside)


@triton.jit(do_not_specialize=["T", "size"])
def carry_kernel(
    product,
    total,
    initial,
    cu_seqlens,
    entering,
    T,
    size,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """entering [slots, D]: what comes before each slot, or after it; grid (N, blocks).

    initial [N, D]: before the first slot of each sequence, backward (REVERSE) after the last.
    """
    n = tl.program_id(0)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1).to(tl.int64) - start).to(tl.int32)
        slot = start // size + n
    else:
        length = T
        slot = n.to(tl.int64) * tl.cdiv(T, size)
    count = tl.maximum(tl.cdiv(length, size), 1)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    rows = slot * D + channel
    product += rows
    total += rows
    entering += rows
    STEP: tl.constexpr = -1 if REVERSE else 1
    low = 0  # of the slots whose pairs matter
    high = count - 1
    p = 0
    if REVERSE:
        low = 1
        high = count
        p = count - 1
    x = tl.load(initial + n.to(tl.int64) * D + channel, mask=inside, other=0)
    next_product = _ahead(product, D, p, low, high, inside, 1.0, STEP, AHEAD)
    next_total = _ahead(total, D, p, low, high, inside, 0.0, STEP, AHEAD)
    for _ in range(0, count, AHEAD):
        products = next_product
        totals = next_total
        next_product = _ahead(product, D, p + STEP * AHEAD, low, high, inside, 1.0, STEP, AHEAD)
        next_total = _ahead(total, D, p + STEP * AHEAD, low, high, inside, 0.0, STEP, AHEAD)
        for j in tl.static_range(AHEAD):
            q = p + STEP * j
            live = inside & (q >= 0) & (q < count)
            tl.store(entering + q.to(tl.int64) * D, x, mask=live)
            # A product beyond the largest number must leave an h of zero zero, as its factors do.
            x = tl.where(x == 0, 0, products[j] * x) + totals[j]
        p += STEP * AHEAD


def _constants(inputs: Inputs) -> dict:
    """What all kernels are compiled for."""
    _, T, D = inputs.b.shape
    return {
        "D": D,
        "BLOCK": min(BLOCK, triton.next_power_of_2(D)),
        "AHEAD": 1 if T == 1 else AHEAD,
        "num_warps": 1,
    }


def _acc(inputs: Inputs) -> tl.dtype:
    return tl.float64 if inputs.state_dtype == torch.float64 else tl.float32


def slot_size(inputs: Inputs) -> int:
    """Tokens of a slot; more than there are where a slot is a sequence.

    Set ``MEMLM_SEQUENCE_SPLIT=0`` to never split: a row's results then do not depend, in the last
    bit, on the rows beside it.
    """
    B, T, D = inputs.b.shape
    if os.environ.get(SPLIT_VARIABLE) == "0" or B * D >= FULL or T < 2 * SLOT:
        return T + 1
    return max(SLOT, triton.cdiv(T, MAX_SLOTS))


def _grid(inputs: Inputs, size: int, block: int) -> tuple[int, int]:
    """Slots for sequences of whatever lengths, and blocks of channels."""
    B, T, D = inputs.b.shape
    slots = B * triton.cdiv(T, size)
    if inputs.cu_seqlens is not None:
        slots = T // size + inputs.sequences
    return slots, triton.cdiv(D, block)


def _rows(x: Tensor) -> Tensor:
    """x with channels side by side and all tokens equally far apart.

    A stride between rows of the batch would be another number that the length decides, and whose
    divisibility Triton would compile for.
    """
    B, T, _ = x.shape
    even = B == 1 or x.stride(0) == T * x.stride(1)
    return x if even and x.stride(2) == 1 else x.contiguous()


def _entering(inputs: Inputs, a: Tensor, b: Tensor, first: Tensor, size: int, reverse: bool):
    """What comes before each slot (reverse: after it), [slots, D], with `first` [N, D] before the
    sequences."""
    _, T, D = b.shape
    if size > T:
        return first
    constants = _constants(inputs)
    grid = _grid(inputs, size, constants["BLOCK"])
    product, total, entering = torch.empty(
        3, grid[0], D, dtype=inputs.state_dtype, device=b.device
    ).unbind()
    summary_kernel[grid](
        a,
        a.stride(1),
        b,
        b.stride(1),
        boundaries_beside(inputs.cu_seqlens, inputs.b),
        product,
        total,
        T,
        inputs.sequences,
        size,
        **constants,
        ACC=_acc(inputs),
        REVERSE=reverse,
    )
    carry_kernel[(inputs.sequences, grid[1])](
        product,
        total,
        first,
        boundaries_beside(inputs.cu_seqlens, inputs.b),
        entering,
        T,
        size,
        **constants,
        REVERSE=reverse,
    )
    return entering


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """See `diagonal_scan`."""
    _, T, _ = inputs.b.shape
    h = torch.empty_like(inputs.b, memory_format=torch.contiguous_format)
    initial = inputs.initial_state.contiguous()
    if inputs.b.numel() == 0:
        return h, initial.clone()
    state = torch.empty_like(initial)
    a, b = _rows(inputs.a), _rows(inputs.b)
    size = slot_size(inputs)
    constants = _constants(inputs)
    with torch.cuda.device_of(b):
        entering = _entering(inputs, a, b, initial, size, reverse=False)
        forward_kernel[_grid(inputs, size, constants["BLOCK"])](
            a,
            a.stride(1),
            b,
            b.stride(1),
            entering,
            boundaries_beside(inputs.cu_seqlens, inputs.b),
            h,
            state,
            T,
            inputs.sequences,
            size,
            **constants,
            ACC=_acc(inputs),
        )
    return h, state


def backward(
    inputs: Inputs, h: Tensor, dh: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the initial states from those of h and of the final states."""
    _, T, _ = inputs.b.shape
    da, db = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (inputs.a, inputs.b)
    )
    dstate = dstate.contiguous()
    if inputs.b.numel() == 0:
        return da, db, dstate.clone()
    dinitial = torch.empty_like(dstate)
    a, dh = _rows(inputs.a), dh.contiguous()
    size = slot_size(inputs)
    constants = _constants(inputs)
    with torch.cuda.device_of(a):
        entering = _entering(inputs, a, dh, dstate, size, reverse=True)
        backward_kernel[_grid(inputs, size, constants["BLOCK"])](
            a,
            a.stride(1),
            h,
            dh,
            inputs.initial_state.contiguous(),
            entering,
            boundaries_beside(inputs.cu_seqlens, inputs.b),
            da,
            db,
            dinitial,
            T,
            inputs.sequences,
            size,
            **constants,
            ACC=_acc(inputs),
        )
    return da, db, dinitial
