"""The kNN cache's search and attention of one token per row in C++: see native.cpp."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from memlm.cuda import native
from memlm.cuda.dispatch import may_be_chosen

SOURCE = Path(__file__).with_name("native.cpp")
PARALLEL = 1 << 22  # fewer numbers to be read than this take one thread
METRICS = ("dot", "cosine", "l2")  # as in native.cpp


def refusal(*tensors: Tensor) -> str | None:
    """Why `find` or `attend` cannot take floating point tensors, or None."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return "it has no gradients and is not traced"
    if any(x.device.type != "cpu" for x in tensors):
        return "the tensors are not all on the CPU"
    if any(x.dtype != torch.float32 for x in tensors) or type(tensors[0]) is not Tensor:
        return "it computes in float32"
    if any(not x.is_contiguous() for x in tensors):
        return "it takes contiguous tensors"
    if not may_be_chosen("knn_step", "native"):
        return "another implementation is forced"
    return native.refusal("knn_step", SOURCE)


class _Find(ctypes.Structure):
    """`Find` in native.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "B", "capacity", "live", "width")),
        *((name, ctypes.c_int64) for name in ("segment", "metric", "top_k", "neighborhood")),
        ("grid", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("z", "keys", "z_norms", "key_norms")),
        *((name, ctypes.c_void_p) for name in ("positions", "written", "position")),
        *((name, ctypes.c_void_p) for name in ("pending", "pending_positions")),
        *((name, ctypes.c_void_p) for name in ("new_pending", "new_positions")),
        *((name, ctypes.c_void_p) for name in ("entries", "similarity", "exists")),
    )


class _Attend(ctypes.Structure):
    """`Attend` in native.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "B", "H", "D", "width")),
        *((name, ctypes.c_int64) for name in ("count", "neighborhood", "reads")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("q", "k_weight", "v_weight")),
        *((name, ctypes.c_void_p) for name in ("log_temperature", "sink", "bias")),
        *((name, ctypes.c_void_p) for name in ("entries", "similarity", "exists", "out")),
    )


def find(
    z: Tensor,
    keys: Tensor,
    positions: Tensor,
    written: Tensor,
    pending: Tensor,
    pending_positions: Tensor,
    position_ids: Tensor,
    *,
    metric: str,
    top_k: int,
    neighborhood: int,
    grid: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """What one token per row finds in its ring, and what waits after it.

    Args:
        z: [B, 1, r], float32, the states of the tokens.
        keys: [B, capacity, r], the ring.
        positions: int64 [B, capacity].
        written: int64 [B], entries since the row's last reset.
        pending: [B, segment, r], states of the unfinished segment.
        pending_positions: int64 [B, segment], -1 = free.
        position_ids: int64 [B, 1].
        metric: "dot", "cosine" or "l2".
        top_k: hits per token.
        neighborhood: consecutive entries around each hit.
        grid: steps per unit of a state in the search.

    Returns:
        Entries [B, 1, K, r], similarity [B, 1, K] and existence bool [B, 1, K] of
        K = top_k * neighborhood entries, and the new `pending` and `pending_positions`; None where
        a segment completes or what waits is not that of the position.
    """
    B, capacity, r = keys.shape
    live = max(1, min(max(written.tolist()), capacity))
    norms = (None, None)
    if metric == "cosine":
        # Not in C++: rounded otherwise, a state would now and then lie elsewhere on the grid.
        norms = (torch.linalg.vector_norm(z, dim=-1), _norms(keys[:, :live]))
    given = [x.contiguous() for x in (positions, written, position_ids)]
    pending_positions = pending_positions.contiguous()
    shape = (B, 1, top_k * neighborhood)
    entries, similarity = z.new_empty(*shape, r), z.new_empty(shape)
    exists = z.new_empty(shape, dtype=torch.bool)
    after = torch.empty_like(pending), torch.empty_like(pending_positions)
    problem = _Find(
        torch.get_num_threads() if B * live * r >= PARALLEL else 1,
        *(B, capacity, live, r, pending.shape[1]),
        *(METRICS.index(metric), top_k, neighborhood, grid),
        *(z.data_ptr(), keys.data_ptr()),
        *(None if x is None else x.data_ptr() for x in norms),
        *(x.data_ptr() for x in given),
        *(pending.data_ptr(), pending_positions.data_ptr()),
        *(x.data_ptr() for x in (*after, entries, similarity, exists)),
    )
    done = _library().memlm_find(ctypes.byref(problem))
    if done == 0:
        raise MemoryError("knn_step: no memory for the hits of a query")
    return None if done < 0 else (entries, similarity, exists, *after)


def _norms(keys: Tensor) -> Tensor:
    return torch.linalg.vector_norm(keys, dim=-1).contiguous()


def attend(
    q: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    log_temperature: Tensor,
    sink: Tensor,
    place_bias: Tensor,
    entries: Tensor,
    similarity: Tensor,
    exists: Tensor,
    *,
    neighborhood: int,
    reads: int,
) -> Tensor:
    """Attention of one token per row to what it found, [B, 1, H * D].

    Args:
        q: [B, 1, H * D], float32.
        k_weight, v_weight: [H * D, r].
        log_temperature, sink: [H].
        place_bias: [H, K / reads * neighborhood].
        entries: [B, 1, K, r].
        similarity: [B, 1, K].
        exists: bool [B, 1, K].
        neighborhood: entries around each hit.
        reads: entries that one token finds.
    """
    B, _, K, r = entries.shape
    H = len(sink)
    D = q.shape[-1] // H
    out = torch.empty_like(q)
    tensors = (q, k_weight, v_weight, log_temperature, sink, place_bias)
    found = (entries, similarity, exists.contiguous())
    problem = _Attend(
        torch.get_num_threads() if B * H * (K + D) * r >= PARALLEL else 1,
        *(B, H, D, r, K, neighborhood, reads, D**-0.5),
        *(x.data_ptr() for x in (*tensors, *found, out)),
    )
    if not _library().memlm_attend(ctypes.byref(problem)):
        raise MemoryError("knn_step: no memory for the logits of a query")
    return out


@functools.cache
def _library() -> ctypes.CDLL:
    return native.load(SOURCE)
