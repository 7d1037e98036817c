"""Closed-book facts: what a model keeps in its weights, in bits (Allen-Zhu and Li, 2024)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from memlm.data.synthetic.base import IGNORED, Example, Generator
from memlm.errors import UserError

_MOST_FACTS = 100_000_000  # a table of 800 MB


@dataclass(frozen=True)
class Facts(Generator):
    """Subjects and relations of a fixed random table, whose objects are asked and never shown.

    Knowledge is counted as in "Physics of Language Models: Part 3.3, Knowledge Capacity Scaling
    Laws" (Allen-Zhu and Li, 2024): by how much knowing the model shortens the code of the answers.
    The table holds an object for every subject and relation, drawn evenly from `world_seed` alone,
    so it is the same in training and evaluation and can only be known from the weights. No fact
    comes twice in an example, and none tells anything about another.

    A fact is one or two tokens of its subject and one of its relation, behind which the object is
    asked. An example holds as many as fit; `lengths: [n, n]` of a training source, with the n
    tokens of one fact, makes every fact a document.

    Attributes:
        subjects, relations: sizes of the table, which has subjects * relations facts.
        objects: possible answers; a fact has log2(objects) bits.
        subject_tokens: 1 = a token for every subject; 2 = two of about sqrt(subjects) tokens, so
            that subjects share tokens and no table of token embeddings can hold the facts.
        world_seed: of the table.
    """

    title = "Facts"
    description = (
        "Subjects and relations of a fixed random table; the object, which is shown nowhere, is "
        "asked."
    )

    subjects: int = 1024
    relations: int = 4
    objects: int = 64
    subject_tokens: int = 2
    world_seed: int = 0

    @property
    def vocabulary(self) -> int:
        return self._symbols + self.relations + self.objects

    @property
    def facts(self) -> int:
        """Facts of the table."""
        return self.subjects * self.relations

    @property
    def _symbols(self) -> int:
        """Different tokens of subjects, the first ids."""
        if self.subject_tokens == 1:
            return self.subjects
        return math.isqrt(max(0, self.subjects - 1)) + 1

    def check(self, length: int) -> None:
        if self.subjects < 1 or self.relations < 1 or self.objects < 2:
            raise UserError(
                "facts: needs subjects >= 1, relations >= 1 and objects >= 2, got "
                f"{self.subjects}, {self.relations} and {self.objects}"
            )
        if self.facts > _MOST_FACTS:
            raise UserError(
                f"facts: {self.subjects} subjects and {self.relations} relations are {self.facts} "
                f"facts; the most is {_MOST_FACTS}"
            )
        if self.subject_tokens not in (1, 2):
            raise UserError(f"facts: subject_tokens must be 1 or 2, got {self.subject_tokens}")
        if self.world_seed < 0:
            raise UserError(f"facts: world_seed must be >= 0, got {self.world_seed}")
        size = self.subject_tokens + 1
        if length < size:
            raise UserError(f"facts: a fact needs {size} tokens, got {length}")
        if length // size > self.facts:
            raise UserError(
                f"facts: {length} tokens hold {length // size} different facts, the table of "
                f"{self.subjects} subjects and {self.relations} relations has {self.facts}"
            )

    def example(self, length: int, rng: np.random.Generator) -> Example:
        size, symbols = self.subject_tokens + 1, self._symbols
        count = length // size
        # The same numbers either way; rows of single facts draw many, and `choice` is slow.
        if count == 1:
            chosen = rng.integers(self.facts, size=1)
        else:
            chosen = rng.choice(self.facts, size=count, replace=False)
        subjects, relations = np.divmod(chosen, self.relations)
        input_ids = np.empty((count, size), dtype=np.int64)
        if size == 3:
            input_ids[:, 0], input_ids[:, 1] = np.divmod(subjects, symbols)
        else:
            input_ids[:, 0] = subjects
        input_ids[:, -1] = symbols + relations
        labels = np.full((count, size), IGNORED, dtype=np.int64)
        table = _table(self.world_seed, self.facts, self.objects)
        labels[:, -1] = symbols + self.relations + table[chosen]
        return Example(input_ids.reshape(-1), labels.reshape(-1))

    def counts(self, example: Example, guesses: np.ndarray) -> dict[str, float]:
        asked = example.labels != IGNORED
        right = (guesses == example.labels) & asked
        return {"asked": float(asked.sum()), "right": float(right.sum())}

    def loss_counts(self, example: Example, losses: np.ndarray) -> dict[str, float]:
        return {"nats": float(losses[example.labels != IGNORED].sum(dtype=np.float64))}

    def measures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What is known of the table, estimated from the facts that were asked.

        Returns:
            "facts": those of the table, "accuracy": share of right answers, "loss_bits": mean
            cross-entropy of an object among all tokens, "bits": kept of the whole table,
            facts * max(0, log2(objects) - loss_bits).
        """
        loss = sums["nats"] / sums["asked"] / math.log(2)
        return {
            "facts": float(self.facts),
            "accuracy": sums["right"] / sums["asked"],
            "loss_bits": loss,
            "bits": self.facts * max(0.0, math.log2(self.objects) - loss),
        }


@cache
def _table(world_seed: int, facts: int, objects: int) -> np.ndarray:
    """The object of every fact, int64 [facts], subject by subject; not to be written to."""
    table = np.random.default_rng(world_seed).integers(0, objects, size=facts)
    table.setflags(write=False)
    return table
