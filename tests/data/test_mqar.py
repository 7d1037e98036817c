"""MQAR follows its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlm.data import ByteTokenizer, DataConfig, PackedDataset, make_mqar
from memlm.errors import UserError


@given(
    st.sampled_from([(64, 64, 4), (256, 128, 8), (8192, 256, 16), (22, 40, 10)]),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_definition(sizes: tuple[int, int, int], seed: int, filler: bool) -> None:
    vocab_size, length, pairs = sizes
    rng = np.random.default_rng(seed)
    example = make_mqar(vocab_size, length, pairs, rng, random_filler=filler)
    assert example.context_length == 2 * pairs
    context = example.input_ids[: 2 * pairs]
    keys, values = context[0::2], context[1::2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert keys.min() >= 1
    assert keys.max() < vocab_size // 2 <= values.min()
    assert values.max() < vocab_size
    queries = np.flatnonzero(example.labels != -100)
    assert len(queries) == pairs
    assert queries.min() >= 2 * pairs
    assert (queries % 2 == 0).all()
    answers = dict(zip(keys.tolist(), values.tolist(), strict=True))
    asked = example.input_ids[queries].tolist()
    assert sorted(asked) == sorted(answers)
    assert [answers[key] for key in asked] == example.labels[queries].tolist()
    others = np.setdiff1d(np.arange(2 * pairs, length), queries)
    if not filler:
        assert (example.input_ids[others] == 0).all()
    elif len(others) > 20:
        assert len(set(example.input_ids[others].tolist())) > 5


def test_gaps_follow_the_power_law() -> None:
    first = []
    for seed in range(400):
        example = make_mqar(256, 64, 1, np.random.default_rng(seed))
        first.append((int(np.flatnonzero(example.labels != -100)[0]) - 2) // 2)
    weights = np.arange(1, 32) ** -0.99
    expected = weights[0] / weights.sum()
    assert abs(np.mean(np.array(first) == 0) - expected) < 0.08
    assert max(first) > 20


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((64, 64, 0), "pairs must be >= 1"),
        ((16, 64, 8), "8 pairs need a vocabulary of 18, got 16"),
        ((64, 31, 8), "8 pairs need 32 tokens, got rows of 31"),
    ],
)
def test_what_does_not_fit(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mqar(*sizes, np.random.default_rng(0))
    assert make_mqar(18, 32, 8, np.random.default_rng(0)).context_length == 16


def test_training_rows() -> None:
    tokenizer = ByteTokenizer()
    data = PackedDataset(DataConfig(sources=[{"type": "mqar"}]), tokenizer, "train", 128)
    batch = data.batch([0, 1])
    assert ((batch["loss_groups"] == 1).sum(dim=1) == 8).all()
    assert ((batch["labels"] != -100) == (batch["loss_groups"] == 1)).all()
    assert batch["input_ids"].max() < 256
    assert not np.array_equal(batch["input_ids"][0], batch["input_ids"][1])
    assert np.array_equal(data.row(1)["input_ids"], batch["input_ids"][1])
    with pytest.raises(UserError, match="vocab_size 1000 is larger"):
        sources = [{"type": "mqar", "vocab_size": 1000}]
        PackedDataset(DataConfig(sources=sources), tokenizer, "train", 128)
