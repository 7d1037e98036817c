"""Attention of one query per row in C++, as in decoding on a CPU: see native.cpp."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from memlm.cuda import native
from memlm.cuda.dispatch import may_be_chosen

SOURCE = Path(__file__).with_name("native.cpp")
PARALLEL = 1 << 22  # fewer numbers in the keys than this take one thread


def refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why `step` cannot take these, or None."""
    if query.device.type != "cpu":
        return f"the tensors are on {query.device.type}, it runs on the CPU"
    if any(x.dtype != torch.float32 or type(x) is not Tensor for x in (query, key, value)):
        return "it computes in float32"
    if not may_be_chosen("attention_step", "native"):
        return "another implementation is forced"
    return native.refusal("attention_step", SOURCE)


class _Step(ctypes.Structure):
    """`Step` in native.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "B", "H", "HK", "D", "turned")),
        *((name, ctypes.c_int64) for name in ("capacity", "first", "last")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cos", "sin", "position")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "positions", "out")),
    )


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    position_ids: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    first: int,
    last: int,
    scale: float,
) -> Tensor:
    """Turn query and key, write the key, its value and its position, and attend.

    Args:
        query: [B, 1, H, D], float32.
        key, value: [B, 1, HK, D]; H is a multiple of HK, and neighbours share a key.
        angles: cosine and sine [B, 1, turned channels]; None = nothing is turned.
        position_ids: int64 [B, 1].
        keys, values: [B, HK, capacity, D], contiguous; written at `last`.
        positions: int64 [B, capacity], contiguous; written at `last`.
        first, last: the slots that are seen, both included.
        scale: of the logits.

    Returns:
        The heads side by side, [B, 1, H * D].
    """
    B, _, H, D = query.shape
    HK, capacity = keys.shape[1:3]
    given = [x.contiguous() for x in (query, key, value, *(angles or ()), position_ids)]
    pointers = [x.data_ptr() for x in given]
    if angles is None:
        pointers[3:3] = (None, None)
    out = query.new_empty(B, 1, H * D)
    large = B * HK * D * (last + 1 - first) >= PARALLEL
    problem = _Step(
        torch.get_num_threads() if large else 1,
        *(B, H, HK, D, 0 if angles is None else angles[0].shape[-1]),
        *(capacity, first, last, scale),
        *pointers,
        *(keys.data_ptr(), values.data_ptr(), positions.data_ptr(), out.data_ptr()),
    )
    if not _library().memlm_step(ctypes.byref(problem)):
        raise MemoryError("attention_step: no memory for the logits of a query")
    return out


@functools.cache
def _library() -> ctypes.CDLL:
    return native.load(SOURCE)
