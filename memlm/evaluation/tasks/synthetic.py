"""The synthetic tasks of memlm.data.synthetic: examples of token ids, the same as in training.

The part of an example that asks nothing is read as a context, so that memories can be reset or
swapped behind it; the rest is read in one pass, and an example's score is the share of its answers
that are the most likely next token. Answers of an example are not independent, so intervals count
examples.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memlm.data.config import parse_generator
from memlm.data.synthetic import Example, accuracy
from memlm.errors import UserError
from memlm.evaluation.conditions import Pass, Plan
from memlm.evaluation.costs import Meter
from memlm.evaluation.prompts import Context
from memlm.evaluation.scoring import guess_and_score
from memlm.evaluation.subject import Subject
from memlm.evaluation.tasks.base import PLAIN, Record, Setting, Task, Tools

_APART = ("reset", "swapped")  # what is done between a context and its questions


class Synthetic(Task):
    """The task of that name, with the options of the config."""

    metric = "accuracy (%)"
    axis = "length (tokens)"
    kind = "shares"

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        self.options = tools.config.synthetic
        self.generator = parse_generator(
            name, self.options.options.get(name, {}), f"synthetic.options.{name}"
        )
        self.title, self.description = self.generator.title, self.generator.description
        for length in self.options.all_lengths:
            self.generator.check(length)
        if self.generator.vocabulary > len(tools.tokenizer):
            raise UserError(
                f"{name}: needs {self.generator.vocabulary} token ids, the tokenizer of the model "
                f"has {len(tools.tokenizer)}"
            )

    def settings(self) -> list[Setting]:
        lengths = self.options.all_lengths
        return [Setting(str(length), self.options.rows, length) for length in lengths]

    def passes(self, plan: Plan) -> int:
        return sum(one.variant == PLAIN for one in plan.passes)

    def run(self, setting: Setting, trials: range, subject: Subject, meter: Meter) -> list[Record]:
        length = int(setting.label)
        drawn = {index: self.generator.example(length, self.rng(length, index)) for index in trials}
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, example in drawn.items():
            alike[len(example.input_ids), example.context_length].append(index)
        records = []
        for one in subject.plan.passes:
            if one.variant != PLAIN:
                continue
            for group in alike.values():
                found = self._guess([drawn[index] for index in group], subject, one, meter)
                for condition, answers in found.items():
                    records += [
                        self._record(setting, index, condition, drawn[index], *row)
                        for index, *row in zip(group, *answers, strict=True)
                    ]
        return records

    def _guess(
        self, examples: Sequence[Example], subject: Subject, one: Pass, meter: Meter
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Answers to examples of one shape by condition.

        Those that are most likely, int64 [B, T], and the losses of the right ones, float32 [B, T].
        """
        ids = np.stack([example.input_ids for example in examples])
        labels = np.stack([example.labels for example in examples])
        cut = examples[0].context_length
        found, states = {}, None
        with one.ablation():
            if cut:
                with meter.measure("read", cut * len(examples)):
                    contexts = [Context([row[:cut]]) for row in ids]
                    states = subject.read_contexts(contexts, one.use_memory)
            for condition in one.conditions:
                if condition in _APART and not cut:
                    continue
                # No other row of the same shape has a memory to swap with.
                if condition == "swapped" and len(examples) == 1:
                    continue
                start = subject.fork(subject.ablate(states, condition)) if cut else None
                asked, right = torch.from_numpy(ids[:, cut:]), torch.from_numpy(labels[:, cut:])
                with meter.measure("answer", asked.numel()):
                    guesses, losses, after = guess_and_score(
                        subject, asked, right, start, one.use_memory
                    )
                if condition not in _APART:
                    meter.saw(subject.state_bytes(after))
                found[condition] = (
                    np.pad(guesses.numpy(), ((0, 0), (cut, 0)), constant_values=-1),
                    np.pad(losses.numpy(), ((0, 0), (cut, 0))),
                )
        meter.advance(ids.size)
        return found

    def _record(
        self,
        setting: Setting,
        index: int,
        condition: str,
        example: Example,
        guesses: np.ndarray,
        losses: np.ndarray,
    ) -> Record:
        counts = self.generator.counts(example, guesses)
        return Record(
            setting=setting.label,
            trial=index,
            condition=condition,
            score=accuracy(example, guesses),
            labels={"counts": counts | self.generator.loss_counts(example, losses)},
            tokens=len(example.input_ids),
            prompt=Context([example.input_ids]).fingerprint(),
        )

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        """`measures`: those of the generator by setting and condition, where it has any."""
        sums: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for record in records:
            for name, count in record.labels["counts"].items():
                sums[record.setting, record.condition][name] += count
        found: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
        for (setting, condition), counts in sums.items():
            found[setting][condition] = self.generator.measures(counts)
        return {"vocabulary": self.generator.vocabulary} | ({"measures": found} if found else {})
