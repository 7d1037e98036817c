"""Multi-query associative recall (Arora et al., 2024, "Zoology"): training rows and evaluation.

Definition: keys 1 .. V/2-1 and values V/2 .. V-1 are drawn without replacement; a sequence starts
with key value key value ..., and every key is asked for once more behind them, at even offsets
drawn without replacement with p proportional to a * g**(a - 1). The target at a query is its
value; no other position has a target, and the value itself never follows the query.

In the overwrite variant some keys are written twice and the last value is right, so that a memory
that only adds what it reads gives itself away by naming the first one.
"""

from dataclasses import dataclass

import numpy as np

from memlm.errors import UserError

IGNORED = -100


@dataclass(frozen=True)
class MqarExample:
    """One sequence; `input_ids[:context_length]` are the pairs, the rest asks for them."""

    input_ids: np.ndarray  # int64 [length]
    labels: np.ndarray  # int64 [length], the value at each query, -100 elsewhere
    stale: np.ndarray  # int64 [length], at queries of rewritten keys the first value, else -100
    context_length: int  # 2 * pairs, and 2 for every pair that is written again


def make_mqar(
    vocab_size: int,
    length: int,
    pairs: int,
    rng: np.random.Generator,
    power: float = 0.01,
    random_filler: bool = False,
) -> MqarExample:
    """One MQAR sequence of `length` tokens with ids in 0 .. vocab_size - 1.

    Positions that are neither pairs nor queries hold 0, or random ids with `random_filler`.
    `power` is the exponent a of the gap distribution (small: queries close to the pairs).
    Raises UserError when the pairs and their queries do not fit the length or the vocabulary.
    """
    check_mqar(vocab_size, length, pairs)
    half = vocab_size // 2
    keys = 1 + rng.choice(half - 1, size=pairs, replace=False)
    values = half + rng.choice(vocab_size - half, size=pairs, replace=False)
    context = 2 * pairs
    queries = _query_places(context, length, pairs, rng, power)
    if random_filler:
        input_ids = rng.integers(0, vocab_size, size=length)
    else:
        input_ids = np.zeros(length, dtype=np.int64)
    labels = np.full(length, IGNORED, dtype=np.int64)
    input_ids[0:context:2], input_ids[1:context:2] = keys, values
    input_ids[queries], labels[queries] = keys, values
    return MqarExample(input_ids, labels, np.full(length, IGNORED, dtype=np.int64), context)


def make_mqar_overwrite(
    vocab_size: int,
    length: int,
    pairs: int,
    rng: np.random.Generator,
    power: float = 0.01,
    overwritten: float = 0.5,
) -> MqarExample:
    """One MQAR sequence in which some keys get a second value, the right one at their queries.

    The `rewritten_keys(pairs, overwritten)` keys are drawn at random, and all orders of the writes
    are equally likely: a rewrite stands anywhere behind the first write of its key. The values of
    all writes differ, so a first value (`stale`) and a wrong one can be told apart. After zoology's
    forgetting MQAR, which writes all second values behind all first ones and may repeat values.

    Args:
        vocab_size: ids are in 0 .. vocab_size - 1.
        length: tokens of the sequence, a write and a query taking two each.
        pairs: different keys.
        rng: of everything that is drawn.
        power: exponent a of the gap distribution (small: queries close to the pairs).
        overwritten: share of the keys that are written twice, in (0, 1].

    Raises:
        UserError: when writes and queries do not fit the length or the vocabulary.
    """
    check_mqar_overwrite(vocab_size, length, pairs, overwritten)
    twice = rewritten_keys(pairs, overwritten)
    half, writes = vocab_size // 2, pairs + twice
    keys = 1 + rng.choice(half - 1, size=pairs, replace=False)
    values = half + rng.choice(vocab_size - half, size=writes, replace=False)
    # Keys are in random order already, so the first of them stand for any.
    order = rng.permutation(np.concatenate([np.arange(pairs), np.arange(twice)]))
    first, last = np.full(pairs, IGNORED), np.full(pairs, IGNORED)
    for key, value in zip(order, values, strict=True):
        first[key], last[key] = last[key], value
    context = 2 * writes
    queries = _query_places(context, length, pairs, rng, power)
    input_ids = np.zeros(length, dtype=np.int64)
    labels, stale = (np.full(length, IGNORED, dtype=np.int64) for _ in range(2))
    input_ids[0:context:2], input_ids[1:context:2] = keys[order], values
    input_ids[queries], labels[queries], stale[queries] = keys, last, first
    return MqarExample(input_ids, labels, stale, context)


