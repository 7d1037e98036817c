"""The word problem of a finite group (Merrill, Petty and Sabharwal, 2024)."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from memlm.data.synthetic.base import Example, Generator
from memlm.data.synthetic.groups import group_order, make_group
from memlm.errors import UserError


@dataclass(frozen=True)
class GroupWordProblem(Generator):
    """Elements of a group; behind each of them, the product of all so far.

    After "The Illusion of State in State-Space Models" (Merrill, Petty and Sabharwal, 2024), which
    compares z60, a4xz5 and a5, and "Unlocking State-Tracking in Linear RNNs Through Negative
    Eigenvalues" (Grazzi et al., 2024), which also takes tokens from the swaps of s5 alone. Parity
    is the word problem of z2. memlm.data.synthetic.groups says how elements are numbered.

    Attributes:
        group: sN, aN or zN (symmetric, alternating, cyclic), or a direct product such as a4xz5.
        generators: tokens are the identity and generators alone, of s the swaps; otherwise all
            elements. The ids stay those of the elements.
    """

    title = "Word problem of a group"
    description = "Elements of a group; behind each, the product of all so far is asked."

    group: str = "s5"
    generators: bool = False

    @property
    def vocabulary(self) -> int:
        return group_order(self.group)

    def check(self, length: int) -> None:
        group_order(self.group)
        if length < 1:
            raise UserError(f"group_word_problem: needs at least 1 token, got {length}")

    def example(self, length: int, rng: np.random.Generator) -> Example:
        group = make_group(self.group)
        choices = group.generators if self.generators else np.arange(group.order)
        word = choices[rng.integers(0, len(choices), size=length)]
        products = _rows(self.group)
        prefixes = accumulate(word.tolist(), lambda product, token: products[product][token])
        return Example(word, np.fromiter(prefixes, dtype=np.int64, count=length))


@lru_cache(maxsize=8)
def _rows(group: str) -> list[list[int]]:
    """The table of products as lists, in which single entries are found faster."""
    return make_group(group).products.tolist()
