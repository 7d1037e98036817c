"""What attention carries from one call to the next."""

import dataclasses

import torch
from torch import Tensor

from memlm.layers.key_values import KeyValueRoom
from memlm.layers.state import MemoryState


@dataclasses.dataclass
class AttentionState(MemoryState):
    """Keys and values that later tokens of the carried document may still see.

    Attributes:
        keys, values: [B, S, num_key_value_heads, head_dim].
        positions: int64 [B, S], position within the document, -1 = empty.
        tail: [B, conv_size - 1, hidden_size], inputs of the short convolution (0 wide without).
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    tail: Tensor
    # Not fields, since they say nothing that the tensors do not. In decoding: where these lie with
    # spare room behind them, and up to which token there; whether the positions have no gaps.
    room, end, gapless = None, 0, None

    @classmethod
    def in_room(
        cls, room: KeyValueRoom, window: int | None, tail: Tensor, gapless: bool
    ) -> "AttentionState":
        """What later tokens may still see of a room: its last `window` - 1 tokens (None = all)."""
        keys, values, positions = room.last(None if window is None else window - 1)
        state = cls(keys, values, positions, tail)
        state.room, state.end, state.gapless = room, room.filled, gapless
        return state

    def roomy(self, dtype: torch.dtype) -> KeyValueRoom:
        """A room that ends with these keys and values, and takes one more token of `dtype`."""
        room = self.room
        if room is not None and room.filled == self.end and room.has_room(dtype):
            return room
        return KeyValueRoom.around(self.keys, self.values, self.positions, dtype)

    def has_no_gaps(self) -> bool:
        """Whether every slot of every row holds a token, one position after the other."""
        if self.gapless is None:
            positions = self.positions
            steps = torch.arange(positions.shape[1], device=positions.device)
            expected = positions[:, :1] + steps
            self.gapless = bool(((positions >= 0) & (positions == expected)).all())
        return self.gapless

    def with_tail(self, tail: Tensor) -> "AttentionState":
        """The same keys and values, another tail."""
        state = dataclasses.replace(self, tail=tail)
        state.room, state.end, state.gapless = self.room, self.end, self.gapless
        return state

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        return super().nbytes if self.room is None else self.room.nbytes + self.tail.nbytes

    def reset(self, rows: Tensor | None = None) -> "AttentionState":
        if rows is None:
            rows = torch.ones(self.batch_size, dtype=torch.bool, device=self.positions.device)
        return AttentionState(
            self.keys,
            self.values,
            self.positions.masked_fill(rows[:, None], -1),
            self.tail.masked_fill(rows[:, None, None], 0),
        )
