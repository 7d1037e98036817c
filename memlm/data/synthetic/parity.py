"""Parity: the simplest state that has to be tracked."""

from dataclasses import dataclass

import numpy as np

from memlm.data.synthetic.base import Example, Generator
from memlm.errors import UserError


@dataclass(frozen=True)
class Parity(Generator):
    """Bits; behind each of them, whether the ones so far are odd in number."""

    title = "Parity"
    description = "Random bits; behind each bit the parity of all bits so far is asked."

    @property
    def vocabulary(self) -> int:
        return 2

    def check(self, length: int) -> None:
        if length < 1:
            raise UserError(f"parity: needs at least 1 token, got {length}")

    def example(self, length: int, rng: np.random.Generator) -> Example:
        bits = rng.integers(0, 2, size=length)
        return Example(bits, np.cumsum(bits) % 2)
