"""Associative recall with one question (Ba et al., 2016; after Graves et al., 2014)."""

from dataclasses import dataclass

import numpy as np

from memlm.data.synthetic.base import IGNORED, Example, Generator
from memlm.errors import UserError

_BEHIND_PAIRS = 3  # two question marks and a key


@dataclass(frozen=True)
class AssociativeRecall(Generator):
    """Pairs of a key and a value, two question marks, one of the keys: its value is asked.

    The form is that of "Using Fast Weights to Attend to the Recent Past" (Ba et al., 2016,
    section 4.1), `c 9 k 8 j 3 f 1 ? ? c`, where there are 26 keys and 10 values. Keys of an
    example differ, values are drawn with replacement. The number of pairs follows from the length.

    Attributes:
        keys: different keys, ids 0 .. keys - 1.
        values: different values, the ids behind the keys; the question mark is the last id.
    """

    title = "Associative recall"
    description = "Pairs of a key and a value, then one of the keys, whose value is asked."

    keys: int = 128
    values: int = 128

    @property
    def vocabulary(self) -> int:
        return self.keys + self.values + 1

    def check(self, length: int) -> None:
        if self.keys < 1 or self.values < 2:
            raise UserError(
                f"associative_recall: needs keys >= 1 and values >= 2, got {self.keys} and "
                f"{self.values}"
            )
        shortest = 2 + _BEHIND_PAIRS
        if length < shortest:
            raise UserError(f"associative_recall: needs at least {shortest} tokens, got {length}")
        if _pairs(length) > self.keys:
            raise UserError(
                f"associative_recall: {_pairs(length)} pairs in {length} tokens need as many keys, "
                f"got {self.keys}"
            )

    def example(self, length: int, rng: np.random.Generator) -> Example:
        pairs = _pairs(length)
        keys = rng.permutation(self.keys)[:pairs]
        values = self.keys + rng.integers(0, self.values, size=pairs)
        asked = rng.integers(pairs)
        input_ids = np.full(2 * pairs + _BEHIND_PAIRS, self.vocabulary - 1, dtype=np.int64)
        input_ids[0 : 2 * pairs : 2], input_ids[1 : 2 * pairs : 2] = keys, values
        input_ids[-1] = keys[asked]
        labels = np.full(len(input_ids), IGNORED, dtype=np.int64)
        labels[-1] = values[asked]
        return Example(input_ids, labels, context_length=2 * pairs)


def _pairs(length: int) -> int:
    return (length - _BEHIND_PAIRS) // 2
