"""What a task is: settings, trials in them, and the score of an answer.

A task that hides something in a context and asks for it (`PromptTask`) says only what its prompts
are and how an answer is scored; reading, forking, ablating and recording are the same for all.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from memlm.evaluation.conditions import Plan
from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.costs import Meter
from memlm.evaluation.haystack import Haystack
from memlm.evaluation.prompts import Question, Trial
from memlm.evaluation.subject import Subject

PLAIN, CHANGED, ABSENT = "plain", "changed", "absent"


@dataclass(frozen=True)
class Setting:
    """One column of a task's table: a length, a number of pairs.

    Attributes:
        label: its name in results.
        trials: how many trials it has.
        tokens: of a context, at most; for the progress bar and the check against the model.
    """

    label: str
    trials: int
    tokens: int


@dataclass
class Record:
    """What one trial gave in one condition: a line of the ledger.

    Attributes:
        setting: label of the setting.
        trial: its number there.
        condition: of the memory or the prompt.
        score: the number that is averaged.
        answers: per question {"prediction", "references", "score"}.
        labels: of the trial.
        tokens: of the context.
        prompt: fingerprint of the prompt.
        excerpt: text around what was to be recalled; only with the condition "on".
    """

    setting: str
    trial: int
    condition: str
    score: float
    answers: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    prompt: str = ""
    excerpt: str = ""


@dataclass
class Tools:
    """What tasks are made from.

    Attributes:
        config: of the evaluation.
        tokenizer: of the model.
        distance: tokens that the attention of the models looks back, 0 where it sees everything;
            what is hidden has to lie further away to show a memory.
        haystack: the text that things are hidden in, made when first asked for.
    """

    config: EvaluationConfig
    tokenizer: PreTrainedTokenizerBase
    distance: int = 0
    _haystack: Haystack | None = None

    @property
    def haystack(self) -> Haystack:
        """The user's files, or the standard library's held-out sources."""
        if self._haystack is None:
            self._haystack = Haystack(self.tokenizer, self.config.haystack)
        return self._haystack


class Task(ABC):
    """One benchmark, with the sizes of a config.

    Attributes:
        title: its name in reports.
        metric: what a score is, with its unit.
        axis: what a setting is, with its unit.
        kind: "hits" (0 or 1), "shares" (between 0 and 1) or "losses" (lower is better).
        description: one sentence for reports.
    """

    title: ClassVar[str]
    metric: ClassVar[str] = "recall (%)"
    axis: ClassVar[str] = "length (tokens)"
    kind: ClassVar[str] = "hits"
    description: ClassVar[str]

    def __init__(self, name: str, tools: Tools):
        """Prepare what all trials share.

        Raises:
            UserError: for sizes that cannot work, a tokenizer that does not fit, a missing corpus.
        """
        self.name = name
        self.tools = tools

    @abstractmethod
    def settings(self) -> list[Setting]:
        """All settings, in the order of the report."""

    def labels(self) -> list[str]:
        """The settings of the records, in the order of the report."""
        return [setting.label for setting in self.settings()]

    @abstractmethod
    def passes(self, plan: Plan) -> int:
        """How often a context is read, for the progress bar."""

    @abstractmethod
    def run(self, setting: Setting, trials: range, subject: Subject, meter: Meter) -> list[Record]:
        """The records of some trials, in all conditions of the subject, asked as one batch."""

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        """Further numbers for the results, from all records of one model."""
        return {}

    def rng(self, *place: int) -> np.random.Generator:
        """Random numbers that depend on the seed, the task's name and `place` alone."""
        return np.random.default_rng(
            [self.tools.config.seed, zlib.crc32(self.name.encode()), *place]
        )


class PromptTask(Task):
    """A task whose trials are prompts and whose settings are their lengths.

    Attributes:
        variants: which other prompts a trial has beside the plain one: "changed" (another value in
            the same place, and that value is the right answer) and "absent" (nothing is hidden,
            and the answer that would have been right is looked for).
    """

    variants: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def trial(self, length: int, index: int, variant: str = PLAIN) -> Trial:
        """The prompt `index` of a length: a pure function of the seed and the arguments.

        Context, one question and its answer together have at most `length` tokens.

        Raises:
            UserError: when the length is too short for the task.
        """

    @abstractmethod
    def score(self, question: Question, prediction: str) -> float:
        """Between 0 and 1."""

    def settings(self) -> list[Setting]:
        config = self.tools.config
        return [
            Setting(str(length), config.trials_at(length), length) for length in config.all_lengths
        ]

    def passes(self, plan: Plan) -> int:
        return sum(one.variant in (PLAIN, *self.variants) for one in plan.passes)

    def run(self, setting: Setting, trials: range, subject: Subject, meter: Meter) -> list[Record]:
        records = []
        for one in subject.plan.passes:
            if one.variant not in (PLAIN, *self.variants):
                continue
            prompts = [self.trial(int(setting.label), index, one.variant) for index in trials]
            marks = [prompt.fingerprint() for prompt in prompts]
            for condition, predictions in subject.ask(prompts, one, meter).items():
                for index, prompt, mark, answers in zip(
                    trials, prompts, marks, predictions, strict=True
                ):
                    found = [
                        {
                            "prediction": prediction,
                            "references": list(question.references),
                            "score": self.score(question, prediction),
                        }
                        for question, prediction in zip(prompt.questions, answers, strict=True)
                    ]
                    records.append(
                        Record(
                            setting=setting.label,
                            trial=index,
                            condition=condition,
                            score=sum(answer["score"] for answer in found) / len(found),
                            answers=found,
                            labels=prompt.labels,
                            tokens=len(prompt.context),
                            prompt=mark,
                            excerpt=prompt.excerpt if condition == "on" else "",
                        )
                    )
        return records
