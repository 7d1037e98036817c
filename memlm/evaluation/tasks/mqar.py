"""Multi-query associative recall (Arora et al., 2024): pairs in the context, keys as questions.

The pairs are read as a context; the rest of the row asks for them in one pass that reads and
writes on. A row's score is the share of its queries whose most likely next token is the value.
Queries of a row are not independent, so intervals count rows. In the overwrite variant some keys
get a second value further on, and the last one is right.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memlm.data.mqar import (
    IGNORED,
    MqarExample,
    check_mqar,
    check_mqar_overwrite,
    make_mqar,
    make_mqar_overwrite,
)
from memlm.evaluation.conditions import Plan
from memlm.evaluation.costs import Meter
from memlm.evaluation.prompts import Context
from memlm.evaluation.subject import Subject
from memlm.evaluation.tasks.base import Record, Setting, Task, Tools

LARGEST_VOCABULARY = 8192  # of the benchmark's definition


class Mqar(Task):
    """Keys and values drawn once each."""

    title = "Multi-query associative recall"
    metric = "accuracy (%)"
    axis = "key-value pairs"
    kind = "shares"
    description = (
        "Key-value pairs of random tokens, then the keys again; the share of keys whose most "
        "likely next token is the value."
    )

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        self.options = tools.config.mqar
        self.vocabulary = min(LARGEST_VOCABULARY, tools.tokenizer.vocab_size)
        for pairs in self.options.pairs:
            self.check(pairs)

    def check(self, pairs: int) -> None:
        """Raise UserError when the pairs do not fit the vocabulary or the row."""
        check_mqar(self.vocabulary, self.options.length, pairs)

    def example(self, pairs: int, index: int) -> MqarExample:
        """Row `index` of a setting, none of training's with the same seed."""
        options = self.options
        return make_mqar(
            self.vocabulary, options.length, pairs, self.rng(pairs, index), options.power
        )

    def settings(self) -> list[Setting]:
        options = self.options
        numbers = dict.fromkeys(options.pairs)  # none twice
        return [Setting(str(pairs), options.rows, options.length) for pairs in numbers]

    def passes(self, plan: Plan) -> int:
        return sum(one.variant == "plain" for one in plan.passes)

    def run(self, setting: Setting, trials: range, subject: Subject, meter: Meter) -> list[Record]:
        examples = [self.example(int(setting.label), index) for index in trials]
        cut = examples[0].context_length
        contexts = [Context([example.input_ids[:cut]]) for example in examples]
        asked = np.stack([example.input_ids[cut:] for example in examples])
        labels = torch.from_numpy(np.stack([example.labels[cut:] for example in examples]))
        stale = torch.from_numpy(np.stack([example.stale[cut:] for example in examples]))
        records = []
        for one in subject.plan.passes:
            if one.variant != "plain":
                continue
            with one.ablation():
                with meter.measure("read", cut * len(examples)):
                    states = subject.read_contexts(contexts, one.use_memory)
                meter.saw(subject.state_bytes(states))
                for condition in one.conditions:
                    start = subject.fork(subject.ablate(states, condition))
                    with meter.measure("answer", asked.size):
                        guesses, _ = subject.guess(torch.from_numpy(asked), start, one.use_memory)
                    for row, (index, example) in enumerate(zip(trials, examples, strict=True)):
                        records.append(
                            self._record(
                                setting, index, condition, guesses[row], labels[row], stale[row],
                                example,
                            )
                        )  # fmt: skip
            meter.advance(setting.tokens * len(examples))
        return records

    def _record(
        self,
        setting: Setting,
        index: int,
        condition: str,
        guesses: Tensor,
        labels: Tensor,
        stale: Tensor,
        example: MqarExample,
    ) -> Record:
        queries = labels != IGNORED
        right = float((guesses == labels)[queries].double().mean())
        overwritten = stale != IGNORED
        found = {}
        if bool(overwritten.any()):
            found["stale"] = float((guesses == stale)[overwritten].double().mean())
        return Record(
            setting=setting.label,
            trial=index,
            condition=condition,
            score=right,
            labels=found,
            tokens=example.context_length,
            prompt=Context([example.input_ids]).fingerprint(),
        )

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        return {"row_tokens": self.options.length, "vocabulary": self.vocabulary}


class MqarOverwrite(Mqar):
    """Some keys get a second value, which is the right one."""

    title = "Multi-query associative recall with overwritten values"
    description = (
        "Key-value pairs of random tokens, some keys again with another value, then the keys as "
        "questions; the last value is right."
    )

    def check(self, pairs: int) -> None:
        options = self.options
        check_mqar_overwrite(self.vocabulary, options.length, pairs, options.overwritten)

    def example(self, pairs: int, index: int) -> MqarExample:
        options = self.options
        return make_mqar_overwrite(
            self.vocabulary,
            options.length,
            pairs,
            self.rng(pairs, index),
            options.power,
            options.overwritten,
        )

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        stale = [record.labels["stale"] for record in records if record.condition == "on"]
        return super().details(records) | {
            "overwritten": self.options.overwritten,
            "stale_answers": sum(stale) / max(len(stale), 1),
        }
