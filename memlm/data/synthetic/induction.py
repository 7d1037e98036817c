"""Induction heads (Olsson et al., 2022), in the form of Mamba (Gu and Dao, 2023)."""

from dataclasses import dataclass

import numpy as np

from memlm.data.synthetic.base import IGNORED, Example, Generator
from memlm.errors import UserError


@dataclass(frozen=True)
class Induction(Generator):
    """Random tokens with a special one whose follower is asked when it comes again at the end.

    The definition is that of "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
    (Gu and Dao, 2023, section 4.1.2), which trains on 256 tokens of 16 kinds. The special token
    stands at random places but for the last, and nowhere among the other tokens. Where it occurs
    more than twice, the same token follows it each time and is asked from the second time on.

    Attributes:
        tokens: kinds of tokens; the special one is the last id.
        occurrences: of the special token, with the one at the end.
    """

    title = "Induction heads"
    description = (
        "Random tokens and a special one; when it comes again, the token that followed it before "
        "is asked."
    )

    tokens: int = 16
    occurrences: int = 2

    @property
    def vocabulary(self) -> int:
        return self.tokens

    def check(self, length: int) -> None:
        if self.tokens < 3:
            raise UserError(f"induction: tokens must be >= 3, got {self.tokens}")
        if self.occurrences < 2:
            raise UserError(f"induction: occurrences must be >= 2, got {self.occurrences}")
        shortest = 2 * self.occurrences - 1
        if length < shortest:
            raise UserError(
                f"induction: {self.occurrences} occurrences need at least {shortest} tokens, got "
                f"{length}"
            )

    def example(self, length: int, rng: np.random.Generator) -> Example:
        special, followed = self.tokens - 1, self.occurrences - 1
        input_ids = rng.integers(0, special, size=length)
        follower = rng.integers(special)
        # A special token and its follower are one of the places that are left to choose from.
        chosen = np.sort(rng.permutation(length - 1 - followed)[:followed])
        places = chosen + np.arange(followed)
        input_ids[places], input_ids[places + 1] = special, follower
        input_ids[-1] = special
        labels = np.full(length, IGNORED, dtype=np.int64)
        labels[places[1:]] = labels[-1] = follower
        # With questions on the way, facts and questions are not apart.
        return Example(input_ids, labels, context_length=length - 1 if followed == 1 else 0)
