"""The n-back task and its measures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlm.data.synthetic.base import Example
from memlm.data.synthetic.n_back import NBack
from memlm.errors import UserError


@given(st.integers(1, 5), st.integers(4, 9), st.integers(1, 60), st.integers(0, 2**32))
def test_definition(n: int, symbols: int, more: int, seed: int) -> None:
    task = NBack(n=n, symbols=symbols)
    task.check(n + more)
    example = task.example(n + more, np.random.default_rng(seed))
    tokens, lures = example.input_ids.tolist(), example.marks["lures"].tolist()
    assert len(tokens) == n + more
    assert min(tokens) >= 2
    assert max(tokens) <= symbols + 1
    assert task.vocabulary == symbols + 2
    for place, token in enumerate(tokens):
        if place < n:
            assert example.labels[place] == -100
            assert lures[place] == 0
            continue
        assert example.labels[place] == int(token == tokens[place - n])
        near = [tokens[place - n - 1]] if place > n else []
        near += [tokens[place - n + 1]] if n > 1 else []
        assert lures[place] == int(token in near and token != tokens[place - n])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_shares_of_targets_and_lures(n: int) -> None:
    task = NBack(n=n, targets=0.4, lures=0.3)
    example = task.example(20_000, np.random.default_rng(3))
    labels, lures = example.labels[n:], example.marks["lures"][n:]
    assert labels.mean() == pytest.approx(0.4, abs=0.02)
    # Now and then all neighbours show the target's symbol, and there can be no lure: at n = 1,
    # where it is the one neighbour, whenever the position before was a target.
    possible = 0.6 if n == 1 else 1.0
    assert lures.mean() == pytest.approx(0.3 * possible, abs=0.04 if n > 1 else 0.02)
    assert np.abs(np.bincount(example.input_ids)[2:] / 20_000 - 1 / 8).max() < 0.02
    none = NBack(n=n, lures=0.0).example(2000, np.random.default_rng(3))
    assert none.marks["lures"].sum() == 0


def test_lures_come_from_both_sides_alike() -> None:
    n = 2
    example = NBack(n=n).example(20_000, np.random.default_rng(6))
    ids, sides = example.input_ids.tolist(), []
    for place in np.flatnonzero(example.marks["lures"]):
        if place > n and ids[place - n - 1] != ids[place - n + 1]:
            one, other = (ids[place] == ids[place - n + side] for side in (-1, 1))
            assert one != other
            # Where the other one shows the target's symbol, there was no choice.
            if ids[place - n] not in (ids[place - n - 1], ids[place - n + 1]):
                sides.append(one)
    assert np.mean(sides) == pytest.approx(0.5, abs=4 * 0.5 / len(sides) ** 0.5)


def test_symbols_that_are_neither_are_drawn_evenly() -> None:
    task, rng = NBack(n=2, symbols=6), np.random.default_rng(4)
    for taken in ({0}, {5}, {2, 3}, {0, 1, 5}):
        found = [task._other(taken, pick) for pick in rng.random(3000)]
        counts = np.bincount(found, minlength=6)
        left = sorted(set(range(6)) - taken)
        assert [int(symbol) for symbol in np.flatnonzero(counts)] == left
        assert np.abs(counts[left] / 3000 - 1 / len(left)).max() < 0.04


def test_measures_by_hand() -> None:
    """Ten targets, of which 8 are found, and 20 others, 5 of them lures, with 4 and 3 alarms."""
    labels = np.array([-100] * 2 + [1] * 10 + [0] * 20)
    lures = np.array([0] * 12 + [1] * 5 + [0] * 15)
    said = np.array([1] * 2 + [1] * 8 + [0, 7] + [1] * 3 + [0] * 2 + [1] + [0] * 14)
    example = Example(np.zeros(32, dtype=np.int64), labels, marks={"lures": lures})
    task = NBack()
    counts = task.counts(example, said)
    assert counts == {
        "targets": 10, "targets_said": 8, "others": 20, "others_said": 4,
        "lures": 5, "lures_said": 3,
    }  # fmt: skip
    measures = task.measures(counts)
    # z(8.5 / 11) = 0.7479 and z(4.5 / 21) = -0.7916, from a table of the normal distribution.
    assert measures == {
        "hit_rate": 0.8,
        "false_alarm_rate": 0.2,
        "lure_false_alarm_rate": 0.6,
        "d_prime": pytest.approx(0.7479 + 0.7916, abs=1e-3),
    }


def test_perfect_and_missing_answers_have_a_d_prime() -> None:
    task = NBack()
    example = task.example(64, np.random.default_rng(5))
    perfect = task.measures(task.counts(example, example.labels))
    assert perfect["hit_rate"] == 1.0
    assert perfect["false_alarm_rate"] == perfect["lure_false_alarm_rate"] == 0.0
    assert 3 < perfect["d_prime"] < 10
    blind = task.measures(task.counts(example, np.full(64, 1)))
    assert blind["hit_rate"] == blind["false_alarm_rate"] == 1.0
    assert abs(blind["d_prime"]) < 0.5
    # Nothing but targets: the other rates are undefined, d' is not.
    sums = {"targets": 2, "targets_said": 2, "others": 0, "others_said": 0}
    only = task.measures(sums | {"lures": 0, "lures_said": 0})
    assert only.keys() == {"hit_rate", "d_prime"}


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"n": 0}, 9, "n must be >= 1, got 0"),
        ({"symbols": 3}, 9, "symbols must be >= 4, got 3"),
        ({"targets": 0.0}, 9, r"targets in \(0, 1\) and lures in \[0, 1 - targets\], got 0.0"),
        ({"lures": 0.6}, 9, r"got 0.5 and 0.6"),
        ({"lures": -0.1}, 9, r"got 0.5 and -0.1"),
        ({"targets": float("nan")}, 9, "got nan and 0.25"),
        ({"n": 3}, 3, "3 steps back need at least 4 tokens, got 3"),
    ],
)
def test_n_back_that_cannot_be(options: dict, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        NBack(**options).check(length)
    for targets in (0.1, 0.3, 0.7, 0.9):
        NBack(targets=targets, lures=round(1 - targets, 1)).check(9)
