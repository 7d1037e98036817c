"""Triton kernels of the short convolution and their launches.

A tile is one head of a normalized part, or `BLOCK` channels of another; a slot is `BLOCK_T` tokens
of one sequence. Sequence n of a packed call owns the slots from ``cu_seqlens[n] // BLOCK_T + n``
on, so that no length is ever read back. Uniform calls number the slots row by row.

Forward, a program computes a slot of a tile at once: every tap is one load, from the cache but for
the first. Backward, it walks through its tokens with the last inputs and the last gradients before
the activation in registers, so that each is read or computed once: with the tap u_i of lag i,

    dx_s = sum_i u_i dz_{s+i}          du_i = sum_t dz_t x_{t-i}

Sums over tokens leave as one partial sum per slot: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlm.cuda.boundaries import boundaries_beside
from memlm.cuda.short_convolution.inputs import L2_NORM_EPS, Inputs
from memlm.cuda.triton_slots import locate_slot

EPS = tl.constexpr(L2_NORM_EPS)
AHEAD = tl.constexpr(4)  # tokens the backward kernel loads before it needs them
BACKWARD_TOKENS = 64  # of a slot: 3 more are recomputed for a width of 4


@triton.jit
def _activate(z, SILU: tl.constexpr):
    """Activation, and its derivative."""
    if SILU:
        gate = tl.sigmoid(z)
        return z * gate, gate * (1 + z * (1 - gate))
    else:
        return z, z * 0 + 1


@triton.jit
def _push(values, value):
    """The tuple with one more value at its end."""
    return values + (value,)  # noqa: RUF005 (the compiler knows no stars)


@triton.jit
def _forward_part(
    x,
    x_row,
    weight,
    tail,
    y,
    new_tail,
    n,
    start,
    length,
    position,
    tile,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
):
    """One tile of one part; x points to the first token of the sequence, y to that of the part."""
    REACH: tl.constexpr = W - 1
    within = tl.arange(0, BLOCK)
    column = tile * STEP + within
    inside = (within < STEP) & (column < WIDTH)
    channel = FIRST + column
    p = position + tl.arange(0, BLOCK_T)
    live = (p < length)[:, None] & inside[None, :]
    tail += n.to(tl.int64) * REACH * D
    z = tl.zeros([BLOCK_T, BLOCK], ACC)
    for lag in tl.static_range(W):
        u = tl.load(weight + channel * W + (REACH - lag), mask=inside, other=0).to(ACC)
        source = p - lag
        rows = x + source.to(tl.int64)[:, None] * x_row
        seen = live & (source >= 0)[:, None]
        z += tl.load(rows + channel[None, :], mask=seen, other=0).to(ACC) * u[None, :]
        if lag > 0:  # noqa: SIM102 (known when compiled, and the next one not)
            if position == 0:
                rows = tail + (source + REACH)[:, None] * D
                seen = live & (source < 0)[:, None]
                z += tl.load(rows + channel[None, :], mask=seen, other=0).to(ACC) * u[None, :]
    a, _ = _activate(z, SILU)
    if UNIT:
        # Lanes outside the head hold zero.
        a = a * tl.rsqrt(tl.sum(a * a, 1) + EPS)[:, None]
    rows = y + (start + p)[:, None] * WIDTH
    tl.store(rows + column[None, :], a.to(y.dtype.element_ty), mask=live)
    if position + BLOCK_T >= length:
        new_tail += n.to(tl.int64) * REACH * D
        for i in tl.static_range(REACH):
            end = length - REACH + i
            own = inside & (end >= 0)
            old = inside & (end < 0)
            value = tl.load(x + end.to(tl.int64) * x_row + channel, mask=own, other=0)
            value += tl.load(tail + (length + i) * D + channel, mask=old, other=0)
            tl.store(new_tail + i * D + channel, value, mask=inside)


@triton.jit(do_not_specialize=["T", "sequences", "x_batch"])
def forward_kernel(
    x,
    x_batch,
    x_row,
    weight,
    tail,
    cu_seqlens,
    y0,
    y1,
    y2,
    new_tail,
    T,
    sequences,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH0: tl.constexpr,
    STEP0: tl.constexpr,
    UNIT0: tl.constexpr,
    WIDTH1: tl.constexpr,
    STEP1: tl.constexpr,
    UNIT1: tl.constexpr,
    WIDTH2: tl.constexpr,
    STEP2: tl.constexpr,
    UNIT2: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
):
    """Outputs y0, y1, y2 [tokens, WIDTH] and the new tails; grid (slots, tiles of all parts).

    x has rows x_row apart; rows of the batch x_batch apart. weight [D, W], tail [N, W - 1, D].
    """
    n, start, length, position = locate_slot(tl.program_id(0), T, sequences, BLOCK_T, cu_seqlens)
    if (position > 0) & (position >= length):
        return
    if cu_seqlens is not None:
        x += start * x_row
    else:
        x += n.to(tl.int64) * x_batch
    tile = tl.program_id(1)
    TILES0: tl.constexpr = (WIDTH0 + STEP0 - 1) // STEP0
    TILES1: tl.constexpr = (WIDTH1 + STEP1 - 1) // STEP1
    if tile < TILES0:
        _forward_part(
            x, x_row, weight, tail, y0, new_tail, n, start, length, position, tile,
            D, W, SILU, 0, WIDTH0, STEP0, UNIT0, BLOCK, BLOCK_T, ACC,
        )  # fmt: skip
    if WIDTH1 > 0:  # noqa: SIM102
        if (tile >= TILES0) & (tile < TILES0 + TILES1):
            _forward_part(
                x, x_row, weight, tail, y1, new_tail, n, start, length, position, tile - TILES0,
                D, W, SILU, WIDTH0, WIDTH1, STEP1, UNIT1, BLOCK, BLOCK_T, ACC,
            )  # fmt: skip
    if WIDTH2 > 0:  # noqa: SIM102
        if tile >= TILES0 + TILES1:
            _forward_part(
                x, x_row, weight, tail, y2, new_tail, n, start, length, position,
                tile - TILES0 - TILES1,
                D, W, SILU, WIDTH0 + WIDTH1, WIDTH2, STEP2, UNIT2, BLOCK, BLOCK_T, ACC,
            )  # fmt: skip


@triton.jit
def _backward_part(
    x,
    x_row,
    weight,
    tail,
    dy,
    dnew_tail,
    dx,
    dtail,
    partial,
    n,
    start,
    length,
    position,
    tile,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
):
    """One tile of one part; x, dy and dx point to the sequence, tails to its own, partial to the
    slot's sums. The step of token p reads p, and writes the gradient of input p - REACH."""
    REACH: tl.constexpr = W - 1
    within = tl.arange(0, BLOCK)
    column = tile * STEP + within
    inside = (within < STEP) & (column < WIDTH)
    channel = FIRST + column
    x += channel
    dy += column
    taps = ()  # by lag
    sums = ()
    for lag in tl.static_range(W):
        u = tl.load(weight + channel * W + (REACH - lag), mask=inside, other=0).to(ACC)
        taps = _push(taps, u)
        sums = _push(sums, tl.zeros([BLOCK], ACC))
    window = ()  # the inputs before the next token, the oldest first
    gradients = ()  # dz of the same tokens; those before this slot count for nothing here
    for i in tl.static_range(REACH):
        source = position - REACH + i
        own = inside & (source >= 0) & (source < length)
        old = inside & (source < 0)
        value = tl.load(x + source.to(tl.int64) * x_row, mask=own, other=0)
        value += tl.load(tail + (source + REACH) * D + channel, mask=old, other=0)
        window = _push(window, value.to(ACC))
        gradients = _push(gradients, tl.zeros([BLOCK], ACC))
    next_x = ()
    next_dy = ()
    for i in tl.static_range(AHEAD):
        p = position + i
        live = inside & (p < length)
        next_x = _push(next_x, tl.load(x + p.to(tl.int64) * x_row, mask=live, other=0))
        next_dy = _push(next_dy, tl.load(dy + p.to(tl.int64) * WIDTH, mask=live, other=0))
    count = tl.minimum(length - position, BLOCK_T)
    for i in range(0, count + REACH):
        window = _push(window, next_x[0].to(ACC))
        da = next_dy[0].to(ACC)
        p = position + i + AHEAD
        live = inside & (p < length)
        next_x = _push(next_x[1:], tl.load(x + p.to(tl.int64) * x_row, mask=live, other=0))
        next_dy = _push(next_dy[1:], tl.load(dy + p.to(tl.int64) * WIDTH, mask=live, other=0))
        z = tl.zeros([BLOCK], ACC)
        for lag in tl.static_range(W):
            z += taps[lag] * window[REACH - lag]
        a, slope = _activate(z, SILU)
        if UNIT:
            scale = tl.rsqrt(tl.sum(a * a, 0) + EPS)
            y = a * scale
            da = scale * (da - y * tl.sum(y * da, 0))
        dz = da * slope  # zero from the end of the sequence on, as dy is
        mine = tl.where(i < count, dz, 0)
        gradients = _push(gradients, dz)
        total = tl.zeros([BLOCK], ACC)
        updated = ()
        for lag in tl.static_range(W):
            updated = _push(updated, sums[lag] + mine * window[REACH - lag])
            total += taps[lag] * gradients[lag]
        sums = updated
        window = window[1:]
        gradients = gradients[1:]
        target = position + i - REACH
        kept = target - (length - REACH)  # where the new tail holds it
        total += tl.load(dnew_tail + kept * D + channel, mask=inside & (kept >= 0), other=0).to(ACC)
        if i >= REACH:
            rows = dx + target.to(tl.int64) * D
            tl.store(rows + channel, total.to(dx.dtype.element_ty), mask=inside)
        elif position == 0:
            tl.store(dtail + i * D + channel, total.to(dtail.dtype.element_ty), mask=inside)
    for lag in tl.static_range(W):
        tl.store(partial + (REACH - lag) * D + channel, sums[lag], mask=inside)


