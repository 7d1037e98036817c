"""MQAR follows its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlm.data import ByteTokenizer, DataConfig, PackedDataset, make_mqar
from memlm.data.mqar import make_mqar_overwrite, rewritten_keys
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
    assert (example.stale == -100).all()
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
        found = example.input_ids[others]
        assert len(set(found.tolist())) > 5
        # Of all ids: the chance of one half alone is below 2**-20.
        assert found.min() < vocab_size // 2 <= found.max() < vocab_size


def _unlikeliness(places: list[int], shares: np.ndarray) -> float:
    """How many standard deviations chi-squared lies above its mean."""
    counts = np.bincount(places, minlength=len(shares))
    assert len(counts) == len(shares)
    expected = shares * len(places)
    freedom = len(shares) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power: float) -> None:
    gaps = []
    rng = np.random.default_rng(3)
    for _ in range(3000):
        example = make_mqar(256, 64, 1, rng, power)
        gaps.append((int(np.flatnonzero(example.labels != -100)[0]) - 2) // 2)
    weights = np.arange(1, 32) ** (power - 1)
    assert _unlikeliness(gaps, weights / weights.sum()) < 4
    steeper = np.arange(1, 32) ** (power - 1.4)
    assert _unlikeliness(gaps, steeper / steeper.sum()) > 20


def test_keys_and_values_are_drawn_evenly() -> None:
    rng = np.random.default_rng(4)
    examples = [make_mqar(22, 40, 5, rng) for _ in range(1500)]
    keys = np.concatenate([example.input_ids[0:10:2] for example in examples]) - 1
    values = np.concatenate([example.input_ids[1:10:2] for example in examples]) - 11
    assert _unlikeliness(keys.tolist(), np.full(10, 0.1)) < 4
    assert _unlikeliness(values.tolist(), np.full(11, 1 / 11)) < 4


def test_one_key_is_asked_for_after_the_other_with_what_is_left() -> None:
    """Two queries: the pair of gaps (a, b) has the chance p_a p_b / (1 - p_a)."""
    rng = np.random.default_rng(5)
    weights = np.arange(1, 7) ** -0.99
    shares = weights / weights.sum()
    places = []
    for _ in range(4000):
        example = make_mqar(64, 16, 2, rng)
        first, second = (
            (int(np.flatnonzero(example.input_ids[4:] == key)[0])) // 2
            for key in example.input_ids[0:4:2]
        )
        places.append(6 * first + second)
    expected = shares[:, None] * shares[None, :] / (1 - shares[:, None])
    kept = [6 * a + b for a in range(6) for b in range(6) if a != b]
    assert _unlikeliness(np.searchsorted(kept, places).tolist(), expected.ravel()[kept]) < 4


@given(
    st.sampled_from([(64, 64, 4), (256, 128, 8), (8192, 256, 16), (39, 40, 5), (40, 60, 10)]),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.integers(0, 2**32),
)
def test_the_last_value_wins(sizes: tuple[int, int, int], share: float, seed: int) -> None:
    vocab_size, length, pairs = sizes
    example = make_mqar_overwrite(
        vocab_size, length, pairs, np.random.default_rng(seed), overwritten=share
    )
    twice = rewritten_keys(pairs, share)
    context = example.input_ids[: example.context_length]
    assert example.context_length == 2 * (pairs + twice)
    keys, values = context[0::2].tolist(), context[1::2].tolist()
    assert len(set(keys)) == pairs
    assert len(set(values)) == len(values)
    assert sorted(map(keys.count, set(keys))) == [1] * (pairs - twice) + [2] * twice
    assert 1 <= min(keys) <= max(keys) < vocab_size // 2 <= min(values)
    assert max(values) < vocab_size
    last = dict(zip(keys, values, strict=True))
    first = dict(zip(reversed(keys), reversed(values), strict=True))
    queries = np.flatnonzero(example.labels != -100)
    assert (queries % 2 == 0).all()
    assert queries.min() >= example.context_length
    asked = example.input_ids[queries].tolist()
    assert sorted(asked) == sorted(last)
    assert example.labels[queries].tolist() == [last[key] for key in asked]
    stale = [first[key] if keys.count(key) == 2 else -100 for key in asked]
    assert example.stale[queries].tolist() == stale
    others = np.setdiff1d(np.arange(length), queries)
    assert (example.stale[others] == -100).all()
    behind = others[others >= example.context_length]
    assert (example.input_ids[behind] == 0).all()


def test_a_rewrite_stands_anywhere_behind_the_first_write() -> None:
    """Of one key written twice among three writes: the orders AAB, ABA and BAA, as often."""
    rng = np.random.default_rng(6)
    orders = []
    for _ in range(3000):
        example = make_mqar_overwrite(64, 16, 2, rng, overwritten=0.5)
        keys = example.input_ids[0:6:2].tolist()
        orders.append([keys.count(key) for key in keys].index(1))
    assert _unlikeliness(orders, np.full(3, 1 / 3)) < 4


def test_gaps_behind_rewrites_follow_the_power_law() -> None:
    rng = np.random.default_rng(7)
    gaps = []
    for _ in range(2000):
        example = make_mqar_overwrite(64, 64, 1, rng, overwritten=1.0)
        gaps.append((int(np.flatnonzero(example.labels != -100)[0]) - 4) // 2)
    weights = np.arange(1, 31) ** -0.99
    assert _unlikeliness(gaps, weights / weights.sum()) < 4


@pytest.mark.parametrize(
    ("sizes", "share", "message"),
    [
        ((64, 64, 4), 0.0, r"overwritten must be in \(0, 1\], got 0.0"),
        ((64, 64, 4), 1.5, r"overwritten must be in \(0, 1\], got 1.5"),
        ((64, 64, 0), 0.5, "pairs must be >= 1"),
        ((16, 64, 8), 0.5, "8 pairs need a vocabulary of 18, got 16"),
        ((22, 64, 8), 0.5, "8 pairs, 4 of them written twice, need a vocabulary of 23, got 22"),
        ((64, 39, 8), 0.5, "8 pairs, 4 of them written twice, need 40 tokens, got rows of 39"),
    ],
)
def test_rewrites_that_do_not_fit(sizes: tuple[int, int, int], share: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mqar_overwrite(*sizes, np.random.default_rng(0), overwritten=share)
    example = make_mqar_overwrite(23, 40, 8, np.random.default_rng(0))
    assert example.context_length == 24


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
    for vocab_size, message in (
        (1000, "vocab_size 1000 is larger"),
        (0, "8 pairs need a vocabulary of 18, got 0"),
    ):
        sources = [{"type": "mqar", "vocab_size": vocab_size}]
        with pytest.raises(UserError, match=message):
            PackedDataset(DataConfig(sources=sources), tokenizer, "train", 128)
