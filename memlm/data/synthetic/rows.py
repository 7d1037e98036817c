"""Training rows of a synthetic task."""

import numpy as np

from memlm.data.synthetic.base import IGNORED, Generator
from memlm.errors import UserError

_PADDING = 0


class SyntheticRows:
    """Rows of `length` tokens; row `index` is a pure function of the arguments and `index`.

    Args:
        generator: makes the examples.
        length: tokens of a row.
        seed: of everything that is drawn.
        lengths: shortest and longest example in tokens: a row holds as many examples as fit, each
            a document of its own. None = one example per row, as long as the row.
        number: of the source in its mixture, so that two of one task do not draw the same rows.

    Raises:
        UserError: for options or lengths that cannot work.
    """

    def __init__(
        self,
        generator: Generator,
        length: int,
        seed: int,
        lengths: tuple[int, int] | None = None,
        number: int = 0,
    ) -> None:
        self.generator, self.length, self.seed, self.number = generator, length, seed, number
        self.lengths = (length, length) if lengths is None else lengths
        if self.lengths[1] > length:
            raise UserError(f"lengths: {list(self.lengths)} do not fit rows of {length} tokens")
        for size in dict.fromkeys(self.lengths):
            generator.check(size)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows `indices` as arrays [len(indices), length] int64; answers in loss group 1.

        What is left of a row behind its examples is padding: segment 0, without targets.
        """
        shape = (len(indices), self.length)
        rows = {
            "input_ids": np.full(shape, _PADDING, dtype=np.int64),
            "labels": np.full(shape, IGNORED, dtype=np.int64),
            "segment_ids": np.zeros(shape, dtype=np.int64),
            "position_ids": np.zeros(shape, dtype=np.int64),
        }
        for row, index in enumerate(indices):
            rng = np.random.default_rng([self.seed, int(index), self.number])
            start, number = 0, 1
            shortest, longest = self.lengths
            while start + shortest <= self.length:
                size = int(rng.integers(shortest, min(longest, self.length - start) + 1))
                example = self.generator.example(size, rng)
                place = slice(start, start + len(example.input_ids))
                rows["input_ids"][row, place] = example.input_ids
                rows["labels"][row, place] = example.labels
                rows["segment_ids"][row, place] = number
                rows["position_ids"][row, place] = np.arange(len(example.input_ids))
                start, number = place.stop, number + 1
        return rows | {"loss_groups": (rows["labels"] != IGNORED).astype(np.int64)}
