"""Triton kernels that gather a table's rows: bags of them, and their products with tokens.

A bag is a loop over tiles of P rows by `BLOCK` channels, `UNROLL` tiles of it requested before the
first is used: enough bytes in flight to keep the memory busy, whatever the width. The rows of a
tile are added up at the end. Where tokens are few, a program has more warps and fewer channels, so
that a bag is spread over the warps and a token over the card.

That the indices are rows of the table is not checked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlm.cuda.dispatch import multiprocessors

# Without a limit ptxas saves registers for full occupancy, by one load after another: each then
# waits for the one before. With it, it keeps all loads of a turn in flight (seen in its output).
REGISTERS = 128


@triton.jit
def push(values, value):
    """The tuple with one more value at its end."""
    return values + (value,)  # noqa: RUF005 (the compiler knows no stars)


@triton.jit
def weighted_sum(
    rows,
    weights,
    table,
    first,
    last,
    column,
    V: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sum of weights[r] table[rows[r]] over first <= r < last: float32, the channels `column`."""
    part = tl.arange(0, P)
    inside = (column < V)[None, :]
    total = tl.zeros([P, BLOCK], tl.float32)
    next_rows = ()
    next_weights = ()
    for i in tl.static_range(UNROLL):
        r = first + i * P + part
        next_rows = push(next_rows, tl.load(rows + r, mask=r < last, other=0))
        next_weights = push(next_weights, tl.load(weights + r, mask=r < last, other=0))
    for begin in range(first, last, UNROLL * P):
        tiles = ()
        for i in tl.static_range(UNROLL):
            live = (begin + i * P + part < last)[:, None] & inside
            source = table + next_rows[i].to(tl.int64)[:, None] * V + column[None, :]
            tiles = push(tiles, tl.load(source, mask=live, other=0))
        later_rows = ()
        later_weights = ()
        for i in tl.static_range(UNROLL):
            r = begin + (UNROLL + i) * P + part
            later_rows = push(later_rows, tl.load(rows + r, mask=r < last, other=0))
            later_weights = push(later_weights, tl.load(weights + r, mask=r < last, other=0))
        for i in tl.static_range(UNROLL):
            total += next_weights[i].to(tl.float32)[:, None] * tiles[i].to(tl.float32)
        next_rows = later_rows
        next_weights = later_weights
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["bag"])
def bag_kernel(
    indices,
    weights,
    values,
    gate,
    out,
    sums,
    bag,
    V: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """out [T, V], with a gate also sums [T, V]; one program per token and `BLOCK` channels."""
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    indices += token * bag
    weights += token * bag
    total = weighted_sum(indices, weights, values, 0, bag, column, V, P, BLOCK, UNROLL)
    inside = column < V
    target = token * V + column
    if gate is not None:
        tl.store(sums + target, total.to(sums.dtype.element_ty), mask=inside)
        z = tl.load(gate + target, mask=inside, other=0).to(tl.float32)
        total *= z * tl.sigmoid(z)
    tl.store(out + target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["bag"])
def dot_kernel(
    indices,
    x,
    values,
    out,
    bag,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """out [T, bag]; one program per token and `ROWS` of its rows, each in one warp."""
    token = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.load(indices + token * bag + b, mask=b < bag, other=0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = (b < bag)[:, None]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, V, UNROLL * BLOCK):
        tiles = ()
        factors = ()
        for i in tl.static_range(UNROLL):
            channel = begin + i * BLOCK + column
            inside = channel < V
            source = values + row[:, None] * V + channel[None, :]
            tiles = push(tiles, tl.load(source, mask=live & inside[None, :], other=0))
            factors = push(factors, tl.load(x + token * V + channel, mask=inside, other=0))
        for i in tl.static_range(UNROLL):
            total += tiles[i].to(tl.float32) * factors[i].to(tl.float32)[None, :]
    tl.store(out + token * bag + b, tl.sum(total, 1), mask=b < bag)


def bag(
    indices: Tensor, weights: Tensor, values: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.weighted_bag`; also the sums without the gate."""
    tokens, length = indices.shape
    V = values.shape[1]
    out = torch.empty(tokens, V, dtype=values.dtype, device=values.device)
    sums = out if gate is None else torch.empty_like(out)
    if out.numel() == 0:
        return out, sums
    constants = _bag_constants(tokens, V, values)
    with torch.cuda.device_of(values):
        bag_kernel[(tokens * triton.cdiv(V, constants["BLOCK"]),)](
            indices.contiguous(),
            weights.contiguous(),
            values.contiguous(),
            None if gate is None else gate.contiguous(),
            out,
            None if gate is None else sums,
            length,
            V,
            **constants,
        )
    return out, sums


def _bag_constants(tokens: int, V: int, values: Tensor) -> dict[str, int]:
    """Tiles of 1024 numbers; where they make too few programs narrow ones of 2048, so that a bag
    takes one turn or two."""
    covering = triton.next_power_of_2(V)
    # The widest that wastes least.
    widths = [block for block in (1024, 512, 256) if block < covering]
    widths = [covering, *widths] if covering <= 1024 else widths
    block = min(widths, key=lambda width: triton.cdiv(V, width) * width)
    size, unroll, warps = 1024, 16 // values.element_size(), 4
    if tokens * triton.cdiv(V, block) < 4 * multiprocessors(values.device):
        block, size, unroll, warps = min(128, covering), 2048, 4, 8
    # A turn of 128 rows or more would be longer than most bags.
    sizes = {"BLOCK": block, "P": min(32, size // block), "UNROLL": unroll}
    return sizes | {"num_warps": warps, "maxnreg": REGISTERS}


def dot(indices: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """See `memlm.cuda.gathered_dot`."""
    tokens, length = indices.shape
    V = values.shape[1]
    out = torch.empty(tokens, length, dtype=torch.float32, device=values.device)
    if out.numel() == 0:
        return out
    # A row is one warp's, 16 bytes per thread.
    block = min(triton.next_power_of_2(V), 512 // values.element_size())
    rows = min(64, 8192 // values.element_size() // block)
    with torch.cuda.device_of(values):
        dot_kernel[(tokens, triton.cdiv(length, rows))](
            indices.contiguous(),
            x.contiguous(),
            values.contiguous(),
            out,
            length,
            V,
            rows,
            block,
            UNROLL=min(2, triton.cdiv(V, block)),
            num_warps=4,
            maxnreg=REGISTERS,
        )
    return out
