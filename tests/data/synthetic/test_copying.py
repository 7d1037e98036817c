"""Copying and selective copying follow their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlm.data.synthetic.copying import Copying, SelectiveCopying
from memlm.errors import UserError


@pytest.mark.parametrize("cls", [Copying, SelectiveCopying])
@given(st.integers(1, 6), st.integers(4, 16), st.integers(0, 40), st.integers(0, 2**32))
def test_data_is_asked_in_its_order(
    cls: type[Copying], count: int, alphabet: int, noise: int, seed: int
) -> None:
    task = cls(alphabet=alphabet, tokens=count)
    length = 2 * count + noise
    task.check(length)
    example = task.example(length, np.random.default_rng(seed))
    tokens, labels = example.input_ids.tolist(), example.labels.tolist()
    assert len(tokens) == length
    # Read what is neither noise nor a marker, then give it out at the markers.
    kept, expected = [], []
    for token in tokens:
        expected.append(-100)
        if token == alphabet - 1:
            expected[-1] = kept.pop(0)
        elif token != 0:
            kept.append(token)
    assert kept == []
    assert labels == expected
    assert tokens[-count:] == [alphabet - 1] * count
    assert tokens.count(0) == noise
    assert example.context_length == length - count
    if cls is Copying:
        assert tokens[count : count + noise] == [0] * noise


def test_data_is_scattered_evenly() -> None:
    rng = np.random.default_rng(2)
    examples = [SelectiveCopying(alphabet=5, tokens=2).example(7, rng) for _ in range(3000)]
    rows = np.stack([example.input_ids for example in examples])
    assert np.abs((rows[:, :5] != 0).mean(axis=0) - 2 / 5).max() < 0.04
    data = np.concatenate([example.labels[-2:] for example in examples])
    assert np.abs(np.bincount(data, minlength=4)[1:] / 6000 - 1 / 3).max() < 0.03


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"alphabet": 3}, 64, "needs alphabet >= 4 and tokens >= 1, got 3 and 16"),
        ({"tokens": 0}, 64, "needs alphabet >= 4 and tokens >= 1, got 16 and 0"),
        ({}, 31, "16 tokens and as many markers need at least 32 tokens, got 31"),
    ],
)
def test_copying_that_cannot_be(options: dict, length: int, message: str) -> None:
    for cls in (Copying, SelectiveCopying):
        with pytest.raises(UserError, match=message):
            cls(**options).check(length)
        cls().check(32)
