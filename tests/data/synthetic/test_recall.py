"""Associative recall and induction heads follow their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlm.data.synthetic.associative_recall import AssociativeRecall
from memlm.data.synthetic.induction import Induction
from memlm.errors import UserError


def lookup(tokens: list[int], mark: int) -> int:
    """The value behind the key that follows the two marks at the end."""
    end = tokens.index(mark)
    assert tokens[end:-1] == [mark, mark]
    table = {}
    for place in range(0, end, 2):
        assert tokens[place] not in table
        table[tokens[place]] = tokens[place + 1]
    return table[tokens[-1]]


@given(st.integers(5, 70), st.integers(0, 2**32))
def test_the_value_of_the_key_is_asked(length: int, seed: int) -> None:
    task = AssociativeRecall(keys=40, values=9)
    example = task.example(length, np.random.default_rng(seed))
    tokens = example.input_ids.tolist()
    assert len(tokens) == length - (length + 1) % 2
    assert example.labels.tolist() == [-100] * (len(tokens) - 1) + [lookup(tokens, 49)]
    assert example.context_length == len(tokens) - 3
    assert all(0 <= key < 40 for key in tokens[0:-3:2])
    assert all(40 <= value < 49 for value in tokens[1:-3:2])


def test_all_keys_values_and_places_are_drawn() -> None:
    task, rng = AssociativeRecall(keys=4, values=3), np.random.default_rng(0)
    examples = [task.example(9, rng) for _ in range(3000)]
    rows = np.stack([example.input_ids for example in examples])
    for column in (0, 2, 4):
        assert np.abs(np.bincount(rows[:, column], minlength=4) / 3000 - 1 / 4).max() < 0.04
        values = np.bincount(rows[:, column + 1] - 4, minlength=3)
        assert np.abs(values / 3000 - 1 / 3).max() < 0.04
    asked = (rows[:, [0, 2, 4]] == rows[:, [8]]).mean(axis=0)
    assert np.abs(asked - 1 / 3).max() < 0.04
    # With replacement: all values of three pairs are one in a ninth of the examples.
    alike = (rows[:, [1]] == rows[:, [3, 5]]).all(axis=1).mean()
    assert alike == pytest.approx(1 / 9, abs=0.03)


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"keys": 0}, 9, "needs keys >= 1 and values >= 2, got 0 and 128"),
        ({"values": 1}, 9, "needs keys >= 1 and values >= 2, got 128 and 1"),
        ({}, 4, "needs at least 5 tokens, got 4"),
        ({"keys": 26}, 57, "27 pairs in 57 tokens need as many keys, got 26"),
    ],
)
def test_recall_that_cannot_be(options: dict, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AssociativeRecall(**options).check(length)
    AssociativeRecall(keys=26).check(56)


def followers(tokens: list[int], special: int) -> list[int]:
    """The right answer behind each token: what followed the first special one, from the 2nd on."""
    answers, follower = [], None
    for place, token in enumerate(tokens):
        if token == special and follower is not None:
            answers.append(follower)
        else:
            answers.append(-100)
        if token == special and follower is None and place + 1 < len(tokens):
            follower = tokens[place + 1]
    return answers


@given(st.integers(2, 5), st.integers(0, 40), st.integers(3, 16), st.integers(0, 2**32))
def test_the_follower_is_asked(occurrences: int, more: int, kinds: int, seed: int) -> None:
    task = Induction(tokens=kinds, occurrences=occurrences)
    length = 2 * occurrences - 1 + more
    task.check(length)
    example = task.example(length, np.random.default_rng(seed))
    tokens = example.input_ids.tolist()
    assert len(tokens) == length
    assert tokens.count(kinds - 1) == occurrences
    assert tokens[-1] == kinds - 1
    assert max(tokens) == kinds - 1
    assert min(tokens) >= 0
    assert example.labels.tolist() == followers(tokens, kinds - 1)
    # What followed once follows always, so that every special token can be answered.
    places = [place for place, token in enumerate(tokens[:-1]) if token == kinds - 1]
    assert len({tokens[place + 1] for place in places}) == 1
    assert tokens[places[0] + 1] != kinds - 1
    assert example.context_length == (length - 1 if occurrences == 2 else 0)


def test_places_and_followers_are_drawn_evenly() -> None:
    rng = np.random.default_rng(1)
    examples = [Induction(tokens=5).example(8, rng) for _ in range(3000)]
    places = [example.input_ids.tolist().index(4) for example in examples]
    assert np.abs(np.bincount(places, minlength=6) / 3000 - 1 / 6).max() < 0.03
    answers = [example.labels[-1] for example in examples]
    assert np.abs(np.bincount(answers, minlength=4) / 3000 - 1 / 4).max() < 0.03
    # Two of three among five tokens: 0 and 2, 0 and 3, 1 and 3.
    rows = [Induction(tokens=5, occurrences=3).example(6, rng).input_ids for _ in range(3000)]
    pairs = [tuple(np.flatnonzero(row[:-1] == 4).tolist()) for row in rows]
    assert set(pairs) == {(0, 2), (0, 3), (1, 3)}
    for pair in set(pairs):
        assert pairs.count(pair) / 3000 == pytest.approx(1 / 3, abs=0.04)


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"tokens": 2}, 9, "tokens must be >= 3, got 2"),
        ({"occurrences": 1}, 9, "occurrences must be >= 2, got 1"),
        ({}, 2, "2 occurrences need at least 3 tokens, got 2"),
        ({"occurrences": 4}, 6, "4 occurrences need at least 7 tokens, got 6"),
    ],
)
def test_induction_that_cannot_be(options: dict, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Induction(**options).check(length)
