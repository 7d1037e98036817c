"""States of linear recurrences whose rows several processes hold together.

Every process works through its own columns at once, as a map of the state before them
(`memlm.cuda.recurrence_maps`). The maps alone travel: composed, those of the columns before give
the state that a process's columns find, exactly, however far back a row begins.
"""

import math

import torch
from torch import Tensor

from memlm.cuda.recurrence_maps import RecurrenceMap
from memlm.layers.context import SequenceLayout
from memlm.layers.sequence_group import SequenceGroup, tied


def continue_rows(
    run: RecurrenceMap, carried: Tensor, layout: SequenceLayout, sequence: SequenceGroup
) -> tuple[Tensor, Tensor]:
    """Outputs and states of this process's columns, whose rows begin on other processes.

    A collective. In the type of states, each process gives all others per row the transition and
    the addend of its columns: with the delta rule HV K (K + V) numbers, with an additive recurrence
    HV (1 + K V), with a diagonal scan 2 D; backward as many come back from each.

    Args:
        run: the pieces of this process's columns.
        carried: the states at the start of the whole rows, [B, HV, K, V] or [B, D]; the same on all
            processes.
        layout: of this process's columns.
        sequence: the processes.

    Returns:
        The outputs, packed and of the type of `run.output`, and the states at the end of this
        process's columns, shaped as `carried`. The gradient of `carried` is the sum of what it is
        on the processes.
    """
    with torch.autocast(carried.device.type, enabled=False):
        transition, addend = _row_maps(run, layout)
        entering = _entering(transition, addend, carried.to(addend.dtype), sequence)
        read = _read(run.reads, entering, layout)
        # Rounded once, and not what was read by itself.
        output = (run.output.to(read.dtype) + read).to(run.output.dtype)
        return output, _moved(transition, entering) + addend


def _row_maps(run: RecurrenceMap, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """Transition and addend of whole rows: of a row's last piece, where nothing passes from the
    rows' state to a document that starts in them; the identity of a row without tokens."""
    transition, addend = run.transition, run.addend
    if not layout.all_continue:
        starts = ~layout.continues
        transition = transition.masked_fill(_beside(starts, transition), 0)
    if layout.uniform:
        return transition, addend
    unit = transition.new_ones(transition.shape[1:])
    if transition.ndim == 4:
        unit = torch.eye(transition.shape[-1], dtype=unit.dtype, device=unit.device).expand_as(unit)
    index = torch.where(layout.last_piece >= 0, layout.last_piece, layout.num_pieces)
    transition = torch.cat([transition, unit[None]]).index_select(0, index)
    addend = torch.cat([addend, addend.new_zeros(1, *addend.shape[1:])]).index_select(0, index)
    return transition, addend


def _entering(
    transition: Tensor, addend: Tensor, carried: Tensor, sequence: SequenceGroup
) -> Tensor:
    """The states before this process's columns."""
    numbers = math.prod(transition.shape[1:])
    everywhere = sequence.all(torch.cat([transition.flatten(1), addend.flatten(1)], 1))
    state = carried
    for maps in everywhere[: sequence.rank]:
        before, added = maps[:, :numbers], maps[:, numbers:]
        state = _moved(before.view_as(transition), state) + added.view_as(addend)
    return tied(state, *everywhere)


def _moved(transition: Tensor, state: Tensor) -> Tensor:
    if transition.ndim == 4:
        return transition @ state
    return _beside(transition, state) * state


def _read(reads: Tensor, entering: Tensor, layout: SequenceLayout) -> Tensor:
    """What packed tokens read of the states before the columns, at least float32 where they are
    one factor per channel; nothing in documents that start in the columns."""
    if not layout.all_continue:
        later = layout.pack(layout.document) != 0
        reads = reads.masked_fill(_beside(later, reads), 0)
    reads = layout.unpack(reads)
    if entering.ndim == 2:
        return layout.pack(reads * entering[:, None])
    # In the type of the tokens, as the recurrence itself reads a state.
    read = reads.transpose(1, 2) @ entering.to(reads.dtype)
    return layout.pack(read.transpose(1, 2))


def _beside(x: Tensor, wider: Tensor) -> Tensor:
    """x with as many dimensions as `wider`, which it begins."""
    return x.view(*x.shape, *[1] * (wider.ndim - x.ndim))
