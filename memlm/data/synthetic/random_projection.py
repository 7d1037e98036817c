"""In-context learning of a classification that differs in every sequence (Kirsch et al., 2022)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from memlm.data.synthetic.base import IGNORED, Example, Generator
from memlm.errors import UserError

_CHANNELS = 16  # of the base task
_MOST_NOISE = 1000  # where no class can be told from another; squares of larger ones overflow


@dataclass(frozen=True)
class RandomProjection(Generator):
    """Inputs and their classes, randomly projected and renamed for every sequence.

    The construction is that of "General-Purpose In-Context Learning by Meta-Learning Transformers"
    (Kirsch et al., 2022, section 3): a base task becomes many by a random linear projection of its
    inputs and a random permutation of its labels. With few of these tasks a model can remember each
    of them; with many it has to learn from the pairs of the sequence. In place of MNIST the base
    task is drawn from `world_seed`: points of a normal distribution around a random centre for
    every class. An input is the projection of a point of a random class, its `dimensions` channels
    scaled to unit variance over the base task and sorted into `levels` parts that a normal
    distribution makes equally likely, one token each. Behind an input its class is asked, and
    then shown.

    Attributes:
        classes: of the base task, ids behind those of the levels.
        dimensions: tokens of an input.
        levels: values of a channel, ids 0 .. levels - 1.
        noise: standard deviation of a class, where centres have 1 in each of the 16 channels.
        tasks: different tasks, drawn from `world_seed`; 0 = every sequence has a new one.
        world_seed: of the base task and of the limited tasks.
    """

    title = "Random projections"
    description = (
        "Points with their classes, projected and renamed by chance; behind each point its class "
        "is asked."
    )

    classes: int = 4
    dimensions: int = 4
    levels: int = 16
    noise: float = 0.2
    tasks: int = 0
    world_seed: int = 0

    @property
    def vocabulary(self) -> int:
        return self.levels + self.classes

    def check(self, length: int) -> None:
        for name, least in (
            ("classes", 2),
            ("dimensions", 1),
            ("levels", 2),
            ("tasks", 0),
            ("world_seed", 0),
        ):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"random_projection: {name} must be >= {least}, got {value}")
        if not 0 <= self.noise <= _MOST_NOISE:
            raise UserError(
                f"random_projection: noise must be in [0, {_MOST_NOISE}], got {self.noise}"
            )
        size = self.dimensions + 1
        if length < size:
            raise UserError(
                f"random_projection: an input and its class are {size} tokens, got {length}"
            )

    def example(self, length: int, rng: np.random.Generator) -> Example:
        size = self.dimensions + 1
        shots = length // size
        task = rng
        if self.tasks:
            task = np.random.default_rng([self.world_seed, 1, int(rng.integers(self.tasks))])
        projection = task.standard_normal((_CHANNELS, self.dimensions))
        names = task.permutation(self.classes)
        centres = _centres(self.world_seed, self.classes)
        chosen = rng.integers(0, self.classes, size=shots)
        points = centres[chosen] + self.noise * rng.standard_normal((shots, _CHANNELS))
        # Of a channel over the whole base task, not over the points of this sequence.
        spread = np.sqrt(
            np.square(centres @ projection).mean(0) + self.noise**2 * np.square(projection).sum(0)
        )
        values = np.searchsorted(_edges(self.levels), points @ projection / spread)
        answers = self.levels + names[chosen]
        input_ids = np.concatenate([values, answers[:, None]], axis=1).reshape(-1)
        labels = np.full(len(input_ids), IGNORED, dtype=np.int64)
        labels[self.dimensions - 1 :: size] = answers
        return Example(input_ids, labels)

    def counts(self, example: Example, guesses: np.ndarray) -> dict[str, float]:
        asked = example.labels != IGNORED
        right = (guesses == example.labels)[asked]
        found = {}
        first, last = 1, 1
        while first <= len(right):
            part = right[first - 1 : last]
            found[f"asked {first} {last}"] = float(len(part))
            found[f"right {first} {last}"] = float(part.sum())
            first, last = last + 1, 2 * last
        return found

    def measures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Accuracy by the number of an input in its sequence: shots_1, shots_2, shots_3_4, .."""
        found = {}
        for name, count in sums.items():
            kind, first, last = name.split()
            if kind == "asked":
                shots = first if first == last else f"{first}_{last}"
                found[f"shots_{shots}"] = sums[f"right {first} {last}"] / count
        return found


@cache
def _centres(world_seed: int, classes: int) -> np.ndarray:
    """Centres of the classes around zero, float64 [classes, channels]; not to be written to."""
    centres = np.random.default_rng([world_seed, 0]).standard_normal((classes, _CHANNELS))
    centres -= centres.mean(0)
    centres.setflags(write=False)
    return centres


@cache
def _edges(levels: int) -> np.ndarray:
    """Between `levels` parts of a standard normal distribution of the same probability."""
    normal = NormalDist()
    return np.array([normal.inv_cdf(number / levels) for number in range(1, levels)])
