"""What attention sees of the tokens before a call's, and before a process's columns of it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.layers.attention_state import AttentionState
from memlm.layers.context import CallContext, SequenceLayout
from memlm.layers.sequence_group import tied


def behind_carried(
    key: Tensor, value: Tensor, state: AttentionState, context: CallContext
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The carried document and the call side by side.

    Args:
        key, value: [B, T, heads, head_dim] of the call.
        state: what the B rows carry, S slots.
        context: positions and documents of the call.

    Returns:
        Keys and values [B, S + T, heads, head_dim], positions and documents int64 [B, S + T]; the
        document is -1 where nothing may be seen.
    """
    positions, documents = context.position_ids, context.layout.document
    if not state.positions.shape[1]:
        return key, value, positions, documents
    continued = (documents == 0).any(1, keepdim=True)
    carried = torch.where((state.positions >= 0) & continued, 0, -1)
    return (
        torch.cat([state.keys.to(key.dtype), key], dim=1),
        torch.cat([state.values.to(value.dtype), value], dim=1),
        torch.cat([state.positions, positions], dim=1),
        torch.cat([carried, documents], dim=1),
    )


def behind_others(
    key: Tensor, value: Tensor, state: AttentionState, context: CallContext, window: int | None
) -> tuple[Tensor, AttentionState]:
    """The state that a process's columns of the rows carry in; a collective.

    Keys and values of all columns are gathered. Where no token of the rows is padding and a
    window reaches no further than the columns of one process, only the neighbour's last
    `window` - 1 travel.

    Args:
        key, value: [B, T / size, heads, head_dim] of this process's columns.
        state: what the whole rows carry.
        context: of this process's columns.
        window: tokens that a query sees, None = all.

    Returns:
        `key`, as part of a graph that goes back to the other processes; and the state.
    """
    sequence, before = context.sequence, context.before
    own, reach = key.shape[1], None if window is None else window - 1
    both = torch.cat([key, value], dim=-1)
    if context.dense and reach is not None and 0 < reach <= own:
        found = sequence.from_previous(both[:, own - reach :])
        key = tied(key, found)
        if before is None:
            return key, state
        documents = before.layout.document[:, -reach:]
        positions = before.position_ids[:, -reach:]
        positions = torch.where(documents == documents[:, -1:], positions, -1)
        return key, AttentionState(*found.chunk(2, dim=-1), positions, state.tail)
    parts = sequence.all(both)
    key = tied(key, *parts)
    if before is None:
        return key, state
    earlier = torch.cat(parts[: sequence.rank], dim=1).chunk(2, dim=-1)
    columns = behind_carried(*earlier, state, before)
    return key, next_state(state, *columns, before.layout, window)


def next_state(
    state: AttentionState,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    documents: Tensor,
    layout: SequenceLayout,
    window: int | None,
) -> AttentionState:
    """Keep the last document of each row, and of it what the window can still reach.

    Args:
        state: what the rows carried.
        keys, values, positions, documents: from `behind_carried`.
        layout: of the call.
        window: tokens that a query sees, None = all.
    """
    last = layout.document.amax(1, keepdim=True)
    untouched = F.pad(state.positions >= 0, (0, layout.document.shape[1]))
    keep = torch.where(last < 0, untouched, documents == last)
    positions = torch.where(keep, positions, -1)
    if window is None:
        if not (layout.uniform and layout.all_continue):
            # Away with what no row keeps: former documents would pile up from call to call.
            columns = keep.any(0).nonzero().squeeze(1)
            keys, values, positions = (
                tensor.index_select(1, columns) for tensor in (keys, values, positions)
            )
        return AttentionState(keys, values, positions, state.tail)
    if not layout.uniform:
        # Padding may lie between kept tokens: move them to the right end, in order.
        order = keep.to(torch.int8).sort(dim=1, stable=True).indices
        positions = positions.gather(1, order)
        gather = order[:, :, None, None].expand(-1, -1, *keys.shape[2:])
        keys, values = keys.gather(1, gather), values.gather(1, gather)
    start = max(0, keys.shape[1] - (window - 1))
    # Copies: views would keep the keys and values of the whole call alive.
    kept = [tensor[:, start:].clone() for tensor in (keys, values, positions)]
    return AttentionState(*kept, state.tail)
