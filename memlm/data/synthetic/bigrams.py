"""Global and in-context bigrams (Bietti et al., 2023)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from memlm.data.synthetic.base import Example, Generator
from memlm.errors import UserError

_OTHER, _GLOBAL, _IN_CONTEXT = 0, 1, 2


@dataclass(frozen=True)
class Bigrams(Generator):
    """A Markov chain in which the triggers of a sequence have one follower each, drawn for it.

    The task of "Birth of a Transformer: A Memory Viewpoint" (Bietti et al., 2023, section 3). What
    follows another token is known from the weights, what follows a trigger from its earlier
    occurrence in the sequence. The global chain is drawn from `world_seed`, each row from a
    symmetric Dirichlet distribution; a sequence starts with a token of its stationary distribution.
    The next token is asked everywhere; the mark "kinds" is 2 behind a trigger that was followed by
    its follower before, 1 behind tokens that are no triggers, 0 behind the first of a trigger.

    Attributes:
        tokens: states of the chain.
        triggers: of a sequence, all different.
        fixed_triggers: whether they are the most frequent tokens of the chain in every sequence;
            False draws them evenly for each.
        concentration: of the Dirichlet distribution; the smaller, the fewer followers are likely.
        world_seed: of the chain.
    """

    title = "Bigrams"
    description = (
        "A fixed Markov chain in which some tokens have a follower of this sequence; the next "
        "token is asked everywhere."
    )

    tokens: int = 64
    triggers: int = 5
    fixed_triggers: bool = True
    concentration: float = 0.1
    world_seed: int = 0

    @property
    def vocabulary(self) -> int:
        return self.tokens

    def check(self, length: int) -> None:
        if not 1 <= self.triggers < self.tokens:
            raise UserError(
                f"bigrams: needs 1 <= triggers < tokens, got {self.triggers} and {self.tokens}"
            )
        # Smaller ones give rows that are zero in floating point.
        if self.concentration < 0.01:
            raise UserError(f"bigrams: concentration must be >= 0.01, got {self.concentration}")
        if self.world_seed < 0:
            raise UserError(f"bigrams: world_seed must be >= 0, got {self.world_seed}")
        if length < 2:
            raise UserError(f"bigrams: needs at least 2 tokens, got {length}")

    def example(self, length: int, rng: np.random.Generator) -> Example:
        chain, start = _world(self.world_seed, self.tokens, self.concentration)
        if self.fixed_triggers:
            triggers = np.argsort(-start, kind="stable")[: self.triggers]
        else:
            triggers = rng.permutation(self.tokens)[: self.triggers]
        followers = dict(
            zip(
                triggers.tolist(),
                rng.integers(self.tokens, size=self.triggers).tolist(),
                strict=True,
            )
        )
        steps = chain.cumsum(1)
        draws = rng.random(length + 1)
        last = self.tokens - 1  # a sum of probabilities may round to less than one
        tokens = [min(last, int(start.cumsum().searchsorted(draws[0], "right")))]
        kinds, seen = [], set()
        for draw in draws[1:].tolist():
            token = tokens[-1]
            if token in followers:
                tokens.append(followers[token])
                kinds.append(_IN_CONTEXT if token in seen else _OTHER)
                seen.add(token)
            else:
                tokens.append(min(last, int(steps[token].searchsorted(draw, "right"))))
                kinds.append(_GLOBAL)
        ids = np.array(tokens, dtype=np.int64)
        return Example(ids[:-1], ids[1:], marks={"kinds": np.array(kinds, dtype=np.int64)})

    def counts(self, example: Example, guesses: np.ndarray) -> dict[str, float]:
        chain, _ = _world(self.world_seed, self.tokens, self.concentration)
        right, kinds = guesses == example.labels, example.marks["kinds"]
        rows = chain[example.input_ids[kinds == _GLOBAL]]
        logs = np.log(rows, out=np.zeros_like(rows), where=rows > 0)
        return {
            "global": float(len(rows)),
            "global_right": float(right[kinds == _GLOBAL].sum()),
            "global_best": float(rows.max(1, initial=0.0).sum()),
            "entropy": float(-(rows * logs).sum()),
            "in_context": float((kinds == _IN_CONTEXT).sum()),
            "in_context_right": float(right[kinds == _IN_CONTEXT].sum()),
        }

    def loss_counts(self, example: Example, losses: np.ndarray) -> dict[str, float]:
        chosen = losses[example.marks["kinds"] == _GLOBAL]
        return {"global_nats": float(chosen.sum(dtype=np.float64))}

    def measures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Accuracies behind triggers and behind other tokens, as far as there were any.

        Returns:
            "in_context_accuracy", "global_accuracy", "global_best": accuracy that knowing the
            chain gives on average, "global_kl_bits": mean cross-entropy less the chain's entropy,
            an estimate of the divergence from it that can fall below zero by chance.
        """
        found = {}
        if sums["in_context"]:
            found["in_context_accuracy"] = sums["in_context_right"] / sums["in_context"]
        if count := sums["global"]:
            found["global_accuracy"] = sums["global_right"] / count
            found["global_best"] = sums["global_best"] / count
            nats = sums["global_nats"] - sums["entropy"]
            found["global_kl_bits"] = nats / count / math.log(2)
        return found


@cache
def _world(world_seed: int, tokens: int, concentration: float) -> tuple[np.ndarray, np.ndarray]:
    """The chain [tokens, tokens], row by row what follows, and its stationary distribution."""
    rng = np.random.default_rng(world_seed)
    chain = rng.dirichlet(np.full(tokens, concentration), size=tokens)
    start = np.linalg.matrix_power(chain, 1024).mean(0)
    start /= start.sum()
    chain.setflags(write=False)
    start.setflags(write=False)
    return chain, start
