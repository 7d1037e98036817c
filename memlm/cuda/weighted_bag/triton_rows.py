"""Triton kernels that sum the gradient of every row that was read, and update rows by it.

Reads are sorted by row, stably, so that a row's reads are added in the order in which they were
made: no atomics, the same bits every time. A row with at most `piece` reads is summed by one
program, which at once writes the gradient or updates the row. What a row with more reads has in a
window of `piece` sorted reads is a partial sum; a window meets two such rows at most, the one that
holds its first read and the one that holds its last. The program of the window in which such a row
begins adds up its partial sums.

How many rows were read stays on the device: there are programs for as many as there can be.
"""

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlm.cuda.weighted_bag.reads import Reads, join
from memlm.cuda.weighted_bag.rules import LazyAdam, Rule
from memlm.cuda.weighted_bag.triton_bag import REGISTERS, weighted_sum


@triton.jit(do_not_specialize=["count"])
def starts_kernel(numbers, starts, count, BLOCK: tl.constexpr):
    """starts[u]: the first of the sorted reads of row number u, and their count behind the last.

    numbers [count]: of the row of each sorted read, from 1 on.
    """
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = r < count
    number = tl.load(numbers + r, mask=live, other=0)
    before = tl.load(numbers + r - 1, mask=live & (r > 0), other=0)
    tl.store(starts + number - 1, r, mask=live & (number != before))
    tl.store(starts + number, r + 1, mask=live & (r == count - 1))


@triton.jit
def _finish(
    g,
    u,
    row,
    gradient,
    values,
    first_state,
    second_state,
    scale,
    decay,
    rate,
    first_rest,
    second_keep,
    second_rest,
    second_bias,
    eps,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTION: tl.constexpr,
):
    """Write the gradient g of row number u, or update the row by it."""
    column = tl.arange(0, BLOCK)
    inside = column < V
    row = row.to(tl.int64)
    if ACTION == "compact":
        tl.store(gradient + u.to(tl.int64) * V + column, g, mask=inside)
    elif ACTION == "dense":
        tl.store(gradient + row * V + column, g, mask=inside)
    else:
        g *= scale
        target = row * V + column
        w = tl.load(values + target, mask=inside, other=0).to(tl.float32) * decay
        if ACTION == "lazy_adam":
            m = tl.load(first_state + target, mask=inside, other=0)
            v = tl.load(second_state + target, mask=inside, other=0)
            m += (g - m) * first_rest
            v = v * second_keep + g * g * second_rest
            tl.store(first_state + target, m, mask=inside)
            tl.store(second_state + target, v, mask=inside)
            w -= rate * m / (tl.sqrt(v) / second_bias + eps)
        else:
            # Channels outside the row are zero in g.
            total = tl.load(first_state + row) + tl.sum(g * g, 0) / V
            tl.store(first_state + row, total)
            w -= rate * g / (tl.sqrt(total) + eps)
        tl.store(values + target, w.to(values.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "piece"])
def rows_kernel(
    numbers,
    starts,
    rows,
    sources,
    weights,
    grads,
    gradient,
    values,
    first_state,
    second_state,
    count,
    piece,
    scale,
    decay,
    rate,
    first_rest,
    second_keep,
    second_rest,
    second_bias,
    eps,
    V: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    ACTION: tl.constexpr,
):
    """Rows with `piece` reads or fewer; one program for each row that there may be."""
    u = tl.program_id(0)
    if u >= tl.load(numbers + count - 1):
        return
    first = tl.load(starts + u)
    last = tl.load(starts + u + 1)
    if last - first > piece:
        return
    column = tl.arange(0, BLOCK)
    g = weighted_sum(sources, weights, grads, first, last, column, V, P, BLOCK, UNROLL)
    _finish(
        g, u, tl.load(rows + first), gradient, values, first_state, second_state,
        scale, decay, rate, first_rest, second_keep, second_rest, second_bias, eps,
        V, BLOCK, ACTION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "piece"])
