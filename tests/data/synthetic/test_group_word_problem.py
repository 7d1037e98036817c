"""Products of a group, by composing permutations and adding numbers one by one."""

from itertools import permutations

import numpy as np
import pytest

from memlm.data.synthetic.group_word_problem import GroupWordProblem
from memlm.data.synthetic.groups import group_order, make_group
from memlm.errors import UserError

Element = tuple[int, ...]


def even(points: Element) -> bool:
    """Whether the cycles of a permutation have an even number of even lengths."""
    left, odd_steps = set(range(len(points))), 0
    while left:
        place, steps = left.pop(), 0
        while points[place] in left:
            place, steps = points[place], steps + 1
            left.remove(place)
        odd_steps += steps
    return odd_steps % 2 == 0


def elements(name: str) -> list[Element]:
    """The elements in the order of their ids; those of a product are written one after another."""
    found: list[Element] = [()]
    for factor in name.split("x"):
        size = int(factor[1:])
        if factor[0] == "z":
            part = [(number,) for number in range(size)]
        else:
            part = sorted(permutations(range(size)))
            part = [points for points in part if factor[0] == "s" or even(points)]
        found = [first + second for first in found for second in part]
    return found


def multiply(name: str, first: Element, second: Element) -> Element:
    """`first` after `second` for permutations, the sum for numbers."""
    found: list[int] = []
    for factor in name.split("x"):
        size, start = int(factor[1:]), len(found)
        if factor[0] == "z":
            found.append((first[start] + second[start]) % size)
        else:
            found += [first[start + second[start + point]] for point in range(size)]
    return tuple(found)


NAMES = ["z2", "z60", "s3", "s4", "s5", "a4", "a5", "a4xz5", "z2xz3xs3"]
ORDERS = {"z2": 2, "z60": 60, "s3": 6, "s4": 24, "s5": 120, "a4": 12, "a5": 60, "a4xz5": 60}


@pytest.mark.parametrize("generators", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_prefix_products(name: str, generators: bool) -> None:
    known = elements(name)
    number = {element: place for place, element in enumerate(known)}
    task = GroupWordProblem(group=name, generators=generators)
    assert task.vocabulary == len(known) == ORDERS.get(name, 36)
    for length in (1, 2, 60):
        task.check(length)
        example = task.example(length, np.random.default_rng([7, length]))
        assert len(example.input_ids) == length
        product = known[0]
        for token, label in zip(example.input_ids, example.labels, strict=True):
            product = multiply(name, product, known[token])
            assert label == number[product]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_that_of_a_group(name: str) -> None:
    group = make_group(name)
    every = np.arange(group.order)
    assert group.order == group_order(name)
    assert (group.products[0] == every).all()
    assert (group.products[:, 0] == every).all()
    assert (np.sort(group.products, axis=0) == every[:, None]).all()
    assert (np.sort(group.products, axis=1) == every).all()
    commutes = bool((group.products == group.products.T).all())
    assert commutes == (name in ("z2", "z60"))


@pytest.mark.parametrize("name", NAMES)
def test_generators_reach_every_element(name: str) -> None:
    group = make_group(name)
    reached = {0}
    while True:
        more = {int(group.products[a, b]) for a in reached for b in group.generators} | reached
        if more == reached:
            break
        reached = more
    assert reached == set(range(group.order))


def test_generators_are_swaps_cycles_of_three_and_one() -> None:
    swaps = [elements("s5")[number] for number in make_group("s5").generators]
    assert sorted(sum(a != b for a, b in enumerate(points)) for points in swaps) == [0] + [2] * 10
    cycles = [elements("a5")[number] for number in make_group("a5").generators]
    assert sorted(sum(a != b for a, b in enumerate(points)) for points in cycles) == [0] + [3] * 20
    assert make_group("z60").generators.tolist() == [0, 1]
    assert make_group("z2xz3").generators.tolist() == [0, 1, 3]


@pytest.mark.parametrize("generators", [False, True])
def test_all_tokens_and_products_occur_evenly(generators: bool) -> None:
    task = GroupWordProblem(group="s3", generators=generators)
    example = task.example(12_000, np.random.default_rng(8))
    choices = [0, 1, 2, 5] if generators else list(range(6))  # 021, 102 and 210 are the swaps
    counts = np.bincount(example.input_ids, minlength=6)
    assert np.flatnonzero(counts).tolist() == choices
    assert np.abs(counts[choices] / 12_000 - 1 / len(choices)).max() < 0.02
    assert np.abs(np.bincount(example.labels, minlength=6) / 12_000 - 1 / 6).max() < 0.02


def test_a_hand_computed_case() -> None:
    """Of s3: 102 swaps the first two points, 120 sends 0 to 1, 1 to 2, 2 to 0."""
    products = make_group("s3").products
    swap, cycle = elements("s3").index((1, 0, 2)), elements("s3").index((1, 2, 0))
    # The cycle first, then the swap: 0 -> 1 -> 0, 1 -> 2 -> 2, 2 -> 0 -> 1.
    assert elements("s3")[products[swap, cycle]] == (0, 2, 1)
    assert elements("s3")[products[cycle, swap]] == (2, 1, 0)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("q8", "group 'q8': expected s, a or z and a number, as in s5, a5 or z60"),
        ("", "group ''"),
        ("s5x", "group 's5x'"),
        ("s05", "group 's05'"),
        ("s7", "group 's7': more than 720 elements"),
        ("s9999", "group 's9999': more than 720 elements"),
        ("z721", "group 'z721': more than 720 elements"),
        ("s5xz7", "group 's5xz7': more than 720 elements"),
        ("z1", "group 'z1': one element; the least is 2"),
        ("a2xs1", "group 'a2xs1': one element; the least is 2"),
    ],
)
def test_groups_that_cannot_be(group: str, message: str) -> None:
    for attempt in (
        lambda: GroupWordProblem(group=group).check(8),
        lambda: GroupWordProblem(group=group).vocabulary,
        lambda: make_group(group),
    ):
        with pytest.raises(UserError, match=message):
            attempt()


def test_no_tokens() -> None:
    with pytest.raises(UserError, match="needs at least 1 token, got 0"):
        GroupWordProblem().check(0)
