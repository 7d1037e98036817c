"""C++ for the CPU, in float32: see native.cpp."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from memlm.cuda import native

SOURCE = Path(__file__).with_name("native.cpp")
PARALLEL = 1 << 18  # fewer scores than this take one thread


def refusal(query: Tensor) -> str | None:
    """Why these queries are not for this implementation, or None."""
    if query.device.type != "cpu":
        return f"the tensors are on {query.device.type}, it runs on the CPU"
    if query.dtype == torch.float64:
        return "the queries are float64, it computes in float32"
    return native.refusal("product_key_select", SOURCE)


def forward(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.product_key_select`."""
    indices = torch.empty(*query.shape[:2], k, dtype=torch.int32)
    weights = torch.empty(*query.shape[:2], k)
    given = {"query": query.float().contiguous(), "sub_keys": sub_keys.float().contiguous()}
    _run("memlm_forward", k, given | {"indices": indices, "weights": weights}, _Select)
    return indices, weights


def backward(
    query: Tensor, sub_keys: Tensor, indices: Tensor, dscores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of query and sub_keys."""
    given = {"query": query.float().contiguous(), "sub_keys": sub_keys.float().contiguous()}
    given |= {"indices": indices.contiguous(), "dscores": dscores.float().contiguous()}
    found = [torch.empty_like(given[name]) for name in ("query", "sub_keys")]
    given |= dict(zip(("dquery", "dkeys"), found, strict=True))
    _run("memlm_backward", indices.shape[2], given, _Gradient)
    return found[0], found[1]


SIZES = ("threads", "tokens", "heads", "n", "half", "k")


class _Select(ctypes.Structure):
    """`Select` in native_forward.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_void_p) for name in ("query", "sub_keys", "indices", "weights")),
    )


class _Gradient(ctypes.Structure):
    """`Gradient` in native_backward.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in SIZES),
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "sub_keys", "indices", "dscores", "dquery", "dkeys")
        ),
    )


def _run(function: str, k: int, tensors: dict[str, Tensor], kind: type[ctypes.Structure]) -> None:
    """Call the library on contiguous tensors, by their names in `kind`."""
    tokens, heads, _, half = tensors["query"].shape
    n = tensors["sub_keys"].shape[2]
    threads = torch.get_num_threads() if tokens * heads * n >= PARALLEL else 1
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    problem = kind(threads, tokens, heads, n, half, k, **pointers)
    if not getattr(_library(), function)(ctypes.byref(problem)):
        raise MemoryError("product_key_select: no memory for the scores of a block of tokens")


@functools.cache
def _library() -> ctypes.CDLL:
    return native.load(SOURCE)
