"""Training rows of a synthetic task."""

import numpy as np

from memlm.data.example_rows import ExampleRows
from memlm.data.synthetic.base import Generator
from memlm.errors import UserError


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
            raise UserError(
                f"data.sources: lengths: {list(self.lengths)} do not fit rows of {length} tokens"
            )
        for size in dict.fromkeys(self.lengths):
            generator.check(size)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows `indices` as arrays [len(indices), length] int64; see `ExampleRows`."""
        rows = ExampleRows(len(indices), self.length)
        shortest, longest = self.lengths
        for row, index in enumerate(indices):
            rng = np.random.default_rng([self.seed, int(index), self.number])
            while (room := rows.room(row)) >= shortest:
                size = int(rng.integers(shortest, min(longest, room) + 1))
                example = self.generator.example(size, rng)
                rows.add(row, example.input_ids, example.labels)
        return rows.batch()
