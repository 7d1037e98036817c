"""Copying (Arjovsky et al., 2016) and selective copying (Gu and Dao, 2023)."""

from dataclasses import dataclass

import numpy as np

from memlm.data.synthetic.base import IGNORED, Example, Generator
from memlm.errors import UserError

_NOISE = 0


@dataclass(frozen=True)
class Copying(Generator):
    """Data tokens, noise, then a marker for each data token: they are asked in their order.

    The task is that of "Unitary Evolution Recurrent Neural Networks" (Arjovsky et al., 2016): how
    long the data has to be kept is always the same. There a single marker stands before blanks at
    which the data is asked; here each answer has a marker. What is not data is noise, so that an
    example is as long as it may be.

    Attributes:
        alphabet: ids: 0 is noise, the last the marker, those between are data.
        tokens: data tokens to be copied.
    """

    title = "Copying"
    description = "Data tokens, noise, then markers at which the data is asked in order."

    alphabet: int = 16
    tokens: int = 16

    @property
    def vocabulary(self) -> int:
        return self.alphabet

    def check(self, length: int) -> None:
        if self.alphabet < 4 or self.tokens < 1:
            raise UserError(
                f"copying: needs alphabet >= 4 and tokens >= 1, got {self.alphabet} and "
                f"{self.tokens}"
            )
        if length < 2 * self.tokens:
            raise UserError(
                f"copying: {self.tokens} tokens and as many markers need at least "
                f"{2 * self.tokens} tokens, got {length}"
            )

    def example(self, length: int, rng: np.random.Generator) -> Example:
        context = length - self.tokens
        data = rng.integers(1, self.alphabet - 1, size=self.tokens)
        input_ids = np.full(length, _NOISE, dtype=np.int64)
        input_ids[self._places(context, rng)] = data
        input_ids[context:] = self.alphabet - 1
        labels = np.full(length, IGNORED, dtype=np.int64)
        labels[context:] = data
        return Example(input_ids, labels, context_length=context)

    def _places(self, context: int, rng: np.random.Generator) -> np.ndarray:
        """Where the data stands in the context, ascending int64 [tokens]."""
        return np.arange(self.tokens)


@dataclass(frozen=True)
class SelectiveCopying(Copying):
    """Copying where the data is scattered among the noise, so that time does not tell what it is.

    After "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu and Dao, 2023,
    section 4.1.1), which copies 16 tokens of an alphabet of 16 out of 4096.
    """

    title = "Selective copying"
    description = (
        "Data tokens scattered among noise, then markers at which the data is asked in order."
    )

    def _places(self, context: int, rng: np.random.Generator) -> np.ndarray:
        return np.sort(rng.permutation(context)[: self.tokens])
