"""Parity, counted bit by bit."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memlm.data.synthetic.parity import Parity


@given(st.integers(1, 60), st.integers(0, 2**32))
def test_the_ones_so_far_are_counted(length: int, seed: int) -> None:
    Parity().check(length)
    example = Parity().example(length, np.random.default_rng(seed))
    assert len(example.input_ids) == length
    odd = False
    for bit, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        assert bit in (0, 1)
        odd ^= bit == 1
        assert label == odd
    assert example.context_length == 0


def test_bits_and_answers_are_even_and_independent() -> None:
    """A bit, the next one and the answer behind that: eight cases, each as often."""
    example = Parity().example(40_001, np.random.default_rng(2))
    bits, answers = example.input_ids, example.labels
    counts = np.bincount(4 * bits[:-1] + 2 * bits[1:] + answers[1:], minlength=8)
    # Four standard deviations; neighbours overlap, which is within them.
    assert np.abs(counts - 5000).max() < 4 * math.sqrt(40_000 / 8 * 7 / 8)
