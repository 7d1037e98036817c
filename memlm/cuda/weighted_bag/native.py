"""C++ for the CPU, in float32: see native.cpp."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from memlm.cuda import native
from memlm.cuda.weighted_bag.reads import Reads
from memlm.cuda.weighted_bag.rules import LazyAdam, Rule

SOURCE = Path(__file__).with_name("native.cpp")
PARALLEL = 1 << 18  # fewer multiplications than this take one thread


def refusal(values: Tensor) -> str | None:
    """Why a table like this one is not for this implementation, or None."""
    if values.device.type != "cpu":
        return f"the table is on {values.device.type}, it runs on the CPU"
    if values.dtype != torch.float32:
        return f"the table is {str(values.dtype).removeprefix('torch.')}, it computes in float32"
    if len(values) >= 2**31:
        return f"the table has {len(values)} rows, it numbers them with 31 bits"
    return native.refusal("weighted_bag", SOURCE)


def bag(
    indices: Tensor, weights: Tensor, values: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.weighted_bag`; also the sums without the gate."""
    out = values.new_empty(len(indices), values.shape[1])
    sums = out if gate is None else torch.empty_like(out)
    _run_bag("memlm_bag", indices, weights, values, gate, out, None if gate is None else sums)
    return out, sums


def dot(indices: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """See `memlm.cuda.gathered_dot`."""
    out = values.new_empty(indices.shape)
    _run_bag("memlm_dot", indices, None, values, x, out, None)
    return out


def row_gradients(reads: Sequence[Reads], num_rows: int) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.weighted_bag.row_gradients`."""
    width = reads[0].grad.shape[1]
    most = min(num_rows, sum(part.indices.numel() for part in reads))
    rows, gradient = torch.empty(most, dtype=torch.int64), torch.empty(most, width)
    found = _run_rows("memlm_row_gradients", reads, num_rows, rows=rows, gradient=gradient)
    return rows[:found], gradient[:found]


def dense_gradient(reads: Sequence[Reads], num_rows: int) -> Tensor:
    """The gradient [num_rows, V] of the whole table."""
    gradient = torch.zeros(num_rows, reads[0].grad.shape[1])
    _run_rows("memlm_put_rows", reads, num_rows, gradient=gradient)
    return gradient


def update_rows(
    reads: Sequence[Reads], values: Tensor, state: dict[str, Tensor], rule: Rule
) -> None:
    """See `memlm.cuda.weighted_bag.update_rows`."""
    numbers = {
        "scale": rule.scale,
        "decay": 1 - rule.learning_rate * rule.weight_decay,
        "step_size": rule.learning_rate,
        "eps": rule.eps,
    }
    if isinstance(rule, LazyAdam):
        numbers |= {"step_size": rule.step_size, "second_bias": rule.second_bias}
        numbers |= dict(zip(("beta1", "beta2"), rule.betas, strict=True))
        tensors = {"first": state["exp_avg"], "second": state["exp_avg_sq"]}
        function = "memlm_lazy_adam"
    else:
        tensors, function = {"first": state["square_sum"]}, "memlm_rowwise_adagrad"
    _run_rows(function, reads, len(values), values=values, **tensors, **numbers)


class _Bag(ctypes.Structure):
    """`Bag` in native_bag.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "tokens", "bag", "rows", "width")),
        *((name, ctypes.c_void_p) for name in ("indices", "weights", "values", "x", "out", "sums")),
    )


class _Reads(ctypes.Structure):
    """`Reads` in native_rows.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "bag")),
        *((name, ctypes.c_void_p) for name in ("indices", "weights", "grads")),
    )


ROW_TENSORS = ("rows", "gradient", "values", "first", "second")
ROW_NUMBERS = ("scale", "decay", "step_size", "beta1", "beta2", "second_bias", "eps")


class _Rows(ctypes.Structure):
    """`Rows` in native_rows.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "lists", "num_rows", "width", "found")),
        ("reads", ctypes.POINTER(_Reads)),
        *((name, ctypes.c_void_p) for name in ROW_TENSORS),
        *((name, ctypes.c_float) for name in ROW_NUMBERS),
    )


def _run_bag(
    function: str,
    indices: Tensor,
    weights: Tensor | None,
    values: Tensor,
    x: Tensor | None,
    out: Tensor,
    sums: Tensor | None,
) -> None:
    indices, values = indices.int().contiguous(), values.contiguous()
    weights, x = (None if t is None else t.float().contiguous() for t in (weights, x))
    sizes = (*indices.shape, *values.shape)
    tensors = (indices, weights, values, x, out, sums)
    problem = _Bag(_threads(indices, values.shape[1]), *sizes, *map(_pointer, tensors))
    _check(getattr(_library(), function)(ctypes.byref(problem)), len(values))


def _run_rows(function: str, reads: Sequence[Reads], num_rows: int, **given: Tensor | float) -> int:
    """Call the library with `given` under the names of `_Rows`; the number of rows read."""
    width = reads[0].grad.shape[1]
    # What the pointers point to has to live until the call is over.
    parts = [
        (
            part.indices.int().contiguous(),
            part.weights.float().contiguous(),
            part.grad.float().contiguous(),
        )
        for part in reads
    ]
    lists = (_Reads * len(parts))(*(_Reads(*p[0].shape, *map(_pointer, p)) for p in parts))
    threads = max(_threads(part[0], width) for part in parts)
    problem = _Rows(threads=threads, lists=len(parts), num_rows=num_rows, width=width, reads=lists)
    for name, value in given.items():
        setattr(problem, name, _pointer(value) if name in ROW_TENSORS else value)
    _check(getattr(_library(), function)(ctypes.byref(problem)), num_rows)
    return problem.found


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(indices: Tensor, width: int) -> int:
    return torch.get_num_threads() if indices.numel() * width >= PARALLEL else 1


def _check(outcome: int, rows: int) -> None:
    if outcome == 0:
        raise MemoryError("weighted_bag: no memory for the reads of a table")
    if outcome < 0:
        raise IndexError(f"weighted_bag: an index is not a row of the table of {rows} rows")


@functools.cache
def _library() -> ctypes.CDLL:
    return native.load(SOURCE)
