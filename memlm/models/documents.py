"""Where the documents of a call lie, and how far each row of a batch has come."""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.errors import UserError
from memlm.layers.context import SequenceLayout
from memlm.layers.state import MemoryState


@dataclasses.dataclass
class PositionState(MemoryState):
    """next_position: int64 [B], position in its document of the next token of each row."""

    next_position: Tensor

    def reset(self, rows: Tensor | None = None) -> "PositionState":
        if rows is None:
            return PositionState(torch.zeros_like(self.next_position))
        return PositionState(self.next_position.masked_fill(rows, 0))


def valid_tokens(
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    batch_size: int,
    length: int,
    device: torch.device,
) -> Tensor:
    """bool [B, T]: which tokens are not padding."""
    valid = torch.ones(batch_size, length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[1] < length:
            raise ValueError(
                "attention_mask must be [B, T] (or [B, past + T]) of 0 and 1; documents packed in "
                "a row are told apart by segment_ids"
            )
        valid &= attention_mask[:, attention_mask.shape[1] - length :].bool()
    if segment_ids is not None:
        valid &= segment_ids != 0
    return valid


def check_rows(states: int, rows: int) -> None:
    """Raise UserError for states of another number of rows than a call has."""
    if states != rows:
        raise UserError(
            f"the states are those of {states} rows, but the call has {rows}; choose rows of "
            "states with their select()"
        )


def find_documents(
    valid: Tensor,
    segment_ids: Tensor | None,
    position_ids: Tensor | None,
    next_position: Tensor,
    fresh: bool,
) -> tuple[Tensor, Tensor]:
    """Where documents start, bool [B, T], and the position of each token within its document.

    A document starts where segment_ids change between two tokens of a row and where a given
    position is 0. The first token of a row otherwise continues the carried document.

    Raises:
        UserError: for states of another number of rows.
    """
    check_rows(len(next_position), len(valid))
    starts = torch.zeros_like(valid)
    if segment_ids is not None:
        # Compare with the last token that was not padding.
        labels = torch.where(valid, segment_ids, 0)
        columns = torch.arange(valid.shape[1], device=valid.device)
        last = torch.where(valid, columns, -1).cummax(1).values
        previous = F.pad(last, (1, 0), value=-1)[:, :-1]
        before = labels.gather(1, previous.clamp(min=0))
        starts = valid & (previous >= 0) & (before != labels)
    if position_ids is not None:
        position_ids = position_ids.expand(valid.shape)
        starts = starts | (valid & (position_ids == 0))
    if fresh:
        # A row's first token finds the initial state anyway.
        starts = starts & (valid.cumsum(1) > 1)
    if position_ids is None:
        count = valid.cumsum(1) - 1
        base = torch.where(starts, count, 0).cummax(1).values
        continues = starts.cumsum(1) == 0
        position_ids = torch.where(continues, count + next_position[:, None], count - base)
        position_ids = position_ids.clamp(min=0)
    return starts, position_ids


def call_layout(
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    position_ids: Tensor | None,
    carried: PositionState | None,
    rows: Tensor,
) -> tuple[SequenceLayout, Tensor]:
    """The pieces of documents in a call, and the position of each token within its document.

    Args:
        attention_mask, segment_ids, position_ids: as in `MemLMForCausalLM.forward`.
        carried: how far the rows have come; None = before their first token.
        rows: [B, T, ...], gives shape and device.

    Raises:
        UserError: for states of another number of rows.
    """
    batch_size, length = rows.shape[:2]
    if carried is None:
        next_position = torch.zeros(batch_size, dtype=torch.int64, device=rows.device)
    else:
        next_position = carried.next_position
        check_rows(len(next_position), batch_size)
        if length == 1 and segment_ids is None and batch_size:
            step = _step_positions(attention_mask, position_ids, next_position)
            if step is not None:
                return SequenceLayout.step(step), step
    valid = valid_tokens(attention_mask, segment_ids, batch_size, length, rows.device)
    jumps = carried is not None and position_ids is not None
    starts, position_ids = find_documents(
        valid, segment_ids, position_ids, next_position, carried is None
    )
    layout = SequenceLayout.build(position_ids, valid, starts)
    layout.may_jump = jumps
    return layout, position_ids


def _step_positions(
    attention_mask: Tensor | None, position_ids: Tensor | None, next_position: Tensor
) -> Tensor | None:
    """int64 [B, 1] of a call with one token per row; None unless each continues its document."""
    if attention_mask is not None and not (
        attention_mask.ndim == 2 and attention_mask.shape[1] and bool(attention_mask[:, -1].all())
    ):
        return None
    if position_ids is None:
        return next_position[:, None]
    position_ids = position_ids.expand(len(next_position), 1)
    continues = (position_ids == next_position[:, None]) & (position_ids != 0)
    return position_ids if bool(continues.all()) else None


def advance(state: PositionState, position_ids: Tensor, layout: SequenceLayout) -> PositionState:
    """The state after a call: rows without a token stay where they are."""
    if layout.is_step:
        return PositionState(position_ids[:, 0] + 1)
    valid = layout.valid
    if valid.shape[1] == 0:
        return state
    columns = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, columns, -1).amax(1)
    following = position_ids.gather(1, last.clamp(min=0)[:, None]).squeeze(1) + 1
    return PositionState(torch.where(last >= 0, following, state.next_position))


def longest_context(position_ids: Tensor, layout: SequenceLayout) -> int:
    """The last position of a call, plus 1; 0 where it has no token."""
    if not position_ids.numel():
        return 0
    return int((position_ids if layout.is_step else position_ids * layout.valid).max()) + 1
