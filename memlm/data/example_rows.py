"""Rows that hold examples one behind the other, each a document of its own."""

import numpy as np

IGNORED = -100
ANSWER_GROUP = 1  # loss group of answers
_PADDING = 0


class ExampleRows:
    """A batch of rows that is filled example by example.

    Args:
        count: rows.
        length: tokens of a row.
    """

    def __init__(self, count: int, length: int) -> None:
        self.length = length
        self._ends = np.zeros(count, dtype=np.int64)
        self._documents = np.zeros(count, dtype=np.int64)
        shape = (count, length)
        self._rows = {
            "input_ids": np.full(shape, _PADDING, dtype=np.int64),
            "labels": np.full(shape, IGNORED, dtype=np.int64),
            "segment_ids": np.zeros(shape, dtype=np.int64),
            "position_ids": np.zeros(shape, dtype=np.int64),
        }

    def room(self, row: int) -> int:
        """Tokens that are left in a row."""
        return self.length - int(self._ends[row])

    def add(self, row: int, input_ids: np.ndarray, labels: np.ndarray) -> None:
        """Put an example, int64 [T] each with T <= `room(row)`, behind those of the row."""
        start = int(self._ends[row])
        place = slice(start, start + len(input_ids))
        self._documents[row] += 1
        self._rows["input_ids"][row, place] = input_ids
        self._rows["labels"][row, place] = labels
        self._rows["segment_ids"][row, place] = self._documents[row]
        self._rows["position_ids"][row, place] = np.arange(len(input_ids))
        self._ends[row] = place.stop

    def batch(self) -> dict[str, np.ndarray]:
        """The rows as arrays [count, length] int64, labels in the loss group of answers.

        What is left of a row is padding: segment 0, without targets.
        """
        groups = np.where(self._rows["labels"] != IGNORED, ANSWER_GROUP, 0)
        return self._rows | {"loss_groups": groups}
