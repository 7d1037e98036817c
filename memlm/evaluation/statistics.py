"""Intervals for the numbers an evaluation reports. Pure numpy, deterministic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
_PICKS = 1 << 20  # numbers of a bootstrap that are drawn at a time


@dataclass(frozen=True)
class Estimate:
    """A value with its two-sided 95 % interval [low, high]; `count` independent units."""

    value: float
    low: float
    high: float
    count: int

    def excludes(self, number: float) -> bool:
        """Whether `number` lies outside the interval."""
        return number < self.low or number > self.high


def _z() -> float:
    return NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


def wilson(successes: float, trials: int) -> Estimate:
    """Wilson score interval of a proportion (Wilson 1927).

    `successes` may be fractional: with the mean accuracy of rows whose answers depend on each
    other, rows as trials gives an interval that is wide enough.

    Raises:
        ValueError: when there are no trials or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is not a proportion")
    z = _z()
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    half = spread * z / (1 + z * z / trials)
    # The exact bound at 0 and 1 is 0 and 1; rounding would leave 1e-17 and the value outside.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return Estimate(share, low, high, trials)


def paired_proportions(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """Difference of two proportions, first - second, seen on the same trials.

    Newcombe (1998), Statistics in Medicine 17:2635, method 10: the Wilson intervals of both,
    joined with the correlation of the pairs. Unlike a bootstrap it keeps a width when every
    trial agrees (0 % against 100 %).

    Raises:
        ValueError: when the two differ in length or are empty.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"cannot pair {a.size} with {b.size} trials")
    count = int(a.size)
    one, two = wilson(int(a.sum()), count), wilson(int(b.sum()), count)
    both, neither = int((a & b).sum()), int((~a & ~b).sum())
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    product = (
        (both + only_first)
        * (only_second + neither)
        * (both + only_second)
        * (only_first + neither)
    )
    correlation = 0.0
    if product:
        covariance = both * neither - only_first * only_second
        if covariance > 0:  # the method's continuity correction
            covariance = max(covariance - count / 2, 0.0)
        correlation = covariance / math.sqrt(product)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))

    difference = one.value - two.value
    below = reach(one.value - one.low, two.high - two.value)
    above = reach(one.high - one.value, two.value - two.low)
    return Estimate(difference, difference - below, difference + above, count)


def bootstrap_mean(values: Sequence[float], resamples: int = 4000, seed: int = 0) -> Estimate:
    """Mean of independent values with its percentile bootstrap interval.

    Paired differences are given as values: `bootstrap_mean(a - b)`. One value has no interval:
    its bounds are infinite.

    Raises:
        ValueError: when there are no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("the mean of no values has no interval")
    mean = float(array.mean())
    if array.size == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    rng = np.random.default_rng(seed)
    block = max(1, _PICKS // array.size)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    means = [array[rng.integers(0, array.size, (rows, array.size))].mean(axis=1) for rows in sizes]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Estimate(mean, min(float(low), mean), max(float(high), mean), int(array.size))


def estimate(values: Sequence[float], kind: str) -> Estimate:
    """The mean of "hits", "shares" or "losses": Wilson's interval, for losses the bootstrap's."""
    if kind == "losses":
        return bootstrap_mean(values)
    return wilson(min(sum(values), len(values)), len(values))


def paired_difference(first: Sequence[float], second: Sequence[float], kind: str) -> Estimate:
    """The mean of first - second on the same trials: a bootstrap over trials.

    Where all differences of shares are equal, however few they are, a bootstrap would have no
    width: then they count as hits seen on the same trials, or as independent shares.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if kind == "losses" or len(set(differences)) > 1:
        return bootstrap_mean(differences)
    if kind == "hits":
        return paired_proportions([a > 0 for a in first], [b > 0 for b in second])
    return independent_difference(estimate(first, kind), estimate(second, kind))


def independent_difference(first: Estimate, second: Estimate) -> Estimate:
    """first - second of independent trials, from the intervals of both.

    Newcombe (1998), Statistics in Medicine 17:873, method 10, for proportions; Zou and Donner
    (2008), Statistics in Medicine 27:1693, for any value with an interval.
    """
    difference = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(
        difference, difference - below, difference + above, min(first.count, second.count)
    )
