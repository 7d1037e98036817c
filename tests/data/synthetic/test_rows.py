"""Rows of a synthetic task: packing, padding, and what they are a function of."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlm.data.synthetic import Example, Generator, SyntheticRows
from memlm.errors import UserError


@dataclass(frozen=True)
class Odd(Generator):
    """Random tokens 1 .. 9 of an odd number, at most `length`; the sum so far modulo 10 is asked
    at every other place. Too short below three tokens."""

    title = "Odd"
    description = "Sums."

    @property
    def vocabulary(self) -> int:
        return 10

    def check(self, length: int) -> None:
        if length < 3:
            raise UserError(f"odd: needs at least 3 tokens, got {length}")

    def example(self, length: int, rng: np.random.Generator) -> Example:
        tokens = rng.integers(1, 10, size=length - (length + 1) % 2)
        labels = tokens.cumsum() % 10
        labels[::2] = -100
        return Example(tokens, labels)


@given(
    st.integers(3, 60), st.integers(0, 20), st.integers(0, 20), st.integers(0, 9),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
)  # fmt: skip
def test_rows_are_examples_one_behind_another(
    length: int, shortest: int, more: int, seed: int, indices: list[int]
) -> None:
    shortest = min(3 + shortest, length)
    longest = min(shortest + more, length)
    rows = SyntheticRows(Odd(), length, seed, (shortest, longest))
    batch = rows.batch(np.array(indices))
    for name in ("input_ids", "labels", "segment_ids", "position_ids", "loss_groups"):
        assert batch[name].shape == (len(indices), length)
        assert batch[name].dtype == np.int64
    for place in range(len(indices)):
        row = {name: values[place].tolist() for name, values in batch.items()}
        start, number = 0, 1
        while row["segment_ids"][start : start + 1] == [number]:
            size = row["segment_ids"].count(number)
            # As long as was drawn, or one less.
            assert shortest - 1 <= size <= longest
            assert size % 2 == 1
            for step in range(size):
                assert row["segment_ids"][start + step] == number
                assert row["position_ids"][start + step] == step
                answer = sum(row["input_ids"][start : start + step + 1]) % 10
                assert row["labels"][start + step] == (answer if step % 2 else -100)
            start, number = start + size, number + 1
        assert number > 1
        # What is left is too short for another example, and padding.
        assert length - start < shortest
        left = length - start
        assert row["input_ids"][start:] == row["segment_ids"][start:] == [0] * left
        assert row["labels"][start:] == [-100] * left
        assert row["position_ids"][start:] == [0] * left
        assert row["loss_groups"] == [int(label != -100) for label in row["labels"]]


def test_one_example_of_the_row_s_length_by_default() -> None:
    rows = SyntheticRows(Odd(), 9, seed=0).batch(np.arange(5))
    assert (rows["segment_ids"] == 1).all()
    assert (rows["position_ids"] == np.arange(9)).all()
    assert (rows["input_ids"] > 0).all()


def test_lengths_are_drawn_evenly() -> None:
    rows = SyntheticRows(Odd(), 40, seed=1, lengths=(3, 9)).batch(np.arange(2000))
    sizes = (rows["segment_ids"] == 1).sum(axis=1)
    counts = np.bincount(sizes, minlength=10)
    # 3 and 4 give 3 tokens, 5 and 6 five, 7 and 8 seven, 9 nine.
    assert np.flatnonzero(counts).tolist() == [3, 5, 7, 9]
    assert np.abs(counts[[3, 5, 7, 9]] / 2000 - np.array([2, 2, 2, 1]) / 7).max() < 0.04


def test_a_row_is_a_function_of_seed_and_index_alone() -> None:
    def rows(seed: int, number: int = 0) -> SyntheticRows:
        return SyntheticRows(Odd(), 64, seed, (3, 20), number)

    batch = rows(3).batch(np.array([7, 0, 10**9]))
    for place, index in enumerate((7, 0, 10**9)):
        alone = rows(3).batch(np.array([index]))
        for name, values in batch.items():
            assert (values[place] == alone[name][0]).all()
    different = [rows(3).batch(np.arange(3)), rows(4).batch(np.arange(3))]
    different.append(rows(3, number=1).batch(np.arange(3)))
    found = {row.tobytes() for batch in different for row in batch["input_ids"]}
    assert len(found) == 9


@pytest.mark.parametrize(
    ("length", "lengths", "message"),
    [
        (2, None, "odd: needs at least 3 tokens, got 2"),
        (20, (2, 8), "odd: needs at least 3 tokens, got 2"),
        (20, (3, 21), r"lengths: \[3, 21\] do not fit rows of 20 tokens"),
    ],
)
def test_lengths_that_cannot_be(length: int, lengths: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SyntheticRows(Odd(), length, 0, lengths)
