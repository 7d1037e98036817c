"""Bigrams: followers of triggers, the chain elsewhere, measures by hand."""

import math

import numpy as np
import pytest

from memlm.data.synthetic.base import Example
from memlm.data.synthetic.bigrams import Bigrams, _world
from memlm.errors import UserError


@pytest.mark.parametrize("fixed", [True, False])
def test_kinds_and_followers(fixed: bool) -> None:
    task = Bigrams(tokens=12, triggers=3, fixed_triggers=fixed, concentration=1.0)
    sets = set()
    for seed in range(20):
        example = task.example(200, np.random.default_rng(seed))
        ids, labels = example.input_ids.tolist(), example.labels.tolist()
        assert labels[:-1] == ids[1:]
        first: dict[int, int] = {}
        others = set()
        for token, label, kind in zip(ids, labels, example.marks["kinds"].tolist(), strict=True):
            if kind == 1:
                others.add(token)
            else:
                assert kind == (2 if token in first else 0)
                assert first.setdefault(token, label) == label
        assert len(first) <= 3
        assert not others & first.keys()
        sets.add(frozenset(first))
    assert len(set().union(*sets)) == 3 if fixed else len(set().union(*sets)) > 3


def test_other_tokens_follow_the_chain() -> None:
    task = Bigrams(tokens=5, triggers=1, concentration=1.0, world_seed=3)
    chain, start = _world(3, 5, 1.0)
    assert start @ chain == pytest.approx(start)
    counts = np.zeros((5, 5))
    for seed in range(30):
        example = task.example(1000, np.random.default_rng(seed))
        chosen = example.marks["kinds"] == 1
        np.add.at(counts, (example.input_ids[chosen], example.labels[chosen]), 1)
    # The trigger is the most frequent token of the chain.
    (trigger,) = np.flatnonzero(counts.sum(1) == 0)
    assert trigger == start.argmax()
    for token in set(range(5)) - {trigger}:
        # Five standard deviations.
        room = 5 * 0.5 / math.sqrt(counts[token].sum())
        assert counts[token] / counts[token].sum() == pytest.approx(chain[token], abs=room)


def test_measures_by_hand() -> None:
    task = Bigrams(tokens=4, triggers=1, concentration=1.0)
    chain, _ = _world(0, 4, 1.0)
    ids, labels = np.array([0, 1, 2, 0, 3, 0]), np.array([1, 2, 0, 3, 0, 1])
    example = Example(ids, labels, marks={"kinds": np.array([1, 0, 1, 1, 2, 2])})
    guesses = np.array([1, 2, 3, 3, 0, 0])  # of the chain two of three, of triggers one of two
    losses = np.array([1.0, 9, 2.0, 3.0, 9, 9], dtype=np.float32)
    found = task.measures(task.counts(example, guesses) | task.loss_counts(example, losses))
    rows = [chain[token].tolist() for token in (0, 2, 0)]
    entropy = -sum(p * math.log2(p) for row in rows for p in row)
    assert found == pytest.approx(
        {
            "in_context_accuracy": 1 / 2,
            "global_accuracy": 2 / 3,
            "global_best": sum(map(max, rows)) / 3,
            "global_kl_bits": (6 / math.log(2) - entropy) / 3,
        }
    )


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"triggers": 0}, 9, "needs 1 <= triggers < tokens, got 0 and 64"),
        ({"triggers": 64}, 9, "needs 1 <= triggers < tokens"),
        ({"concentration": 0.0}, 9, "concentration must be >= 0.01, got 0.0"),
        ({"world_seed": -1}, 9, "world_seed must be >= 0"),
        ({}, 1, "needs at least 2 tokens, got 1"),
    ],
)
def test_what_cannot_be(options: dict, length: int, message: str) -> None:
    with pytest.raises(UserError, match=f"bigrams: {message}"):
        Bigrams(**options).check(length)
