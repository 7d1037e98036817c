"""Facts: one table for all examples, nothing twice, measures by hand."""

import math

import numpy as np
import pytest

from memlm.data.synthetic import SyntheticRows
from memlm.data.synthetic.facts import Facts
from memlm.errors import UserError


def read(task: Facts, ids: list[int], labels: list[int]) -> dict[tuple[int, ...], int]:
    """The facts of an example, object by tokens; each has its answer and comes once."""
    size, known = task.subject_tokens + 1, {}
    assert len(ids) % size == 0
    for start in range(0, len(ids), size):
        fact = tuple(ids[start : start + size])
        assert labels[start : start + size - 1] == [-100] * (size - 1)
        assert fact not in known
        known[fact] = labels[start + size - 1]
    return known


@pytest.mark.parametrize("subject_tokens", [1, 2])
def test_all_examples_are_of_one_table(subject_tokens: int) -> None:
    task = Facts(20, 3, 5, subject_tokens, world_seed=7)
    symbols = 20 if subject_tokens == 1 else 5  # 5 * 5 is the least square of 20 or more
    assert task.vocabulary == symbols + 3 + 5
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(40):
        example = task.example(37, np.random.default_rng(seed))
        assert len(example.input_ids) == 37 - 37 % (subject_tokens + 1)
        found = read(task, example.input_ids.tolist(), example.labels.tolist())
        assert all(seen.get(fact, answer) == answer for fact, answer in found.items())
        seen |= found
    # Every subject with every relation, and the objects as the world's numbers give them.
    numbers = np.random.default_rng(7).integers(0, 5, size=60).tolist()
    expected = {}
    for subject in range(20):
        name = (subject,) if subject_tokens == 1 else (subject // 5, subject % 5)
        for relation in range(3):
            answer = symbols + 3 + numbers[3 * subject + relation]
            expected[*name, symbols + relation] = answer
    assert seen == expected


def test_facts_are_documents_of_training_rows() -> None:
    task = Facts(20, 3, 5, world_seed=7)
    rows = SyntheticRows(task, 32, seed=1, lengths=(3, 3)).batch(np.arange(50))
    assert rows["segment_ids"].max() == 10
    assert (rows["position_ids"] < 3).all()
    whole = task.example(180, np.random.default_rng(0))
    table = read(task, whole.input_ids.tolist(), whole.labels.tolist())
    for ids, labels in zip(rows["input_ids"].tolist(), rows["labels"].tolist(), strict=True):
        for start in range(0, 30, 3):
            assert labels[start + 2] == table[tuple(ids[start : start + 3])]


def test_a_fact_alone_is_drawn_as_several_are() -> None:
    """Rows of single facts are the same whichever of numpy's draws makes them."""
    for facts in (60, 9999, 10_001, 4_000_000):
        for seed in range(40):
            one, other = np.random.default_rng(seed), np.random.default_rng(seed)
            task = Facts(facts, 1, 5, subject_tokens=1)
            for _ in range(3):
                (subject, _) = task.example(3, one).input_ids
                assert subject == other.choice(facts, size=1, replace=False)[0]
            assert one.random() == other.random()


def test_worlds_differ() -> None:
    one, other = (Facts(world_seed=seed).example(300, np.random.default_rng(0)) for seed in (0, 1))
    assert np.array_equal(one.input_ids, other.input_ids)
    # Of 100 objects from 64 kinds, 1.6 agree by chance.
    assert (one.labels == other.labels)[2::3].sum() < 10


def test_measures_by_hand() -> None:
    task = Facts(subjects=100, relations=2, objects=8)
    example = task.example(12, np.random.default_rng(0))
    guesses = np.where(np.arange(12) < 9, example.labels, 0)  # three of four
    bits = np.array([0, 0, 0.5, 0, 0, 1.0, 0, 0, 0.5, 9, 9, 2.0])  # of 9 none is asked
    counts = task.counts(example, guesses)
    losses = task.loss_counts(example, (bits * math.log(2)).astype(np.float32))
    found = task.measures(counts | losses)
    # Mean loss 4 / 4 = 1 bit; of 3 bits a fact 2 are known, 200 facts.
    expected = {"facts": 200.0, "accuracy": 0.75, "loss_bits": 1.0, "bits": 400.0}
    assert found == pytest.approx(expected)
    # Worse than a guess is nothing, not less.
    assert task.measures({"asked": 2, "right": 0, "nats": 2 * 3.5 * math.log(2)})["bits"] == 0


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"subjects": 0}, 3, "needs subjects >= 1"),
        ({"objects": 1}, 3, "objects >= 2, got 1024, 4 and 1"),
        ({"subject_tokens": 3}, 8, "subject_tokens must be 1 or 2, got 3"),
        ({"subjects": 10**8}, 8, "are 400000000 facts; the most is 100000000"),
        ({"world_seed": -1}, 8, "world_seed must be >= 0, got -1"),
        ({}, 2, "a fact needs 3 tokens, got 2"),
        ({"subjects": 2, "relations": 2}, 15, "15 tokens hold 5 different facts, .* has 4"),
    ],
)
def test_what_cannot_be(options: dict, length: int, message: str) -> None:
    with pytest.raises(UserError, match=f"facts: .*{message}|facts: {message}"):
        Facts(**options).check(length)
