"""What a value table costs when several processes hold it together: memory and communication.

The formulas of docs/scaling.md; tests/memory/test_sharding.py measures the bytes of two processes.
"""

import dataclasses
import math
from typing import Literal

INDEX = WEIGHT = GRADIENT = 4  # bytes of an int32 and of a float32
COUNT = 8  # bytes of a number of tokens or rows that is told
READS_HEADER = 6 * COUNT  # what copies of a part tell each other about one layer's reads


@dataclasses.dataclass(frozen=True)
class SharedTable:
    """A table of `slots` values of `width` channels, held by `processes` together.

    Attributes:
        slots: rows.
        width: channels.
        processes: how many hold the table together.
        by: "columns" or "rows".
        bag: rows that a token reads, heads times top_k.
        value_bytes: bytes of a channel of a value.
        moments: float32 numbers of optimizer state per channel: 2 for Adam.
    """

    slots: int
    width: int
    processes: int
    by: Literal["columns", "rows"] = "columns"
    bag: int = 128
    value_bytes: int = 4
    moments: int = 2

    @property
    def memory_bytes(self) -> float:
        """Values and optimizer state of a process."""
        numbers = self.slots * self.width / self.processes
        return numbers * (self.value_bytes + 4 * self.moments)

    def pending_bytes(self, tokens: int, rows: float | None = None) -> float:
        """Reads that wait for the optimizer on a process, of one layer, `tokens` per process.

        Args:
            tokens: of each process.
            rows: by rows: those of the process that were read, once for every process that read
                them; default as many as random reads touch.
        """
        if self.by == "columns":
            all_tokens = tokens * self.processes
            per_token = self.bag * (INDEX + WEIGHT) + self.width / self.processes * self.value_bytes
            return all_tokens * per_token
        rows = self.distinct_rows(tokens) if rows is None else rows
        return rows * (INDEX + WEIGHT + self.width * GRADIENT)

    def distinct_rows(self, tokens: int) -> float:
        """Different rows that `tokens` tokens read, were they read at random."""
        return -self.slots * math.expm1(-tokens * self.bag / self.slots)

    def forward_bytes(self, tokens: int, rows: float | None = None) -> float:
        """Bytes that a process gets from the others in a forward pass of one layer.

        Args:
            tokens: of this process; the others have as many.
            rows: by rows: rows of others that this process reads, and gives to others; default as
                many as random reads ask for.
        """
        others = self.processes - 1
        if self.by == "columns":
            asked = others * tokens * self.bag * (INDEX + WEIGHT)
            sums = tokens * self.width * self.value_bytes * others / self.processes
            return asked + sums + others * COUNT
        rows = self._foreign_rows(tokens) if rows is None else rows
        return rows * (INDEX + self.width * self.value_bytes) + others * COUNT

    def backward_bytes(self, tokens: int, rows: float | None = None) -> float:
        """Bytes that a process gets from the others in a backward pass; see `forward_bytes`."""
        others = self.processes - 1
        if self.by == "columns":
            gradients = others * tokens * self.width / self.processes * self.value_bytes
            return gradients + others * tokens * self.bag * WEIGHT
        rows = self._foreign_rows(tokens) if rows is None else rows
        return rows * self.width * GRADIENT

    def copies_bytes(self, tokens: int, copies: int, rows: float | None = None) -> float:
        """Bytes that a process gets in a step from the others with the same part, for one layer.

        Args:
            tokens: of each process.
            copies: processes that have the same part.
            rows: see `pending_bytes`.
        """
        return (copies - 1) * (self.pending_bytes(tokens, rows) + READS_HEADER)

    def bytes_per_token(self, tokens: int) -> float:
        """Forward and backward bytes that a process gets per token of its own."""
        return (self.forward_bytes(tokens) + self.backward_bytes(tokens)) / tokens

    def _foreign_rows(self, tokens: int) -> float:
        return self.distinct_rows(tokens) * (self.processes - 1) / self.processes
