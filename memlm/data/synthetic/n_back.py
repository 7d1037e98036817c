"""The n-back task (Kirchner, 1958): a working memory whose content changes with every symbol."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from memlm.data.synthetic.base import IGNORED, Example, Generator
from memlm.errors import UserError

_NO, _YES = 0, 1


@dataclass(frozen=True)
class NBack(Generator):
    """Symbols; behind each from the n + 1st on, whether it is the one n steps before.

    Which symbol stood n steps before cannot be told from how familiar the present one is: of those
    that are no targets, some are lures, the symbol of n - 1 or n + 1 steps before. A lure needs
    a symbol there that is not also the target's; where there is none, the position is an ordinary
    one, whose symbol is neither target nor lure.

    Attributes:
        n: how many steps back.
        symbols: different symbols, ids 2 .. symbols + 1; the answers are 0 (no) and 1 (yes).
        targets: chance that a position is a target.
        lures: chance that a position is a lure.
    """

    title = "n-back"
    description = "Random symbols; behind each, whether it equals the one n steps before."

    n: int = 2
    symbols: int = 8
    targets: float = 0.5
    lures: float = 0.25

    @property
    def vocabulary(self) -> int:
        return self.symbols + 2

    def check(self, length: int) -> None:
        if self.n < 1:
            raise UserError(f"n_back: n must be >= 1, got {self.n}")
        # One may be the target, two may be lures.
        if self.symbols < 4:
            raise UserError(f"n_back: symbols must be >= 4, got {self.symbols}")
        # 1 - 0.9 is less than 0.1 in floats.
        together = self.targets + self.lures
        if not (0 < self.targets < 1 and self.lures >= 0 and together <= 1 + 1e-9):
            raise UserError(
                "n_back: needs targets in (0, 1) and lures in [0, 1 - targets], got "
                f"{self.targets} and {self.lures}"
            )
        if length <= self.n:
            raise UserError(
                f"n_back: {self.n} steps back need at least {self.n + 1} tokens, got {length}"
            )

    def example(self, length: int, rng: np.random.Generator) -> Example:
        n, symbols = self.n, rng.integers(0, self.symbols, size=length).tolist()
        kinds, picks = rng.random((2, length)).tolist()
        lures = [0] * length
        for place in range(n, length):
            target = symbols[place - n]
            if kinds[place] < self.targets:
                symbols[place] = target
                continue
            near = _neighbours(symbols, place, n)
            if near and kinds[place] < self.targets + self.lures:
                symbols[place] = near[int(picks[place] * len(near))]
                lures[place] = 1
            else:
                symbols[place] = self._other({target, *near}, picks[place])
        input_ids = np.array(symbols, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        labels[n:] = np.where(input_ids[n:] == input_ids[:-n], _YES, _NO)
        marks = {"lures": np.array(lures, dtype=np.int64)}
        return Example(input_ids + 2, labels, marks=marks)

    def _other(self, taken: set[int], pick: float) -> int:
        """The symbol that `pick` in [0, 1) chooses from those that are not taken."""
        found = int(pick * (self.symbols - len(taken)))
        for symbol in sorted(taken):
            found += found >= symbol
        return found

    def counts(self, example: Example, guesses: np.ndarray) -> dict[str, float]:
        said, targets = guesses == _YES, example.labels == _YES
        others, lures = example.labels == _NO, example.marks["lures"] == 1
        parts = {"targets": targets, "others": others, "lures": lures}
        found = {}
        for name, part in parts.items():
            found[name] = float(part.sum())
            found[f"{name}_said"] = float((said & part).sum())
        return found

    def measures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Hit rate, false-alarm rates and d', as far as there were positions of these kinds.

        d' = z(hit rate) - z(false-alarm rate), with 0.5 added to both counts and 1 to both numbers
        of positions (the log-linear correction of Hautus, 1995), so that rates of 0 and 1 count.
        """
        names = {
            "targets": "hit_rate",
            "others": "false_alarm_rate",
            "lures": "lure_false_alarm_rate",
        }
        found = {
            name: sums[f"{kind}_said"] / sums[kind] for kind, name in names.items() if sums[kind]
        }
        hits, alarms = (
            NormalDist().inv_cdf((sums[f"{kind}_said"] + 0.5) / (sums[kind] + 1))
            for kind in ("targets", "others")
        )
        return found | {"d_prime": hits - alarms}


def _neighbours(symbols: list[int], place: int, n: int) -> list[int]:
    """The symbols n + 1 and n - 1 steps before, unless they are those of n steps before."""
    found = [symbols[place - n - 1]] if place > n else []
    if n > 1:
        found.append(symbols[place - n + 1])
    return [symbol for symbol in dict.fromkeys(found) if symbol != symbols[place - n]]
