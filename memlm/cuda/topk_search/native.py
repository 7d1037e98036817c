"""C++ for the CPU, in float32: see native.cpp."""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.cuda import native
from memlm.cuda.topk_search.inputs import METRICS, Positions

SOURCE = Path(__file__).with_name("native.cpp")
MOST_KEYS = (1 << 32) - 1
PARALLEL = 1 << 24  # fewer multiplications than this take one thread
# Their numbers in native_keys.h are their places, here and in METRICS.
KEY_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def refusal(queries: Tensor, keys: Tensor) -> str | None:
    """Why these tensors are not for this implementation, or None."""
    if queries.device.type != "cpu":
        return f"the tensors are on {queries.device.type}, it runs on the CPU"
    if torch.float64 in (queries.dtype, keys.dtype):
        return "the tensors are float64, it computes in float32"
    if keys.shape[1] > MOST_KEYS:
        return f"it numbers keys with 32 bits, a store has {keys.shape[1]}"
    return native.refusal("topk_search", SOURCE)


def topk_search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str,
    valid: Tensor | None,
    positions: Positions | None,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.topk_search`; temporary memory is a few megabytes per thread at most."""
    batch, tokens, width = queries.shape
    stored = keys.shape[1]
    prepared = queries.float()
    if metric == "cosine":
        prepared = F.normalize(prepared, dim=-1)
    if metric == "l2":
        prepared = 2 * prepared
    key_positions, first, last = positions or (None, None, None)
    tensors = {
        "queries": prepared.contiguous(),
        "keys": _rows(keys),
        "scales": _rows(scales),
        "valid": _rows(valid),
        "positions": _rows(key_positions),
        "first": None if first is None else first.contiguous(),
        "last": None if last is None else last.contiguous(),
        "scores": torch.empty(batch, tokens, k),
        "indices": torch.empty(batch, tokens, k, dtype=torch.int64),
    }
    strides = {
        f"{name}_stride": 0 if tensors[name] is None else tensors[name].stride(0)
        for name in ("scales", "valid", "positions")
    }
    many = batch * tokens * stored * width >= PARALLEL
    problem = _Search(
        threads=torch.get_num_threads() if many else 1,
        batch=batch,
        tokens=tokens,
        stored=stored,
        width=width,
        k=k,
        metric=METRICS.index(metric),
        key_type=KEY_TYPES.index(keys.dtype),
        keys_stride=tensors["keys"].stride(0),
        key_stride=tensors["keys"].stride(1),
        **strides,
        **{name: 0 if x is None else x.data_ptr() for name, x in tensors.items()},
    )
    if not _library().memlm_search(ctypes.byref(problem)):
        raise MemoryError("topk_search: no memory for the candidates of a block of queries")
    return tensors["scores"], tensors["indices"]


def _rows(x: Tensor | None) -> Tensor | None:
    """A tensor whose last dimension lies side by side; a copy only where it does not."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


NUMBERS = ("threads", "batch", "tokens", "stored", "width", "k", "metric", "key_type")
STRIDES = ("keys_stride", "key_stride", "scales_stride", "valid_stride", "positions_stride")
POINTERS = (
    *("queries", "keys", "scales", "valid", "positions", "first", "last"),
    *("scores", "indices"),
)


class _Search(ctypes.Structure):
    """`Search` in native_keys.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*NUMBERS, *STRIDES)),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    return native.load(SOURCE)
