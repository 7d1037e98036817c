"""Global and in-context bigrams (Bietti et al., 2023)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from memlm.data.sources import find_files, text_documents
from memlm.data.synthetic.base import Example, Generator
from memlm.errors import UserError

OTHER, GLOBAL, IN_CONTEXT = 0, 1, 2  # of the mark "kinds"
_MOST_CHARACTERS = 4096  # a chain of 128 MiB


@dataclass(frozen=True)
class Bigrams(Generator):
    """A Markov chain in which the triggers of a sequence have one follower each, drawn for it.

    The task of "Birth of a Transformer: A Memory Viewpoint" (Bietti et al., 2023, section 3). What
    follows another token is known from the weights, what follows a trigger from its earlier
    occurrence in the sequence. The global chain is drawn from `world_seed`, each row from a
    symmetric Dirichlet distribution, or counted in the characters of texts, as in the paper; a
    sequence starts with a token of its stationary distribution.
    The next token is asked everywhere; the mark "kinds" is 2 behind a trigger that was followed by
    its follower before, 1 behind tokens that are no triggers, 0 behind the first of a trigger.

    Attributes:
        tokens: states of the chain.
        triggers: of a sequence, all different.
        fixed_triggers: whether they are the most frequent tokens of the chain in every sequence;
            False draws them evenly for each.
        concentration: of the Dirichlet distribution; the smaller, the fewer followers are likely.
        world_seed: of the chain.
        files: texts whose characters the chain is estimated from, named as those of a text source
            (paths, folders or globs); None = the chain is drawn. The states are then the characters
            of the texts in the order of their code points, and `tokens`, `concentration` and
            `world_seed` have to be left out.
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
    files: list[str] | None = None

    @property
    def vocabulary(self) -> int:
        return self.tokens if self.files is None else len(self.start)

    @property
    def chain(self) -> np.ndarray:
        """Probabilities of what follows each state, float64 [vocabulary, vocabulary], read-only."""
        return self._world()[0]

    @property
    def start(self) -> np.ndarray:
        """The stationary distribution of the chain, float64 [vocabulary], read-only."""
        return self._world()[1]

    def trigger_tokens(self) -> np.ndarray:
        """The tokens that can be triggers of a sequence, int64: fixed ones, or all states."""
        if not self.fixed_triggers:
            return np.arange(self.vocabulary)
        return np.argsort(-self.start, kind="stable")[: self.triggers]

    def input_files(self) -> list[Path]:
        return find_files(self.files) if self.files is not None else []

    def _world(self) -> tuple[np.ndarray, np.ndarray]:
        if self.files is None:
            return _drawn_world(self.world_seed, self.tokens, self.concentration)
        return _counted_world(tuple(self.files))

    def check(self, length: int) -> None:
        if self.files is not None:
            for name in ("tokens", "concentration", "world_seed"):
                if getattr(self, name) != getattr(type(self), name):
                    raise UserError(
                        f"bigrams: {name} is of a drawn chain, and files give this one; leave one "
                        "of them out"
                    )
        if not 1 <= self.triggers < self.vocabulary:
            raise UserError(
                f"bigrams: needs 1 <= triggers < tokens, got {self.triggers} and {self.vocabulary}"
            )
        # Smaller ones give rows that are zero in floating point.
        if self.concentration < 0.01:
            raise UserError(f"bigrams: concentration must be >= 0.01, got {self.concentration}")
        if self.world_seed < 0:
            raise UserError(f"bigrams: world_seed must be >= 0, got {self.world_seed}")
        if length < 2:
            raise UserError(f"bigrams: needs at least 2 tokens, got {length}")

    def example(self, length: int, rng: np.random.Generator) -> Example:
        chain, start = self._world()
        triggers = self.trigger_tokens()
        if not self.fixed_triggers:
            triggers = rng.permutation(triggers)[: self.triggers]
        followers = dict(
            zip(
                triggers.tolist(),
                rng.integers(len(start), size=self.triggers).tolist(),
                strict=True,
            )
        )
        steps = chain.cumsum(1)
        draws = rng.random(length + 1)
        last = len(start) - 1  # a sum of probabilities may round to less than one
        tokens = [min(last, int(start.cumsum().searchsorted(draws[0], "right")))]
        kinds, seen = [], set()
        for draw in draws[1:].tolist():
            token = tokens[-1]
            if token in followers:
                tokens.append(followers[token])
                kinds.append(IN_CONTEXT if token in seen else OTHER)
                seen.add(token)
            else:
                tokens.append(min(last, int(steps[token].searchsorted(draw, "right"))))
                kinds.append(GLOBAL)
        ids = np.array(tokens, dtype=np.int64)
        return Example(ids[:-1], ids[1:], marks={"kinds": np.array(kinds, dtype=np.int64)})

    def counts(self, example: Example, guesses: np.ndarray) -> dict[str, float]:
        chain = self.chain
        right, kinds = guesses == example.labels, example.marks["kinds"]
        rows = chain[example.input_ids[kinds == GLOBAL]]
        logs = np.log(rows, out=np.zeros_like(rows), where=rows > 0)
        return {
            "global": float(len(rows)),
            "global_right": float(right[kinds == GLOBAL].sum()),
            "global_best": float(rows.max(1, initial=0.0).sum()),
            "entropy": float(-(rows * logs).sum()),
            "in_context": float((kinds == IN_CONTEXT).sum()),
            "in_context_right": float(right[kinds == IN_CONTEXT].sum()),
        }

    def loss_counts(self, example: Example, losses: np.ndarray) -> dict[str, float]:
        chosen = losses[example.marks["kinds"] == GLOBAL]
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
def _drawn_world(
    world_seed: int, tokens: int, concentration: float
) -> tuple[np.ndarray, np.ndarray]:
    """The chain [tokens, tokens], row by row what follows, and its stationary distribution."""
    rng = np.random.default_rng(world_seed)
    chain = rng.dirichlet(np.full(tokens, concentration), size=tokens)
    start = np.linalg.matrix_power(chain, 1024).mean(0)
    return _read_only(chain, start / start.sum())


@cache
def _counted_world(files: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The same of the characters of texts; files are read once by a process."""
    try:
        texts = [
            np.frombuffer(document.encode("utf-32-le"), np.uint32)
            for document in text_documents(list(files))
        ]
    except UserError as error:
        raise UserError(f"bigrams: {error}") from error
    characters = np.unique(np.concatenate(texts))
    if len(characters) > _MOST_CHARACTERS:
        raise UserError(
            f"bigrams: the texts of files have {len(characters)} different characters; the most is "
            f"{_MOST_CHARACTERS}"
        )
    counts = np.zeros((len(characters),) * 2)
    for text in texts:
        states = characters.searchsorted(text)
        # The last character is followed by the first: every state has a follower then, and the
        # frequencies of the characters are the stationary distribution.
        np.add.at(counts, (states, np.roll(states, -1)), 1)
    seen = counts.sum(1)
    return _read_only(counts / seen[:, None], seen / seen.sum())


def _read_only(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    for array in arrays:
        array.setflags(write=False)
    return arrays