def pieces_kernel(
    numbers,
    starts,
    sources,
    weights,
    grads,
    partial,
    count,
    piece,
    V: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """partial [windows, 2, V] of rows with more reads: of those of the first and of the last read.

    One program per partial sum; those that belong to no such row are not written.
    """
    slot = tl.program_id(0)
    begin = (slot // 2) * piece
    end = tl.minimum(begin + piece, count)
    u = tl.load(numbers + begin) - 1
    if slot % 2 == 1:
        of_first = u
        u = tl.load(numbers + end - 1) - 1
        if u == of_first:
            return
    first = tl.load(starts + u)
    last = tl.load(starts + u + 1)
    if last - first <= piece:
        return
    first = tl.maximum(first, begin)
    last = tl.minimum(last, end)
    column = tl.arange(0, BLOCK)
    total = weighted_sum(sources, weights, grads, first, last, column, V, P, BLOCK, UNROLL)
    tl.store(partial + slot.to(tl.int64) * V + column, total, mask=column < V)


@triton.jit(do_not_specialize=["count", "piece"])
def hot_rows_kernel(
    numbers,
    starts,
    rows,
    partial,
    gradient,
    values,
    first_state,
    second_state,
    count,
    piece,
    scale,
    decay,
    rate,
    first_rest,
    second_keep,
    second_rest,
    second_bias,
    eps,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    ACTION: tl.constexpr,
):
    """Rows with more than `piece` reads; the program of the window in which one begins."""
    window = tl.program_id(0)
    begin = window * piece
    end = tl.minimum(begin + piece, count)
    u = tl.load(numbers + end - 1) - 1
    first = tl.load(starts + u)
    last = tl.load(starts + u + 1)
    if (first < begin) | (last - first <= piece):
        return
    column = tl.arange(0, BLOCK)
    inside = column < V
    slot = 2 * window + (first > begin).to(tl.int32)
    g = tl.load(partial + slot.to(tl.int64) * V + column, mask=inside, other=0)
    windows = (last + piece - 1) // piece
    for later in range(window + 1, windows, AHEAD):
        part = later + tl.arange(0, AHEAD)
        source = partial + (2 * part).to(tl.int64)[:, None] * V + column[None, :]
        live = (part < windows)[:, None] & inside[None, :]
        g += tl.sum(tl.load(source, mask=live, other=0), 0)
    _finish(
        g, u, tl.load(rows + first), gradient, values, first_state, second_state,
        scale, decay, rate, first_rest, second_keep, second_rest, second_bias, eps,
        V, BLOCK, ACTION,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SortedReads:
    """Reads by row; those of row number u are the sorted ones from starts[u] to starts[u + 1].

    Attributes:
        numbers: int32 [R], of the row of each read, from 1 on; the last one counts the rows.
        starts: int32 [most + 1].
        most: how many rows there can be.
        rows: int32 [R], ascending.
        sources: int64 [R], rows of `grads`.
        weights: [R].
        grads: [S, V].
    """

    numbers: Tensor
    starts: Tensor
    most: int
    rows: Tensor
    sources: Tensor
    weights: Tensor
    grads: Tensor

    @property
    def piece(self) -> int:
        """Reads that one program sums: with the longer ones, partial sums need as much memory for
        four times as many reads."""
        return 64 if len(self.rows) <= 1 << 20 else 256


def sort_reads(reads: Sequence[Reads], num_rows: int) -> SortedReads:
    """Sort reads, at least one, by row, in one row by the order in which they were made."""
    rows, sources, weights, grads = join(reads)
    rows, order = rows.int().sort(stable=True)
    differs = torch.ones(rows.shape, dtype=torch.bool, device=rows.device)
    differs[1:] = rows[1:] != rows[:-1]
    numbers = differs.cumsum(0, dtype=torch.int32)
    most = min(len(rows), num_rows)
    starts = torch.empty(most + 1, dtype=torch.int32, device=rows.device)
    block = 1024
    with torch.cuda.device_of(rows):
        starts_kernel[(triton.cdiv(len(rows), block),)](numbers, starts, len(rows), block)
    grads = grads.contiguous()
    return SortedReads(numbers, starts, most, rows, sources[order], weights[order], grads)


def run(
    found: SortedReads,
    action: str,
    gradient: Tensor | None = None,
    values: Tensor | None = None,
    state: Sequence[Tensor] = (),
    rule: Rule | None = None,
) -> None:
    """Write the gradient ("compact" or "dense") or update ("lazy_adam", "rowwise_adagrad")."""
    count, V = len(found.rows), found.grads.shape[1]
    block = triton.next_power_of_2(V)
    warps = min(16, max(1, block // 256))
    numbers_of_a_thread = max(8, block // (32 * warps))
    sizes = {"V": V, "BLOCK": block, "num_warps": warps, "maxnreg": REGISTERS}
    tiles = {"P": max(1, 256 * warps // block), "UNROLL": 32 // numbers_of_a_thread}
    target = (gradient, values, *(*state, None, None)[:2])
    windows = triton.cdiv(count, found.piece)
    partial = torch.empty(windows, 2, V, dtype=torch.float32, device=found.rows.device)
    with torch.cuda.device_of(found.rows):
        rows_kernel[(found.most,)](
            found.numbers,
            found.starts,
            found.rows,
            found.sources,
            found.weights,
            found.grads,
            *target,
            count,
            found.piece,
            *_numbers(rule),
            **sizes,
            **tiles,
            ACTION=action,
        )
        pieces_kernel[(2 * windows,)](
            found.numbers,
            found.starts,
            found.sources,
            found.weights,
            found.grads,
            partial,
            count,
            found.piece,
            **sizes,
            **tiles,
        )
        hot_rows_kernel[(windows,)](
            found.numbers,
            found.starts,
            found.rows,
            partial,
            *target,
            count,
            found.piece,
            *_numbers(rule),
            **sizes,
            AHEAD=4 * tiles["P"] if block <= 4096 else 1,
            ACTION=action,
        )


def _numbers(rule: Rule | None) -> tuple[float, ...]:
    """Of a rule, as the kernels take them: scale, decay, rate, ... eps."""
    if rule is None:
        return (1.0, 1.0, *[0.0] * 6)
    decay = 1 - rule.learning_rate * rule.weight_decay
    if isinstance(rule, LazyAdam):
        one, two = rule.betas
        moments = (1 - one, two, 1 - two, rule.second_bias)
        return (rule.scale, decay, rule.step_size, *moments, rule.eps)
    return (rule.scale, decay, rule.learning_rate, *[0.0] * 4, rule.eps)


def row_gradients(reads: Sequence[Reads], num_rows: int) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.weighted_bag.row_gradients`; waits for the device to know their number."""
    grad = reads[0].grad
    if _nothing(reads):
        rows = torch.empty(0, dtype=torch.int64, device=grad.device)
        return rows, torch.empty(0, grad.shape[1], dtype=torch.float32, device=grad.device)
    found = sort_reads(reads, num_rows)
    found = dataclasses.replace(found, most=int(found.numbers[-1]))
    gradient = torch.empty(found.most, grad.shape[1], dtype=torch.float32, device=grad.device)
    run(found, "compact", gradient)
    return found.rows[found.starts[: found.most].long()].long(), gradient


def dense_gradient(reads: Sequence[Reads], num_rows: int) -> Tensor:
    """The gradient [num_rows, V] of the whole table."""
    grad = reads[0].grad
    gradient = torch.zeros(num_rows, grad.shape[1], dtype=torch.float32, device=grad.device)
    if not _nothing(reads):
        run(sort_reads(reads, num_rows), "dense", gradient)
    return gradient


def update_rows(
    reads: Sequence[Reads], values: Tensor, state: dict[str, Tensor], rule: Rule
) -> None:
    """See `memlm.cuda.weighted_bag.update_rows`."""
    if _nothing(reads):
        return
    found = sort_reads(reads, len(values))
    if isinstance(rule, LazyAdam):
        moments = (state["exp_avg"], state["exp_avg_sq"])
        run(found, "lazy_adam", None, values, moments, rule)
    else:
        run(found, "rowwise_adagrad", None, values, (state["square_sum"],), rule)


def _nothing(reads: Sequence[Reads]) -> bool:
    return all(part.indices.numel() == 0 for part in reads) or reads[0].grad.shape[1] == 0
