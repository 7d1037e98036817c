"""Multi-query associative recall (Arora et al., 2024, "Zoology"): training rows and evaluation.

Definition: keys 1 .. V/2-1 and values V/2 .. V-1 are drawn without replacement; a sequence starts
with key value key value ..., and every key is asked for once more behind them, at even offsets
drawn without replacement with p proportional to a * g**(a - 1). The target at a query is its
value; no other position has a target, and the value itself never follows the query.
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
    context_length: int  # 2 * pairs


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
    space = (length - context) // 2
    weights = power * np.arange(1, space + 1, dtype=np.float64) ** (power - 1)
    gaps = rng.choice(space, size=pairs, replace=False, p=weights / weights.sum())
    if random_filler:
        input_ids = rng.integers(0, vocab_size, size=length)
    else:
        input_ids = np.zeros(length, dtype=np.int64)
    labels = np.full(length, IGNORED, dtype=np.int64)
    input_ids[0:context:2], input_ids[1:context:2] = keys, values
    queries = context + 2 * gaps
    input_ids[queries], labels[queries] = keys, values
    return MqarExample(input_ids, labels, context)


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


class MqarRows:
    """Training rows: row `index` is one MQAR sequence, a pure function of (seed, index)."""

    def __init__(
        self, vocab_size: int, length: int, pairs: int | None, seed: int, random_filler: bool
    ) -> None:
        self.pairs = max(1, length // 16) if pairs is None else pairs
        check_mqar(vocab_size, length, self.pairs)
        self.vocab_size, self.length, self.seed = vocab_size, length, seed
        self.random_filler = random_filler

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows `indices` as arrays [len(indices), length] int64; targets in loss group 1."""
        examples = [
            make_mqar(
                self.vocab_size,
                self.length,
                self.pairs,
                np.random.default_rng([self.seed, int(index)]),
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
