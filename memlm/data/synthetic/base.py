"""What a synthetic task is: examples of token ids and answers, drawn from given random numbers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from memlm.data.example_rows import IGNORED


@dataclass(frozen=True)
class Example:
    """One sequence with its answers.

    Attributes:
        input_ids: int64 [T].
        labels: int64 [T], the right answer behind each position, -100 where nothing is asked.
        context_length: tokens of a part in front that asks nothing, after which a memory can be
            reset or swapped; 0 where facts and questions are not apart.
        marks: int64 [T] each, what measures have to know about positions, by name.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    context_length: int = 0
    marks: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Generator(ABC):
    """One synthetic task; its options are the fields of the dataclass, all with defaults.

    Attributes:
        title: its name in reports.
        description: one sentence for reports: what is shown, what is asked.
    """

    title: ClassVar[str]
    description: ClassVar[str]

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Ids and answers are in 0 .. vocabulary - 1."""

    @abstractmethod
    def check(self, length: int) -> None:
        """Raise UserError when the options are wrong or no example fits `length` tokens."""

    @abstractmethod
    def example(self, length: int, rng: np.random.Generator) -> Example:
        """An example of at most `length` tokens, as long as the task allows; `check` passed."""

    def input_files(self) -> list[Path]:
        """The files that examples depend on; raises UserError where one is missing."""
        return []

    def counts(self, example: Example, guesses: np.ndarray) -> dict[str, float]:
        """What the task's own measures count in one example, to be added up over examples.

        Args:
            example: what was shown.
            guesses: int64 [T], the most likely answer behind each position.
        """
        return {}

    def loss_counts(self, example: Example, losses: np.ndarray) -> dict[str, float]:
        """What the measures count of losses, under names of their own; added up like `counts`.

        Args:
            example: what was shown.
            losses: float32 [T], cross-entropy of the right answers in nats, 0 where none is asked.
        """
        return {}

    def measures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The task's own measures, beside accuracy, from the sums of both counts."""
        return {}


def accuracy(example: Example, guesses: np.ndarray) -> float:
    """The share of the answers that are right.

    Args:
        example: one with at least one answer.
        guesses: int64 [T].
    """
    asked = example.labels != IGNORED
    return float((guesses == example.labels)[asked].mean())
