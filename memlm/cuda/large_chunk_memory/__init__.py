"""A SwiGLU network per head whose weights take one step per large chunk of tokens (LaCT).

Zhang et al., "Test-Time Training Done Right", arXiv 2505.23884, per head::

    M(x)  = (silu(x W1) * (x W3)) W2
    g_j   = sum over the chunk of  s_tj d<M(k_t), v_t> / dWj     at the chunk's first weights
    S_j  <- mean(eta) S_j + g_j                                  momentum; without it S_j = g_j
    Wj   <- rescale(Wj + S_j),  or  rescale(Wj + orthogonal(S_j))

`rescale` gives every output channel (a column) the norm it had before, hence that of the initial
weights; `orthogonal` is five Newton-Schulz steps of Muon. They magnify the smallest singular values
up to 485 times, rounding errors included: in float32, streams cut at different places agree to
about 1e-4 with it and 1e-6 without. A token reads the weights its chunk began with, so what lies in
its own chunk reaches it by other means (attention over at least a chunk).
"""

import torch
from torch import Tensor

from memlm.cuda.boundaries import check_boundaries
from memlm.cuda.dispatch import choose
from memlm.cuda.large_chunk_memory.eager import large_chunk_memory_eager
from memlm.cuda.large_chunk_memory.reference import large_chunk_memory_reference
from memlm.cuda.large_chunk_memory.state import LargeChunkMemoryState

__all__ = ["LargeChunkMemoryState", "large_chunk_memory"]

IMPLEMENTATIONS = {"reference": large_chunk_memory_reference, "eager": large_chunk_memory_eager}


def large_chunk_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    steps: Tensor,
    eta: Tensor | None,
    state: LargeChunkMemoryState,
    chunk_size: int,
    orthogonalise: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, LargeChunkMemoryState]:
    """Run the memory over a batch of sequences.

    Products of 16-bit inputs are of that type; weights, momentum and sums of gradients stay
    float32.

    Args:
        q, k, v: ``[B, T, H, D]`` of one dtype.
        steps: step sizes of W1, W3 and W2, at least 0, ``[B, T, H, 3]``.
        eta: momentum in [0, 1], ``[B, T, H]``; None: without momentum.
        state: of the N sequences.
        chunk_size: tokens per step of the weights, counted from each sequence's start.
        orthogonalise: whether the step is orthogonalised.
        cu_seqlens: int ``[N + 1]``, boundaries of the sequences packed along T (then ``B == 1``);
            empty sequences are allowed. None: one sequence per row, ``N == B``.

    Returns:
        o ``[B, T, H, D]`` in v's dtype and the final state (float32; float64 if v is float64).
        Gradients flow through both, and through the inner steps.

    Raises:
        ValueError: shapes that do not fit together, or a chunk_size below 1.
    """
    B, T, H, D = q.shape
    _check(q, k, v, steps, eta, state, chunk_size, cu_seqlens)
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    if cu_seqlens is None:
        lengths = torch.full((B,), T, dtype=torch.int64, device=q.device)
    else:
        lengths = cu_seqlens.diff().to(q.device, torch.int64)
    run = choose("large_chunk_memory", IMPLEMENTATIONS, q.device)
    with torch.autocast(q.device.type, enabled=False):
        o, state = run(
            *(x.reshape(B * T, H, D) for x in (q, k, v)),
            steps.to(wide).reshape(B * T, H, 3),
            None if eta is None else eta.to(wide).reshape(B * T, H),
            state.map(lambda x: x.to(wide)),
            chunk_size,
            orthogonalise,
            lengths,
        )
    return o.view(B, T, H, D).to(v.dtype), state


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    steps: Tensor,
    eta: Tensor | None,
    state: LargeChunkMemoryState,
    chunk_size: int,
    cu_seqlens: Tensor | None,
) -> None:
    B, T, H, D = q.shape
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: expected at least 1")
    for name, x, shape in (
        ("k", k, q.shape),
        ("v", v, q.shape),
        ("steps", steps, (B, T, H, 3)),
        ("eta", eta, (B, T, H)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} is {tuple(x.shape)}: expected {tuple(shape)}")
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, B, T)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    hidden = state.weights[1].shape[-2]
    expected = [(N, H, D, 2 * hidden), (N, H, hidden, D)]
    parts = ["weights", "pending"] + ([] if eta is None else ["momentum"])
    for name in parts:
        found = [tuple(w.shape) for w in getattr(state, name)]
        if found != expected:
            raise ValueError(f"the state's {name} are {found}: expected {expected}")
