"""Finite groups as tables of products: permutations, cyclic groups, direct products of them."""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from math import factorial

import numpy as np

from memlm.errors import UserError

LARGEST_ORDER = 720
_FACTOR = re.compile(r"([saz])([1-9][0-9]{0,3})")


@dataclass(frozen=True)
class Group:
    """A finite group whose elements are 0 .. order - 1, the identity being 0.

    Permutations p of n points are numbered in lexicographic order of (p(0), .., p(n - 1)), those of
    the alternating group among themselves; cyclic groups are the numbers modulo n; the element
    (a, b) of a product G x H is a |H| + b.

    Attributes:
        products: int64 [order, order], `products[a, b]` = a b; of permutations, b is applied first.
        generators: elements that generate the group, with the identity: of s the transpositions,
            of a the cycles of three points, of z the number 1, of a product those of each factor.
    """

    products: np.ndarray
    generators: np.ndarray

    @property
    def order(self) -> int:
        """How many elements there are."""
        return len(self.products)


def group_order(name: str) -> int:
    """The number of elements of the group `name`.

    Raises:
        UserError: for a name that is none, or a group of fewer than 2 or too many elements.
    """
    order = 1
    for factor in name.split("x"):
        match = _FACTOR.fullmatch(factor)
        if match is None:
            raise UserError(
                f"group {name!r}: expected s, a or z and a number, as in s5, a5 or z60, or a "
                "product such as a4xz5"
            )
        kind, size = match[1], int(match[2])
        if kind == "z":
            order *= size
        else:
            # The factorial of a large number takes long and is too large anyway.
            order *= factorial(min(size, 9)) // (2 if kind == "a" and size > 1 else 1)
        if order > LARGEST_ORDER:
            raise UserError(f"group {name!r}: more than {LARGEST_ORDER} elements")
    if order < 2:
        raise UserError(f"group {name!r}: one element; the least is 2")
    return order


@lru_cache(maxsize=8)
def make_group(name: str) -> Group:
    """The group `name`: s5, a5, z60 or a direct product such as a4xz5.

    Raises:
        UserError: as `group_order`.
    """
    group_order(name)
    found = Group(np.zeros((1, 1), dtype=np.int64), np.zeros(1, dtype=np.int64))
    for factor in name.split("x"):
        found = _direct_product(found, _cyclic_or_permutations(factor[0], int(factor[1:])))
    return found


def _cyclic_or_permutations(kind: str, size: int) -> Group:
    if kind == "z":
        numbers = np.arange(size)
        return Group((numbers[:, None] + numbers) % size, numbers[:2])
    points = np.array(list(permutations(range(size))), dtype=np.int64)
    if kind == "a":
        points = points[_inversions(points) % 2 == 0]
    digits = size ** np.arange(size)[::-1]
    codes = points @ digits  # ascending, as the order is lexicographic
    # points[:, points][a, b, i] = a(b(i))
    products = np.searchsorted(codes, points[:, points] @ digits)
    moved = (points != np.arange(size)).sum(axis=1)
    return Group(products, np.flatnonzero(moved <= (2 if kind == "s" else 3)))


def _inversions(points: np.ndarray) -> np.ndarray:
    """Pairs that stand in falling order, int64 [permutations]."""
    pairs = combinations(range(points.shape[1]), 2)
    return sum((points[:, i] > points[:, j] for i, j in pairs), np.zeros(len(points), np.int64))


def _direct_product(first: Group, second: Group) -> Group:
    left = first.products[:, None, :, None] * second.order
    products = (left + second.products[None, :, None, :]).reshape(
        first.order * second.order, first.order * second.order
    )
    generators = np.union1d(first.generators * second.order, second.generators)
    return Group(products, generators)
