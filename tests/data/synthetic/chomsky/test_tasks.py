"""The fifteen tasks against oracles from their definitions, on text and Python's numbers."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from memlm.data.synthetic import GENERATORS, generator_class
from memlm.errors import UserError


def even_pairs(text: str) -> str:
    return str(sum(text[i : i + 2] in ("01", "10") for i in range(len(text))) % 2)


def cycle_navigation(text: str) -> str:
    place = 0
    for step in text:
        place = [place, (place + 1) % 5, (place + 4) % 5][int(step)]
    return str(place)


def stack_manipulation(text: str) -> str:
    stack = ""
    for token in text:
        stack = stack[:-1] if token == "p" else stack + {"a": "0", "b": "1"}.get(token, token)
    return stack[::-1] + "E"


def solve_equation(text: str) -> str:
    left, right = text.split("=")
    solutions = [d for d in "01234" if eval(left.replace("x", d)) % 5 == int(right)]
    assert len(solutions) == 1
    return solutions[0]


def missing_duplicate(text: str) -> str:
    half = len(text) // 2
    place = text.index("?")
    return text[(place + half) % len(text)]


def backwards(number: int) -> str:
    return bin(number)[:1:-1] + "E"


def binary_addition(text: str) -> str:
    return backwards(sum(int(part[::-1], 2) for part in text.split("+")))


def binary_multiplication(text: str) -> str:
    return backwards(math.prod(int(part[::-1], 2) for part in text.split("+")))


def compute_sqrt(text: str) -> str:
    number, root = int(text, 2), 0
    for bit in reversed(range(len(text))):
        if (root + 2**bit) ** 2 <= number:
            root += 2**bit
    return bin(root)[2:].zfill(math.ceil(len(text) / 2))


# By name: characters of the input ids, the oracle, placeholders of an input, shortest input.
Oracle = tuple[str, Callable[[str], str], Callable[[int], int], int]
ORACLES: dict[str, Oracle] = {
    "even_pairs": ("01", even_pairs, lambda n: 1, 1),
    "modular_arithmetic": ("01234+-*", lambda text: str(eval(text) % 5), lambda n: 1, 1),
    "parity_check": ("01", lambda text: str(text.count("1") % 2), lambda n: 1, 1),
    "cycle_navigation": ("012", cycle_navigation, lambda n: 1, 1),
    "stack_manipulation": ("01pab", stack_manipulation, lambda n: n + 1, 2),
    "reverse_string": ("01", lambda text: "".join(reversed(text)), lambda n: n, 1),
    "modular_arithmetic_brackets": (
        "01234+-*()",
        lambda text: str(eval(text) % 5),
        lambda n: 1,
        1,
    ),
    "solve_equation": ("01234+-x()=", solve_equation, lambda n: 1, 3),
    "duplicate_string": ("01", lambda text: text + text, lambda n: 2 * n, 1),
    "missing_duplicate": ("01?", missing_duplicate, lambda n: 1, 2),
    "odds_first": (
        "01",
        lambda text: "".join(text[i] for parity in (0, 1) for i in range(parity, len(text), 2)),
        lambda n: n,
        1,
    ),
    "binary_addition": ("01+", binary_addition, lambda n: n + 1, 3),
    "binary_multiplication": ("01+", binary_multiplication, lambda n: n, 3),
    "compute_sqrt": ("01", compute_sqrt, lambda n: math.ceil(n / 2), 1),
    "bucket_sort": ("01234", lambda text: "".join(sorted(text)), lambda n: n, 1),
}
SINGLE = [name for name, (_, _, outputs, _) in ORACLES.items() if outputs(9) == 1]


def draw(name: str, length: int, *seed: int) -> tuple[str, str, np.ndarray, np.ndarray]:
    """Input and output as text, ids and labels."""
    characters = ORACLES[name][0]
    task = generator_class(f"chomsky_{name}")()
    example = task.example(length, np.random.default_rng([3, length, *seed]))
    ids, labels = example.input_ids, example.labels
    size = int((ids != task.vocabulary - 1).sum())
    answers = labels[labels != -100].tolist()
    ended = name in ("stack_manipulation", "binary_addition", "binary_multiplication")
    output = "".join("E" if ended and one == 2 else str(one) for one in answers)
    return "".join(characters[one] for one in ids[:size]), output, ids, labels


def shortest_length(name: str) -> int:
    _, _, outputs, shortest = ORACLES[name]
    return shortest + outputs(shortest)


def test_all_are_here() -> None:
    names = [name.removeprefix("chomsky_") for name in GENERATORS if name.startswith("chomsky_")]
    assert names == list(ORACLES)


@pytest.mark.parametrize("name", ORACLES)
def test_outputs_and_where_they_are_asked(name: str) -> None:
    _, oracle, outputs, _ = ORACLES[name]
    task = generator_class(f"chomsky_{name}")()
    shortest = shortest_length(name)
    for length in [*range(shortest, 48), 101, 256]:
        task.check(length)
        for seed in range(6):
            text, output, ids, labels = draw(name, length, seed)
            assert output == oracle(text)
            size = len(text)
            assert len(ids) == size + outputs(size) <= length
            assert (ids[size:] == task.vocabulary - 1).all()
            asked = np.flatnonzero(labels != -100)
            assert (asked == size + np.arange(len(output))).all()
            if "E" not in output:
                assert len(output) == outputs(size)
            pairs = name in ("modular_arithmetic", "missing_duplicate")
            longer = size + (2 if pairs else 1)
            assert longer + outputs(longer) > length


@pytest.mark.parametrize("name", ORACLES)
def test_every_symbol_occurs_and_every_answer(name: str) -> None:
    drawn = [draw(name, 41, seed)[:2] for seed in range(300)]
    assert set("".join(text for text, _ in drawn)) == set(ORACLES[name][0])
    answers = "".join(output for _, output in drawn)
    values = set("01234") if {"2", "3", "4"} & set(answers) else set("01")
    assert set(answers) - {"E"} == values


@pytest.mark.parametrize("name", SINGLE)
def test_classes_are_balanced(name: str) -> None:
    answers = [draw(name, 21, seed)[1] for seed in range(1000)]
    classes = sorted(set(answers))
    shares = np.array([answers.count(one) / 1000 for one in classes])
    # Products favour 0; the others are uniform, within four standard errors.
    limit = 0.2 if "modular" in name else 4 * math.sqrt(0.25 / 1000)
    assert np.abs(shares - 1 / len(classes)).max() < limit


def test_parts_are_of_any_length() -> None:
    heads = {len(draw("binary_addition", 21, seed)[0].split("+")[0]) for seed in range(200)}
    assert heads == set(range(1, 9))  # of ten tokens of input
    places = {draw("missing_duplicate", 11, seed)[0].index("?") for seed in range(200)}
    assert places == set(range(10))
    heights = set()
    for seed in range(200):
        text = draw("stack_manipulation", 21, seed)[0]
        heights.add(len(text) - len(text.lstrip("01")))
    assert heights == set(range(1, 10))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("even_pairs", ["01"]),
        ("parity_check", ["01"]),
        ("cycle_navigation", ["012"]),
        ("modular_arithmetic", ["01234", "+-*"]),
        ("reverse_string", ["01"]),
        ("stack_manipulation", ["01", "pab"]),
        ("modular_arithmetic_brackets", ["01234", "+*"]),
        ("duplicate_string", ["01"]),
        ("missing_duplicate", ["01"]),
        ("odds_first", ["01"]),
        ("bucket_sort", ["01234"]),
    ],
)
def test_symbols_are_drawn_evenly(name: str, kinds: list[str]) -> None:
    text = "".join(draw(name, 41, seed)[0] for seed in range(300))
    for kind in kinds:
        counts = np.array([text.count(symbol) for symbol in kind])
        assert np.abs(counts / counts.sum() - 1 / len(kind)).max() < 0.04


def test_expressions_are_cut_anywhere() -> None:
    """Of twelve tokens, the first part of `(first operator second)` has 1 to 8."""
    sizes = []
    for seed in range(800):
        text, depth, before = draw("modular_arithmetic_brackets", 13, seed)[0], 0, "("
        for place, symbol in enumerate(text):
            depth += {"(": 1, ")": -1}.get(symbol, 0)
            if depth == 1 and symbol in "+-*" and before in "01234)":
                sizes.append(place - 1)
            before = symbol
    assert len(sizes) == 800
    counts = np.bincount(sizes, minlength=9)
    assert np.abs(counts[1:] - 100).max() < 4 * math.sqrt(100)
    assert len(counts) == 9


def test_any_number_of_an_equation_is_unknown() -> None:
    """Of `(1+2)=3` three of five places lead to the first number: two before, one behind it."""
    places = [draw("solve_equation", 8, seed)[0].index("x") for seed in range(1000)]
    assert set(places) == {1, 3}
    assert places.count(1) / 1000 == pytest.approx(3 / 5, abs=4 * math.sqrt(0.24 / 1000))


def test_small_numbers_are_uniform() -> None:
    """Square roots of 1 .. 7, of three bits, and no 0."""
    texts = [draw("compute_sqrt", 5, seed)[0] for seed in range(1400)]
    counts = np.bincount([int(text, 2) for text in texts], minlength=8)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 200).max() < 4 * math.sqrt(200)


@pytest.mark.parametrize("name", ORACLES)
def test_too_short(name: str) -> None:
    needed = shortest_length(name)
    with pytest.raises(UserError) as caught:
        generator_class(f"chomsky_{name}")().check(needed - 1)
    assert str(caught.value) == (
        f"chomsky_{name}: needs at least {needed} tokens, got {needed - 1}"
    )
