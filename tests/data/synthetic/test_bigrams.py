"""Bigrams: followers of triggers, the chain elsewhere, measures by hand."""

import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from memlm.data.synthetic.base import Example
from memlm.data.synthetic.bigrams import Bigrams
from memlm.errors import UserError
from memlm.evaluation.config import EvaluationConfig, SyntheticOptions
from memlm.evaluation.runner import input_hashes


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
    chain, start = task.chain, task.start
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
    chain = task.chain
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


def test_a_chain_counted_in_texts_by_hand(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("c\u00e9cc", encoding="utf-8")
    (tmp_path / "b.txt").write_text("ca", encoding="utf-8")
    task = Bigrams(triggers=1, files=[str(tmp_path)])
    task.check(9)
    # Circles: c-é-c-c-c and c-a-c. States: a, c, é.
    assert task.vocabulary == 3
    assert task.chain.tolist() == [[0, 1, 0], [1 / 4, 2 / 4, 1 / 4], [0, 1, 0]]
    assert task.start == pytest.approx([1 / 6, 4 / 6, 1 / 6])
    assert task.start @ task.chain == pytest.approx(task.start)
    assert task.trigger_tokens().tolist() == [1]
    example = task.example(50, np.random.default_rng(0))
    assert set(example.labels[example.marks["kinds"] == 1].tolist()) <= {1}
    hashes = input_hashes(
        EvaluationConfig(synthetic=SyntheticOptions(options={"bigrams": {"files": task.files}}))
    )
    assert [Path(path).name for path in hashes] == ["a.txt", "b.txt"]


def test_a_chain_counted_in_shakespeare() -> None:
    data = os.environ.get("MEMLM_DATA")
    if data is None:
        pytest.skip("MEMLM_DATA is not set: the folder with tinyshakespeare/")
    path = Path(data) / "tinyshakespeare" / "input.txt"
    text = path.read_text(encoding="utf-8")
    pairs, singles = Counter(zip(text, text[1:] + text[0], strict=True)), Counter(text)
    task, characters = Bigrams(files=[str(path)]), sorted(singles)
    assert task.vocabulary == len(characters) == 65
    for first, row in zip(characters, task.chain, strict=True):
        wanted = [pairs[first, second] / singles[first] for second in characters]
        assert row == pytest.approx(wanted)
    frequent = [characters[index] for index in task.trigger_tokens()]
    assert frequent == [character for character, _ in singles.most_common(5)]


def test_texts_that_cannot_be(tmp_path) -> None:
    empty, one = tmp_path / "empty.txt", tmp_path / "one.txt"
    empty.write_text("")
    one.write_text("aaa")
    many = tmp_path / "many.txt"
    many.write_text("".join(map(chr, range(0x4E00, 0x4E00 + 4097))), encoding="utf-8")
    for files, message in [
        ([str(tmp_path / "none.txt")], "file .* does not exist"),
        ([str(empty)], "file .* is empty"),
        ([str(one)], "needs 1 <= triggers < tokens, got 5 and 1"),
        ([str(many)], "4097 different characters; the most is 4096"),
    ]:
        with pytest.raises(UserError, match=f"^bigrams: .*{message}"):
            Bigrams(files=files).check(9)
    with pytest.raises(UserError, match="concentration is of a drawn chain"):
        Bigrams(files=[str(one)], concentration=0.5).check(9)


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
