"""What the tasks of the Chomsky hierarchy share: an input, then placeholders to answer at."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memlm.data.synthetic.base import IGNORED, Example, Generator
from memlm.errors import UserError


@dataclass(frozen=True)
class ChomskyTask(Generator):
    """An input, then as many placeholders as the longest output to it: they ask for the output.

    As in "Neural Networks and the Chomsky Hierarchy" (Delétang et al., 2023, arXiv:2207.02098,
    section 4 and appendix A): nothing but the first placeholder tells that the input is over, and
    the placeholders tell no more of the output than the length of the input does. Where outputs
    end in a token of their own, placeholders behind it ask nothing, as the paper's accuracy leaves
    them out. Lengths are those of input and placeholders together; the paper's those of the input.

    Attributes:
        name: that of the task in errors.
        symbols: ids of input and output are in 0 .. symbols - 1; the placeholder follows.
        shortest: tokens of the shortest input.
    """

    name: ClassVar[str]
    symbols: ClassVar[int]
    shortest: ClassVar[int] = 1

    @property
    def vocabulary(self) -> int:
        return self.symbols + 1

    def check(self, length: int) -> None:
        needed = self.shortest + self.outputs(self.shortest)
        if length < needed:
            raise UserError(f"{self.name}: needs at least {needed} tokens, got {length}")

    def example(self, length: int, rng: np.random.Generator) -> Example:
        size = self.inputs(length)
        shown, answer = self.draw(size, rng)
        input_ids = np.full(size + self.outputs(size), self.symbols, dtype=np.int64)
        input_ids[:size] = shown
        labels = np.full(len(input_ids), IGNORED, dtype=np.int64)
        labels[size : size + len(answer)] = answer
        return Example(input_ids, labels)

    @abstractmethod
    def inputs(self, length: int) -> int:
        """Tokens of the longest input that fits `length` tokens with its placeholders."""

    @abstractmethod
    def outputs(self, size: int) -> int:
        """Placeholders behind an input of `size` tokens."""

    @abstractmethod
    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | list]:
        """An input of `size` tokens and its output, at most `outputs(size)` tokens."""


@dataclass(frozen=True)
class Classification(ChomskyTask):
    """One placeholder: the output is one token."""

    def inputs(self, length: int) -> int:
        return length - 1

    def outputs(self, size: int) -> int:
        return 1


@dataclass(frozen=True)
class Transduction(ChomskyTask):
    """The output is as long as the input."""

    def inputs(self, length: int) -> int:
        return length // 2

    def outputs(self, size: int) -> int:
        return size


@dataclass(frozen=True)
class EndedTransduction(ChomskyTask):
    """The output and the token that ends it are at most one longer than the input."""

    def inputs(self, length: int) -> int:
        return (length - 1) // 2

    def outputs(self, size: int) -> int:
        return size + 1
