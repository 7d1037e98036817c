"""Titans' neural memory: a small network per head, trained on the tokens as they pass.

Behrouz et al., "Titans: Learning to Memorize at Test Time", arXiv 2501.00663. Per head, with
weights ``M``, momentum ``S`` and the loss ``l(M; k, v) = ||M(k) - v||^2`` (sum over channels)::

    S_t = eta_t S_{t-1} - theta_t grad l(anchor; k_t, v_t)
    M_t = (1 - alpha_t) M_{t-1} + S_t
    o_t = M_t(q_t)

The anchor is the memory at the start of the current chunk of `chunk_size` tokens: the chunk size
is part of the function, not a matter of speed. Depth 1 is ``M(x) = x W``; depths 2 to 4 are
``M(x) = x + LN(gelu(.. gelu(x W1) ..) WL)`` with a layer norm that has no weights, or a gain that
is learned as the weights are.
"""

import functools
import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from memlm.cuda.dispatch import choose_name, interpreting
from memlm.cuda.neural_memory import native
from memlm.cuda.neural_memory.chunks import Chunks
from memlm.cuda.neural_memory.eager import solve_tiles
from memlm.cuda.neural_memory.inputs import Rule, check_shapes, kernel_refusal
from memlm.cuda.neural_memory.reference import neural_memory_reference
from memlm.cuda.neural_memory.state import NeuralMemoryState
from memlm.cuda.neural_memory.step import step
from memlm.cuda.neural_memory.tiles import TileSizes, run_tiles

__all__ = ["NeuralMemoryState", "NeuralMemoryStatistics", "neural_memory"]


class NeuralMemoryStatistics(NamedTuple):
    """What the tokens did to the memory, without gradients, ``[B, T, H]``.

    Attributes:
        surprise: the loss of the token at the weights at which its gradient is taken.
        gradient_norm: Frobenius norm of that gradient over all layers, before `clip`.
    """

    surprise: Tensor
    gradient_norm: Tensor


_rule = functools.lru_cache(maxsize=64)(Rule.build)


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    state: NeuralMemoryState,
    chunk_size: int,
    read: str = "inclusive",
    refresh: str | int = "chunk",
    exact: bool = False,
    clip: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, NeuralMemoryState] | tuple[Tensor, NeuralMemoryState, NeuralMemoryStatistics]:
    """Run the memory over a batch of sequences.

    Args:
        q, k, v: ``[B, T, H, D]``.
        alpha: decay of the weights in [0, 1], ``[B, T, H]``; at 1 its gradient is taken as 0.
        eta: decay of the momentum in [0, 1], ``[B, T, H]``; at 0 its gradient is taken as 0.
        theta: step size, ``[B, T, H]``.
        state: of the N sequences; its number of layers (1 to 4) is the depth.
        chunk_size: tokens of a chunk, counted from each sequence's start.
        read: "inclusive": token t reads M_t. "chunk_start": it reads the weights at the start of
            its chunk. "chunk_gates": the weights change at the end of a chunk only, with the
            momentum gate of its first and the decay of its last token (gates pooled over a chunk
            are given to all of its tokens), so token t reads what floor((t + 1) / chunk_size)
            chunks left behind; with gradients at the initial weights, what titans-pytorch computes.
        refresh: when the anchor becomes the present weights: "chunk", at every chunk's start (the
            paper); "never"; or after that many tokens, a multiple of `chunk_size`.
        exact: take each gradient at the weights of the token before, for the memory of depth 1;
            the chunk size then changes the speed alone. The state's anchor is empty.
        clip: largest norm of a token's gradient over all layers; theta shrinks for those above it.
        cu_seqlens: int ``[N + 1]``, boundaries of the sequences packed along T (then ``B == 1``);
            empty sequences are allowed. None: one sequence per row, ``N == B``.
        return_statistics: also return surprise and gradient norms.

    Returns:
        o ``[B, T, H, D]`` in v's dtype and the final state (float32; float64 if v is float64).
        Gradients flow through both, and through the inner updates.

    Raises:
        ValueError: shapes that do not fit together, or an option without meaning.
    """
    B, T, H, D = q.shape
    rule = _rule(chunk_size, read, refresh, exact, clip)
    tokens = {"q": q, "k": k, "v": v, "alpha": alpha, "eta": eta, "theta": theta}
    check_shapes(tokens, state, rule, cu_seqlens)
    is_step = T == 1 and cu_seqlens is None and B > 0 and not torch.is_grad_enabled()
    if is_step and q.device.type == "cpu":
        # As below, without what takes a CPU longer than the token itself.
        refusals = {"native": native.step_refusal(v, state, rule), "eager": None, "reference": None}
        if interpreting():
            refusals["triton"] = kernel_refusal(v, state, rule, return_statistics)
        if choose_name("neural_memory", refusals, q.device) == "native":
            tokens = (x.float().view(B, H, D) for x in (q, k, v))
            gates = (gate.float().view(B, H) for gate in (alpha, eta, theta))
            o, final, *statistics = native.step(*tokens, *gates, state, rule)
            o = o.view(B, T, H, D).to(v.dtype)
            if not return_statistics:
                return o, final
            return o, final, NeuralMemoryStatistics(*(x.view(B, T, H) for x in statistics))
    if cu_seqlens is None:
        lengths = torch.full((B,), T, dtype=torch.int64, device=q.device)
    else:
        lengths = cu_seqlens.diff().to(torch.int64)
    refusals = {
        "reference": None,
        "eager": None,
        "native": native.refusal(v, rule),
        "triton": kernel_refusal(v, state, rule, return_statistics),
    }
    name = choose_name("neural_memory", refusals, q.device)
    if name == "reference":
        run = neural_memory_reference
    elif is_step:
        name, run = "eager", step
    elif name == "triton":
        # On first use: where triton is missing, its kernels cannot even be imported.
        kernels = importlib.import_module("memlm.cuda.neural_memory.triton_implementation")
        sizes = TileSizes(kernels.longest_tile(state.depth, q.device), 16)
        run = functools.partial(run_tiles, kernels.solve_tiles, sizes)
    else:
        sizes = TileSizes(64 if D < 128 else 128)._replace(whole_chunks=rule.whole_chunks)
        walker = native.Chunks if name == "native" else Chunks
        solve = functools.partial(solve_tiles, statistics=return_statistics, walker=walker)
        run = functools.partial(run_tiles, solve, sizes)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    values = v.dtype if name == "triton" else dtype
    # The weights and their updates stay float32.
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        o, final, *statistics = run(
            *(x.to(values).reshape(B * T, H, D) for x in (q, k, v)),
            *(gate.to(dtype).reshape(B * T, H) for gate in (alpha, eta, theta)),
            state.map(lambda x: x.to(dtype)),
            rule,
            lengths,
        )
    o = o.view(B, T, H, D).to(v.dtype)
    if not return_statistics:
        return o, final
    return o, final, NeuralMemoryStatistics(*(x.view(B, T, H) for x in statistics))
