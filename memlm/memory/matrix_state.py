"""The state of a memory that is a matrix per head, and how tokens read and write it."""

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor

from memlm.cuda import linear_recurrence
from memlm.cuda.recurrence_maps import linear_recurrence_map
from memlm.layers.affine_states import continue_rows
from memlm.memory.base import CallContext, MemoryState


@dataclasses.dataclass
class MatrixState(MemoryState):
    """recurrent: [B, heads, K, V], at least float32; zero before the first token."""

    recurrent: Tensor

    def reset(self, rows: Tensor | None = None) -> Self:
        if rows is None:
            return self._map(torch.zeros_like)
        return self._map(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0))


def zero_matrices(
    batch_size: int,
    sizes: tuple[int, int, int],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Zeros [batch_size, *sizes] in `dtype`, but never narrower than float32."""
    wide = torch.promote_types(dtype or torch.float32, torch.float32)
    return torch.zeros(batch_size, *sizes, device=device, dtype=wide)


def read_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    carried: Tensor,
    context: CallContext,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over the pieces of a call.

    Args:
        q, k, v, log_decay, beta, options: as of `memlm.cuda.linear_recurrence`, packed.
        carried: [B, HV, K, V], the matrices of the rows; where several processes hold the rows,
            those at the start of the whole rows.
        context: the call.

    Returns:
        What the tokens read, packed [.., HV, V], and the new matrices of the rows; where several
        processes hold the rows, those behind this process's columns.
    """
    layout = context.layout
    options["cu_seqlens"] = layout.cu_seqlens
    if context.sequence is not None:
        run = linear_recurrence_map(q, k, v, log_decay, beta, **options)
        return continue_rows(run, carried, layout, context.sequence)
    state = MatrixState(carried)
    before = layout.incoming(state).recurrent
    o, final = linear_recurrence(
        q, k, v, log_decay, beta, initial_state=before, return_state=True, **options
    )
    return o, layout.outgoing(MatrixState(final), state).recurrent