@triton.jit(do_not_specialize=["T", "sequences", "x_batch"])
def backward_kernel(
    x,
    x_batch,
    x_row,
    weight,
    tail,
    cu_seqlens,
    dy0,
    dy1,
    dy2,
    dnew_tail,
    dx,
    dtail,
    partial,
    T,
    sequences,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH0: tl.constexpr,
    STEP0: tl.constexpr,
    UNIT0: tl.constexpr,
    WIDTH1: tl.constexpr,
    STEP1: tl.constexpr,
    UNIT1: tl.constexpr,
    WIDTH2: tl.constexpr,
    STEP2: tl.constexpr,
    UNIT2: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
):
    """dx [tokens, D], dtail [N, W - 1, D] and the sums of dweight, partial [slots, W, D].

    Grid and inputs as of `forward_kernel`; gradients of outputs and new tails are contiguous.
    """
    slot = tl.program_id(0)
    n, start, length, position = locate_slot(slot, T, sequences, BLOCK_T, cu_seqlens)
    # A slot without tokens stores sums of zero and, if its sequence is empty, the tail's gradient.
    if cu_seqlens is not None:
        x += start * x_row
    else:
        x += n.to(tl.int64) * x_batch
    dx += start * D
    tail += n.to(tl.int64) * (W - 1) * D
    dtail += n.to(tl.int64) * (W - 1) * D
    dnew_tail += n.to(tl.int64) * (W - 1) * D
    partial += slot.to(tl.int64) * W * D
    tile = tl.program_id(1)
    TILES0: tl.constexpr = (WIDTH0 + STEP0 - 1) // STEP0
    TILES1: tl.constexpr = (WIDTH1 + STEP1 - 1) // STEP1
    if tile < TILES0:
        _backward_part(
            x, x_row, weight, tail, dy0 + start * WIDTH0, dnew_tail, dx, dtail, partial,
            n, start, length, position, tile,
            D, W, SILU, 0, WIDTH0, STEP0, UNIT0, BLOCK, BLOCK_T, ACC,
        )  # fmt: skip
    if WIDTH1 > 0:  # noqa: SIM102
        if (tile >= TILES0) & (tile < TILES0 + TILES1):
            _backward_part(
                x, x_row, weight, tail, dy1 + start * WIDTH1, dnew_tail, dx, dtail, partial,
                n, start, length, position, tile - TILES0,
                D, W, SILU, WIDTH0, WIDTH1, STEP1, UNIT1, BLOCK, BLOCK_T, ACC,
            )  # fmt: skip
    if WIDTH2 > 0:  # noqa: SIM102
        if tile >= TILES0 + TILES1:
            _backward_part(
                x, x_row, weight, tail, dy2 + start * WIDTH2, dnew_tail, dx, dtail, partial,
                n, start, length, position, tile - TILES0 - TILES1,
                D, W, SILU, WIDTH0 + WIDTH1, WIDTH2, STEP2, UNIT2, BLOCK, BLOCK_T, ACC,
            )  # fmt: skip