def rewritten_keys(pairs: int, overwritten: float) -> int:
    """How many of `pairs` keys are written twice: the share `overwritten`, at least one."""
    return max(1, int(pairs * overwritten + 0.5))


def _query_places(
    context: int, length: int, pairs: int, rng: np.random.Generator, power: float
) -> np.ndarray:
    """Where the keys are asked for, int64 [pairs]: even offsets behind the context."""
    space = (length - context) // 2
    weights = power * np.arange(1, space + 1, dtype=np.float64) ** (power - 1)
    return context + 2 * rng.choice(space, size=pairs, replace=False, p=weights / weights.sum())


def check_mqar(vocab_size: int, length: int, pairs: int) -> None:
    """Raise UserError unless `pairs` pairs fit into the vocabulary and the length."""
    if pairs < 1:
        raise UserError(f"mqar: pairs must be >= 1, got {pairs}")
    if vocab_size // 2 - 1 < pairs:
        raise UserError(
            f"mqar: {pairs} pairs need a vocabulary of {2 * pairs + 2}, got {vocab_size}"
        )
    if length < 4 * pairs:
        raise UserError(f"mqar: {pairs} pairs need {4 * pairs} tokens, got rows of {length}")


def check_mqar_overwrite(vocab_size: int, length: int, pairs: int, overwritten: float) -> None:
    """Raise UserError unless the writes and queries fit into the vocabulary and the length."""
    if not 0 < overwritten <= 1:
        raise UserError(f"mqar: overwritten must be in (0, 1], got {overwritten}")
    check_mqar(vocab_size, length, pairs)
    twice = rewritten_keys(pairs, overwritten)
    writes = pairs + twice
    what = f"{pairs} pairs, {twice} of them written twice,"
    if vocab_size - vocab_size // 2 < writes:
        raise UserError(f"mqar: {what} need a vocabulary of {2 * writes - 1}, got {vocab_size}")
    if length < 2 * writes + 2 * pairs:
        raise UserError(f"mqar: {what} need {2 * writes + 2 * pairs} tokens, got rows of {length}")


class MqarRows:
    """Training rows: row `index` is one MQAR sequence, a pure function of all arguments.

    `number` is that of the source among those of MQAR, so that two do not draw the same rows.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int,
        pairs: int | None,
        seed: int,
        random_filler: bool,
        number: int = 0,
    ) -> None:
        self.pairs = max(1, length // 16) if pairs is None else pairs
        check_mqar(vocab_size, length, self.pairs)
        self.vocab_size, self.length, self.seed = vocab_size, length, seed
        self.random_filler, self.number = random_filler, number

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows `indices` as arrays [len(indices), length] int64; targets in loss group 1."""
        examples = [
            make_mqar(
                self.vocab_size,
                self.length,
                self.pairs,
                np.random.default_rng([self.seed, int(index), self.number]),
                random_filler=self.random_filler,
            )
            for index in indices
        ]
        labels = np.stack([example.labels for example in examples])
        shape = labels.shape
        positions = np.arange(self.length, dtype=np.int64)
        return {
            "input_ids": np.stack([example.input_ids for example in examples]),
            "labels": labels,
            "segment_ids": np.ones(shape, dtype=np.int64),
            "position_ids": np.broadcast_to(positions, shape),
            "loss_groups": (labels != IGNORED).astype(np.int64),
        }
