"""Titans' neural memory: a small network per head, trained on the tokens as they pass.

Behrouz et al., "Titans: Learning to Memorize at Test Time", arXiv 2501.00663. Per head, with
weights ``M``, momentum ``S`` and the loss ``l(M; k, v) = ||M(k) - v||^2`` (sum over channels)::

    S_t = eta_t S_{t-1} - theta_t grad l(anchor; k_t, v_t)
    M_t = (1 - alpha_t) M_{t-1} + S_t
    o_t = M_t(q_t)

The anchor is the memory at the start of the current chunk of `chunk_size` tokens: the chunk size
is part of the function, not a matter of speed. Depth 1 is ``M(x) = x W``, depth 2
``M(x) = x + LN(gelu(x W1) W2)`` with a layer norm without weights.
"""

import torch
from torch import Tensor

from memlm.cuda.dispatch import choose
from memlm.cuda.neural_memory.eager import neural_memory_eager
from memlm.cuda.neural_memory.reference import neural_memory_reference
from memlm.cuda.neural_memory.state import NeuralMemoryState

__all__ = ["NeuralMemoryState", "neural_memory"]

IMPLEMENTATIONS = {"reference": neural_memory_reference, "eager": neural_memory_eager}


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    state: NeuralMemoryState,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, NeuralMemoryState]:
    """Run the memory over a batch of sequences.

    Args:
        q, k, v: ``[B, T, H, D]``.
        alpha: decay of the weights in [0, 1], ``[B, T, H]``.
        eta: decay of the momentum in [0, 1], ``[B, T, H]``.
        theta: step size, ``[B, T, H]``.
        state: of the N sequences; its number of layers (1 or 2) is the depth.
        chunk_size: tokens between refreshes of the anchor, counted from each sequence's start.
        cu_seqlens: int ``[N + 1]``, boundaries of the sequences packed along T (then ``B == 1``);
            empty sequences are allowed. None: one sequence per row, ``N == B``.

    Returns:
        o ``[B, T, H, D]`` in v's dtype and the final state (float32; float64 if v is float64).
        Gradients flow through both, and through the inner updates.

    Raises:
        ValueError: shapes that do not fit together.
    """
    B, T, H, D = q.shape
    _check_shapes(q, k, v, alpha, eta, theta, state, cu_seqlens)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if cu_seqlens is None:
        lengths = torch.full((B,), T, dtype=torch.int64, device=q.device)
    else:
        lengths = cu_seqlens.diff().to(torch.int64)
    run = choose("neural_memory", IMPLEMENTATIONS)
    with torch.autocast(q.device.type, enabled=False):  # the weights and their updates stay float32
        o, state = run(
            *(x.to(dtype).reshape(B * T, H, D) for x in (q, k, v)),
            *(gate.to(dtype).reshape(B * T, H) for gate in (alpha, eta, theta)),
            state.map(lambda x: x.to(dtype)),
            chunk_size,
            lengths,
        )
    return o.view(B, T, H, D).to(v.dtype), state


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    state: NeuralMemoryState,
    cu_seqlens: Tensor | None,
) -> None:
    B, T, H, D = q.shape
    for name, x, shape in (
        ("k", k, q.shape),
        ("v", v, q.shape),
        ("alpha", alpha, q.shape[:3]),
        ("eta", eta, q.shape[:3]),
        ("theta", theta, q.shape[:3]),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} is {tuple(x.shape)}: expected {tuple(shape)}")
    if cu_seqlens is not None and (B != 1 or int(cu_seqlens[-1]) != T):
        raise ValueError(
            f"cu_seqlens needs one row with all its tokens: it ends at {int(cu_seqlens[-1])}, "
            f"q has {B} rows of {T} tokens"
        )
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    hidden = state.weights[0].shape[-1]
    expected = [(N, H, D, D)] if len(state.weights) == 1 else [(N, H, D, hidden), (N, H, hidden, D)]
    for part in (state.anchor, state.weights, state.momentum):
        if [tuple(w.shape) for w in part] != expected:
            raise ValueError(
                f"the state's layers are {[tuple(w.shape) for w in part]}: expected {expected}"
            )
