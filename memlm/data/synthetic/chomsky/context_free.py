"""Deterministic context-free tasks of Delétang et al. (2023): one stack solves them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from memlm.data.synthetic.chomsky.base import Classification, EndedTransduction, Transduction
from memlm.data.synthetic.chomsky.regular import MODULUS

_POP, _END = 2, 2  # of input and output
_PLUS, _MINUS, _TIMES, _OPEN, _CLOSE = range(MODULUS, MODULUS + 5)
# Equations have no products, by which several numbers could solve them.
_UNKNOWN, _EQUALS = _TIMES, _CLOSE + 1


@dataclass(frozen=True)
class ReverseString(Transduction):
    """A string of bits in reverse."""

    title = "Reverse string"
    description = "Random bits, asked in reverse order."
    name = "chomsky_reverse_string"
    symbols = 2

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        bits = rng.integers(0, 2, size=size)
        return bits, bits[::-1]


@dataclass(frozen=True)
class StackManipulation(EndedTransduction):
    """A stack of bits, bottom first, then actions; what is left of it, top first, and an end.

    2 pops, which an empty stack ignores; 3 and 4 push 0 and 1. The height of the first stack is
    uniform in 1 .. size - 1.
    """

    title = "Stack manipulation"
    description = "A stack of bits, then pushes and pops; the last stack is asked, top first."
    name = "chomsky_stack_manipulation"
    symbols = 5
    shortest = 2

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        height = int(rng.integers(1, size))
        bits = rng.integers(0, 2, size=height)
        actions = rng.integers(_POP, _POP + 3, size=size - height)
        stack = bits.tolist()
        for action in actions.tolist():
            if action != _POP:
                stack.append(action - _POP - 1)
            elif stack:
                stack.pop()
        return np.concatenate([bits, actions]), [*reversed(stack), _END]


@dataclass(frozen=True)
class ModularArithmeticBrackets(Classification):
    """An expression of +, - and * with all its brackets: the value modulo five.

    Expressions of 1 to 4 tokens are a number d, -d, (d) and (-d); a longer one is two joined by an
    operator in brackets, where the length of the first is uniform.
    """

    title = "Modular arithmetic with brackets"
    description = "An expression in brackets; its value modulo five is asked."
    name = "chomsky_modular_arithmetic_brackets"
    symbols = MODULUS + 5

    def draw(self, size: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        value = _expression(tokens, size, 3, iter(rng.random(size).tolist()))
        return tokens, [value]


@dataclass(frozen=True)
class SolveEquation(Classification):
    """An expression of + and - with brackets, one of its numbers unknown, `=`, its value.

    The unknown is the first number at or behind a place drawn uniformly, from the start again when
    there is none.
    """

    title = "Solve equation"
    description = "An equation modulo five with one unknown number, which is asked."
    name = "chomsky_solve_equation"
    symbols = MODULUS + 6
    shortest = 3

    def draw(self, size: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        value = _expression(tokens, size - 2, 2, iter(rng.random(size).tolist()))
        place = int(rng.integers(0, len(tokens)))
        while tokens[place] >= MODULUS:
            place = (place + 1) % len(tokens)
        solution, tokens[place] = tokens[place], _UNKNOWN
        return [*tokens, _EQUALS, value], [solution]


def _expression(tokens: list[int], size: int, operators: int, draws: Iterator[float]) -> int:
    """Append an expression of `size` tokens; its value.

    Args:
        operators: the first ones of +, - and *.
        draws: uniform in [0, 1), at most one for each token.
    """
    if size > 4:
        left = 1 + int(next(draws) * (size - 4))
        operator = _PLUS + int(next(draws) * operators)
        tokens.append(_OPEN)
        first = _expression(tokens, left, operators, draws)
        tokens.append(operator)
        second = _expression(tokens, size - 3 - left, operators, draws)
        tokens.append(_CLOSE)
        if operator == _TIMES:
            return first * second % MODULUS
        return (first + second if operator == _PLUS else first - second) % MODULUS
    number = int(next(draws) * MODULUS)
    negative = size % 2 == 0
    inner = [_MINUS, number] if negative else [number]
    tokens += [_OPEN, *inner, _CLOSE] if size > 2 else inner
    return -number % MODULUS if negative else number
