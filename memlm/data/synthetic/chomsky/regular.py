"""Regular tasks of Delétang et al. (2023): a finite automaton solves them."""

from dataclasses import dataclass

import numpy as np

from memlm.data.synthetic.chomsky.base import Classification

MODULUS = 5
_PLUS, _MINUS, _TIMES = MODULUS, MODULUS + 1, MODULUS + 2
_CYCLE = 5


@dataclass(frozen=True)
class EvenPairs(Classification):
    """Whether neighbours differ an odd number of times, which is whether the ends differ."""

    title = "Even pairs"
    description = "Random bits; whether the pairs 01 and 10 are even (0) or odd in number is asked."
    name = "chomsky_even_pairs"
    symbols = 2

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        bits = rng.integers(0, 2, size=size)
        return bits, [bits[0] ^ bits[-1]]


@dataclass(frozen=True)
class ParityCheck(Classification):
    """Whether ones are odd in number; unlike `Parity` it is asked only at the end."""

    title = "Parity check"
    description = "Random bits; whether ones are even (0) or odd in number is asked."
    name = "chomsky_parity_check"
    symbols = 2

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        bits = rng.integers(0, 2, size=size)
        return bits, [bits.sum() % 2]


@dataclass(frozen=True)
class CycleNavigation(Classification):
    """Where on a cycle of five a walk from 0 ends: 0 stays, 1 goes forward, 2 goes back."""

    title = "Cycle navigation"
    description = "Steps on a cycle of five places; the last place is asked."
    name = "chomsky_cycle_navigation"
    symbols = _CYCLE

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        steps = rng.integers(0, 3, size=size)
        forward, back = np.count_nonzero(steps == 1), np.count_nonzero(steps == 2)
        return steps, [(forward - back) % _CYCLE]


@dataclass(frozen=True)
class ModularArithmetic(Classification):
    """Numbers below five joined by +, - and *, of which * goes first: the value modulo five."""

    title = "Modular arithmetic (simple)"
    description = "A sum of products without brackets; its value modulo five is asked."
    name = "chomsky_modular_arithmetic"
    symbols = MODULUS + 3

    def inputs(self, length: int) -> int:
        return length - 1 - length % 2  # an odd number of tokens

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        tokens = np.empty(size, dtype=np.int64)
        tokens[::2] = rng.integers(0, MODULUS, size=size // 2 + 1)
        tokens[1::2] = rng.integers(_PLUS, _TIMES + 1, size=size // 2)
        first, *rest = tokens.tolist()
        total, term = 0, first
        for operator, number in zip(rest[::2], rest[1::2], strict=True):
            if operator == _TIMES:
                term = term * number % MODULUS
            else:
                total += term
                term = -number if operator == _MINUS else number
        return tokens, [(total + term) % MODULUS]
