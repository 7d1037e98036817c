"""Keys and values with room behind them, so that a token in decoding need not copy the context.

Several states may look at one room, each at what was there when it was made. What they look at is
never changed: only the state that reaches to the last token there may append in place, and from any
other (an older one, or a copy) the tokens are moved to a room of their own first.
"""

import dataclasses

import torch
from torch import Tensor

SPARE = 64  # tokens of room at least


@dataclasses.dataclass
class KeyValueRoom:
    """Of every row as many tokens.

    Attributes:
        keys, values: [B, num_key_value_heads, capacity, head_dim]: the tokens of a head side by
            side, as attention reads them.
        positions: int64 [B, capacity].
        filled: tokens that are there.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    filled: int

    @classmethod
    def around(
        cls, keys: Tensor, values: Tensor, positions: Tensor, dtype: torch.dtype
    ) -> "KeyValueRoom":
        """Copies of keys and values [B, S, heads, head_dim] and positions [B, S], and spare room:
        a quarter of S, so that all copies together stay in proportion to the tokens."""
        batch_size, length, heads, channels = keys.shape
        capacity = length + max(SPARE, length // 4)
        room = cls(
            keys.new_empty(batch_size, heads, capacity, channels, dtype=dtype),
            values.new_empty(batch_size, heads, capacity, channels, dtype=dtype),
            positions.new_empty(batch_size, capacity),
            0,
        )
        room.append(keys, values, positions)
        return room

    def has_room(self, dtype: torch.dtype) -> bool:
        """Whether one more token can be written in place."""
        fits = self.filled < self.positions.shape[1] and self.keys.dtype == dtype
        # Tensors made in inference mode may not be written outside of it.
        return fits and (not self.keys.is_inference() or torch.is_inference_mode_enabled())

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Write tokens behind the last one; shapes as of `around`."""
        first, count = self.filled, positions.shape[1]
        self.keys.narrow(2, first, count).copy_(keys.transpose(1, 2))
        self.values.narrow(2, first, count).copy_(values.transpose(1, 2))
        self.positions.narrow(1, first, count).copy_(positions)
        self.filled = first + count

    def last(self, count: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """The last `count` tokens (None = all): views shaped as in `around`."""
        count = self.filled if count is None else min(count, self.filled)
        first = self.filled - count
        keys, values = (x.narrow(2, first, count).transpose(1, 2) for x in (self.keys, self.values))
        return keys, values, self.positions.narrow(1, first, count)

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes
