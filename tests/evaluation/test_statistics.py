import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlm.evaluation.statistics import bootstrap_mean, paired_proportions, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # published table values of the Wilson score interval
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), Statistics in Medicine 17:857, table I
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson_table(successes, trials, low, high):
    found = wilson(successes, trials)
    assert found.low == pytest.approx(low, abs=1e-4)
    assert found.high == pytest.approx(high, abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_value_and_mirrors(case):
    successes, trials = case
    found, mirror = wilson(successes, trials), wilson(trials - successes, trials)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low == pytest.approx(1 - mirror.high)


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_proportion(successes, trials):
    with pytest.raises(ValueError, match="proportion"):
        wilson(successes, trials)


def _pairs(both, only_first, only_second, neither):
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


def test_paired_proportions_keep_a_width_at_the_edge():
    found = paired_proportions([True] * 96, [False] * 96)
    assert found.value == 1.0
    assert found.high == pytest.approx(1.0)
    assert 0.9 < found.low < 1.0
    same = paired_proportions([True] * 96, [True] * 96)
    assert same.low < 0 < same.high


def test_paired_proportions_use_the_pairing():
    paired = paired_proportions(*_pairs(40, 6, 4, 50))
    crossed = paired_proportions(*_pairs(24, 22, 20, 34))
    assert paired.value == crossed.value == pytest.approx(0.02)
    assert paired.high - paired.low < crossed.high - crossed.low


def test_paired_proportions_cover():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        first = rng.random(60) < 0.7
        second = np.where(rng.random(60) < 0.5, first, rng.random(60) < 0.3)
        found = paired_proportions(first, second)  # true difference 0.7 - 0.5
        inside += not found.excludes(0.2)
    assert 0.91 <= inside / 400 <= 0.99


def test_paired_proportions_need_pairs():
    with pytest.raises(ValueError, match="pair"):
        paired_proportions([True], [True, False])


def test_bootstrap_mean_covers():
    rng = np.random.default_rng(1)
    inside = sum(
        not bootstrap_mean(rng.exponential(2.0, 50), resamples=500).excludes(2.0)
        for _ in range(300)
    )
    assert 0.88 <= inside / 300 <= 0.98


def test_bootstrap_mean_is_deterministic_and_honest_about_one_value():
    values = [0.1, 0.5, 0.2, 0.9]
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean([0.3]).high == math.inf
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([])
