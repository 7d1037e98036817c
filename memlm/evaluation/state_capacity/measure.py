"""What is left of pairs that a rule has stored."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.evaluation.state_capacity.rules import Rule

QUESTIONS = ("nearest", "exact", "rewritten")
_EXACT = 0.9  # cosine
_LEAST_PAIRS = 1024  # asked of every count, over all draws
_LEAST_DRAWS = 4


def random_units(count: int, channels: int, draws: int, seed: int, kind: int) -> Tensor:
    """Points of the unit sphere [draws, count, channels], float32.

    Those of a smaller count are the first of a larger one, draw by draw. Of each seed there are
    three independent kinds, 0 to 2.
    """
    found = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(3 * (seed + draw) + kind)
        found.append(torch.randn(count, channels, generator=generator))
    return F.normalize(torch.stack(found), dim=-1)


def nearest(read: Tensor, values: Tensor, others: Tensor | None = None) -> Tensor:
    """Whether what a key reads has a larger product with its value than with any other value.

    So recall is defined in "Scaling Laws for Associative Memories" (Cabannes, Dohmatob, Bietti,
    2024, arXiv:2310.02984). All values must be of one length.

    Args:
        read: [B, N, D].
        values: [B, N, D], of the same keys.
        others: [B, M, D], more values that could be mistaken for them.

    Returns:
        bool [B, N]; False where what is read is not finite.
    """
    products = read @ values.transpose(1, 2)
    own = products.diagonal(dim1=1, dim2=2)
    rest = products.masked_fill(torch.eye(read.shape[1], dtype=torch.bool), -torch.inf)
    if others is not None:
        rest = torch.cat((rest, read @ others.transpose(1, 2)), -1)
    return (own > rest.amax(-1)) & read.isfinite().all(-1)


def exact(read: Tensor, values: Tensor) -> Tensor:
    """Whether the cosine of what a key reads with its value is at least 0.9: bool [B, N]."""
    cosine = F.cosine_similarity(read, values, dim=-1)
    return (cosine >= _EXACT) & read.isfinite().all(-1)


@torch.no_grad()
def share_recalled(
    rule: Rule, channels: int, count: int, step_size: float, seed: int
) -> dict[str, float]:
    """The share of `count` random pairs that is recalled, over several draws.

    Returns:
        "nearest" and "exact": see the functions of these names. "rewritten": all keys have been
        written before, in another order and with other values, and the newer value is the nearest
        of both sets of values.
    """
    draws = max(_LEAST_DRAWS, math.ceil(_LEAST_PAIRS / count))
    keys, values, older = (random_units(count, channels, draws, seed, kind) for kind in range(3))
    # Channels of unit size, as a normalised value has.
    values, older = values * channels**0.5, older * channels**0.5
    read = rule.store_and_read(keys, values, step_size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    twice = (torch.cat((keys[:, order], keys), 1), torch.cat((older[:, order], values), 1))
    read_twice = rule.store_and_read(*twice, step_size)[:, count:]
    hits = {
        "nearest": nearest(read, values),
        "exact": exact(read, values),
        "rewritten": nearest(read_twice, values, older),
    }
    return {question: float(found.double().mean()) for question, found in hits.items()}


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Of a rule at a size.

    Attributes:
        pairs: the most pairs of which the wanted share was recalled.
        step_size: at which that was.
        curve: {pairs: share recalled} of all counts that were tried at that step size, ascending.
    """

    pairs: int
    step_size: float
    curve: dict[int, float]


def measure(rule: Rule, channels: int, share: float, seed: int) -> dict[str, Capacity]:
    """The capacity of a rule with `channels` channels of keys and values, by question.

    Args:
        rule: the way to store; of its step sizes each question gets the best.
        channels: of keys and values.
        share: of the pairs that must be recalled.
        seed: of the first draw.
    """
    best: dict[str, Capacity] = {}
    for step_size in rule.step_sizes:
        tried: dict[int, dict[str, float]] = {}

        def shares(count: int, step_size=step_size, tried=tried) -> dict[str, float]:
            if count not in tried:
                tried[count] = share_recalled(rule, channels, count, step_size, seed)
            return tried[count]

        for question in QUESTIONS:
            pairs = largest(lambda count, name=question: shares(count)[name] >= share)
            if question not in best or pairs > best[question].pairs:
                curve = {count: tried[count][question] for count in sorted(tried)}
                best[question] = Capacity(pairs, step_size, curve)
    return best


def largest(holds: Callable[[int], bool]) -> int:
    """The largest count that holds, if all below it do: by doubling, then by halving.

    Returns:
        0 where one does not hold.
    """
    if not holds(1):
        return 0
    low, high = 1, 2
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