def _constants(inputs: Inputs) -> tuple[dict, int]:
    """What both kernels are compiled for, and the number of tiles."""
    longest = max((part.head_dim for part in inputs.parts if part.normalize), default=0)
    widest = longest or min(128, max(part.width for part in inputs.parts))
    block = max(16, triton.next_power_of_2(widest))
    constants = {
        "D": inputs.x.shape[2],
        "W": inputs.reach + 1,
        "SILU": inputs.silu,
        "BLOCK": block,
        "ACC": tl.float64 if inputs.compute_dtype == torch.float64 else tl.float32,
    }
    tiles = 0
    for i in range(3):
        width, step, unit = 0, 1, False
        if i < len(inputs.parts):
            part = inputs.parts[i]
            width, unit = part.width, part.normalize
            step = part.head_dim if unit else block
        constants |= {f"WIDTH{i}": width, f"STEP{i}": step, f"UNIT{i}": unit}
        tiles += triton.cdiv(width, step)
    return constants, tiles


def _slots(inputs: Inputs, block: int) -> int:
    """Slots of `block` tokens for sequences of whatever lengths."""
    B, T, _ = inputs.x.shape
    if inputs.cu_seqlens is None:
        return B * triton.cdiv(T, block)
    return T // block + inputs.sequences


def _three(tensors: list[Tensor]) -> list[Tensor]:
    """Pointers for all parts a kernel knows; those of no width are not touched."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def _rows(x: Tensor) -> Tensor:
    """x with channels side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def forward(inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """See `short_convolution`; the outputs come in parts."""
    _, T, _ = inputs.x.shape
    parts = [inputs.x.new_empty(shape) for shape in inputs.part_shapes()]
    tail = inputs.tail.contiguous()
    if inputs.x.numel() == 0:
        return parts, tail.clone()
    new_tail = torch.empty_like(tail)
    x = _rows(inputs.x)
    constants, tiles = _constants(inputs)
    block = constants["BLOCK"]
    tokens, warps = max(1, 2048 // block), 4
    if T == 1:
        tokens, warps = 1, max(1, block // 128)
    with torch.cuda.device_of(x):
        forward_kernel[(_slots(inputs, tokens), tiles)](
            x,
            x.stride(0),
            x.stride(1),
            inputs.weight.contiguous(),
            tail,
            boundaries_beside(inputs.cu_seqlens, inputs.x),
            *_three(parts),
            new_tail,
            T,
            inputs.sequences,
            **constants,
            BLOCK_T=tokens,
            num_warps=warps,
        )
    return parts, new_tail


def backward(
    inputs: Inputs, dparts: list[Tensor], dnew_tail: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and tail from those of the parts and of the new tails."""
    _, T, D = inputs.x.shape
    W = inputs.reach + 1
    dx = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    if inputs.x.numel() == 0:
        return dx, torch.zeros_like(inputs.weight), dnew_tail.clone()
    tail = inputs.tail.contiguous()
    dtail = torch.empty_like(tail)
    x = _rows(inputs.x)
    constants, tiles = _constants(inputs)
    slots = _slots(inputs, BACKWARD_TOKENS)
    partial = torch.empty(slots, W, D, dtype=inputs.compute_dtype, device=x.device)
    # Per channel a thread holds 4 W numbers: with 4 channels of width 4 and float32, 64 of them.
    lanes = 128 // (2 if W > 4 else 1) // (2 if x.dtype == torch.float64 else 1)
    with torch.cuda.device_of(x):
        backward_kernel[(slots, tiles)](
            x,
            x.stride(0),
            x.stride(1),
            inputs.weight.contiguous(),
            tail,
            boundaries_beside(inputs.cu_seqlens, inputs.x),
            *_three([dpart.contiguous() for dpart in dparts]),
            dnew_tail.contiguous(),
            dx,
            dtail,
            partial,
            T,
            inputs.sequences,
            **constants,
            BLOCK_T=BACKWARD_TOKENS,
            num_warps=max(1, constants["BLOCK"] // lanes),
        )
    dweight = partial.sum(0).t().unsqueeze(1)
    return dx, dweight.to(inputs.weight.dtype).contiguous(), dtail
