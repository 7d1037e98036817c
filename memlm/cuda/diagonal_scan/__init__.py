"""Diagonal scan: a linear recurrence of every channel by itself.

Per channel, for any real coefficients (the recurrence of Feng et al., "Were RNNs All We Needed?",
arXiv 2410.01201, section 3)::

    h_t = a_t h_{t-1} + b_t
"""

from torch import Tensor

from memlm.cuda.diagonal_scan import operator
from memlm.cuda.diagonal_scan.inputs import Inputs, check_tokens, state_dtype
from memlm.cuda.diagonal_scan.reference import diagonal_scan_reference
from memlm.cuda.dispatch import choose_name

__all__ = ["diagonal_scan"]


def diagonal_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run the recurrence over a batch of sequences.

    Args:
        a: ``[B, T, D]``, any real numbers. Slow decays deserve float32 also where b is narrower:
            the bfloat16 number below 1 is 1 - 2^-8.
        b: ``[B, T, D]``.
        initial_state: ``[N, D]``, default zeros.
        cu_seqlens: int ``[N + 1]``, boundaries of the sequences packed along T (then ``B == 1``);
            empty sequences are allowed. None: one sequence per row, ``N == B``.
        return_state: whether to return the final state.

    Returns:
        h ``[B, T, D]`` in b's dtype, and the final state ``[N, D]`` (float32; float64 where a or b
        is float64) or None. Gradients flow through both to a, b and the initial state.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_tokens(a, b)
    dtype = state_dtype(a, b)
    if initial_state is None:
        N = b.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        initial_state = b.new_zeros(N, b.shape[2], dtype=dtype)
    inputs = Inputs(a, b, initial_state.to(dtype), cu_seqlens)
    inputs.check()
    name = choose_name("diagonal_scan", operator.refusals(inputs), b.device)
    if name == "reference":
        h, state = diagonal_scan_reference(inputs)
    else:
        h, state = operator.run(name, inputs)
    return h, state if return_state else None
