"""Context-sensitive tasks of Delétang et al. (2023): a tape of bounded length solves them."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from memlm.data.synthetic.chomsky.base import (
    ChomskyTask,
    Classification,
    EndedTransduction,
    Transduction,
)

_OPERATOR, _END = 2, 2  # of input and output
_MISSING = 2
_BUCKETS = 5


@dataclass(frozen=True)
class DuplicateString(ChomskyTask):
    """A string of bits, twice."""

    title = "Duplicate string"
    description = "Random bits, asked twice over."
    name = "chomsky_duplicate_string"
    symbols = 2

    def inputs(self, length: int) -> int:
        return length // 3

    def outputs(self, size: int) -> int:
        return 2 * size

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        bits = rng.integers(0, 2, size=size)
        return bits, np.tile(bits, 2)


@dataclass(frozen=True)
class MissingDuplicate(Classification):
    """A string of bits twice, of which one is missing, anywhere: which it was."""

    title = "Missing duplicate"
    description = "A string of bits twice, with one bit hidden, which is asked."
    name = "chomsky_missing_duplicate"
    symbols = 3
    shortest = 2

    def inputs(self, length: int) -> int:
        return (length - 1) // 2 * 2

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        tokens = np.tile(rng.integers(0, 2, size=size // 2), 2)
        place = rng.integers(0, size)
        answer = int(tokens[place])
        tokens[place] = _MISSING
        return tokens, [answer]


@dataclass(frozen=True)
class OddsFirst(Transduction):
    """The first, third, .. bit of a string, then the second, fourth, .. one.

    Places count from 1, as in the paper; the sampler of its authors' code counts from 0.
    """

    title = "Odds first"
    description = "Random bits; those at odd places (from 1) are asked, then those at even ones."
    name = "chomsky_odds_first"
    symbols = 2

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        bits = rng.integers(0, 2, size=size)
        return bits, np.concatenate([bits[::2], bits[1::2]])


@dataclass(frozen=True)
class BucketSort(Transduction):
    """Symbols of an alphabet of five, sorted."""

    title = "Bucket sort"
    description = "Random symbols, asked in ascending order."
    name = "chomsky_bucket_sort"
    symbols = _BUCKETS

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(0, _BUCKETS, size=size)
        return tokens, np.sort(tokens)


@dataclass(frozen=True)
class ComputeSqrt(ChomskyTask):
    """A binary number from 1 on, highest bit first: its square root, rounded down."""

    title = "Compute square root"
    description = "A binary number; the bits of its square root, rounded down, are asked."
    name = "chomsky_compute_sqrt"
    symbols = 2

    def inputs(self, length: int) -> int:
        return 2 * length // 3

    def outputs(self, size: int) -> int:
        return (size + 1) // 2

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        bits = _positive(size, rng)
        root = _bits(math.isqrt(_number(bits)))
        answer = np.zeros(self.outputs(size), dtype=np.int64)
        answer[: len(root)] = root
        return bits[::-1], answer[::-1]


@dataclass(frozen=True)
class BinaryAddition(EndedTransduction):
    """Two binary numbers from 1 on, lowest bit first: their sum without needless zeros, and an end.

    How many bits the first one has is uniform.
    """

    title = "Binary addition"
    description = "Two binary numbers, lowest bit first; the bits of their sum are asked."
    name = "chomsky_binary_addition"
    symbols = 3
    shortest = 3

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        return _binary(size, rng, operator.add)


@dataclass(frozen=True)
class BinaryMultiplication(Transduction):
    """As `BinaryAddition`, with their product."""

    title = "Binary multiplication"
    description = "Two binary numbers, lowest bit first; the bits of their product are asked."
    name = "chomsky_binary_multiplication"
    symbols = 3
    shortest = 3

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        return _binary(size, rng, operator.mul)


def _binary(
    size: int, rng: np.random.Generator, compute: Callable[[int, int], int]
) -> tuple[np.ndarray, list[int]]:
    """Two numbers with the operator between them, and the result with its end."""
    first = int(rng.integers(1, size - 1))
    one, other = _positive(first, rng), _positive(size - 1 - first, rng)
    result = _bits(compute(_number(one), _number(other)))
    return np.concatenate([one, [_OPERATOR], other]), [*result, _END]


def _positive(size: int, rng: np.random.Generator) -> np.ndarray:
    """Bits [size] of a number that is uniform in 1 .. 2**size - 1."""
    while not (bits := rng.integers(0, 2, size=size)).any():
        pass
    return bits


def _number(bits: np.ndarray) -> int:
    """The number with these bits, lowest first."""
    packed = np.packbits(bits.astype(np.uint8), bitorder="little")
    return int.from_bytes(packed.tobytes(), "little")


def _bits(number: int) -> np.ndarray:
    """Bits of a positive number, lowest first, up to the highest one."""
    size = number.bit_length()
    packed = np.frombuffer(number.to_bytes((size + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=size, bitorder="little")
