"""Tasks whose prompts are rows of published files: those that fit a length, each once.

Rows have lengths of their own. A setting takes those whose whole prompt with its answer has at most
so many tokens, in a drawn order; none is cut, unless the user asks for it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memlm.errors import UserError
from memlm.evaluation.prompts import Context, Question, Trial, split_prompt
from memlm.evaluation.question_files import QuestionOrder
from memlm.evaluation.tasks.base import PLAIN, PromptTask, Record, Setting, Tools

_EXCERPT = 200  # characters shown of a context's end and of its question


@dataclass(frozen=True)
class Row:
    """One prompt and what it should be answered with.

    Attributes:
        context, question: together the prompt; the question ends where the answer starts.
        references: the right answers, at least one.
        classes: the possible answers, where an answer is one of them.
    """

    context: str
    question: str
    references: tuple[str, ...]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowQuestion(Question):
    """A question that knows its row."""

    row: Row


class RowsTask(PromptTask):
    """Rows of a file, one question each."""

    def __init__(
        self, name: str, tools: Tools, rows: Sequence[Row], where: str, cut_middle: bool = False
    ):
        """Choose the rows of every length.

        Args:
            name, tools: see `Task`.
            rows: all of the file.
            where: option and file, for messages.
            cut_middle: whether rows that are too long lose their middle.

        Raises:
            UserError: for a length that fewer than two rows fit.
        """
        super().__init__(name, tools)
        self.rows, self.where, self.cut_middle = rows, where, cut_middle
        self.encoded: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.order = QuestionOrder(len(rows), self.rng(), self._least)
        self.counts: dict[int, int] = {}
        for length in tools.config.all_lengths:
            self.order.pick(length, tools.config.trials_at(length) - 1)
            fitting, _ = self.order.fitting[length]
            if len(fitting) < 2:
                least = sorted(map(self._least, range(len(rows))))[:2]
                use = f"use at least {least[-1]}" if len(least) == 2 else "give a file with more"
                raise UserError(
                    f"{name}: lengths: {length} tokens hold {len(fitting)} of the {len(rows)} rows "
                    f"of {where}, two are needed; {use}"
                )
            self.counts[length] = len(fitting)

    @abstractmethod
    def answer_tokens(self, row: Row) -> int:
        """Most tokens of an answer."""

    def settings(self) -> list[Setting]:
        """With fewer trials than wanted where fewer rows fit."""
        return [Setting(str(length), count, length) for length, count in self.counts.items()]

    def trial(self, length: int, index: int, variant: str = PLAIN) -> Trial:
        number = self.order.pick(length, index)
        assert number is not None
        row = self.rows[number]
        context, question = self._ids(number)
        new_tokens = self.answer_tokens(row)
        labels: dict[str, Any] = {"row": number}
        whole, room = len(context) + len(question), length - new_tokens
        if whole > room:  # and the middle is to be cut
            half = room // 2
            labels["left_out"] = whole - 2 * half
            kept = half - len(question)
            context = np.concatenate([context[:half], context[len(context) - kept :]])
        return Trial(
            Context([context]),
            (RowQuestion(question, row.references, new_tokens, row),),
            labels,
            row.context[-_EXCERPT:] + row.question[-_EXCERPT:],
        )

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        """Rows of the file, and by setting how many lost their middle."""
        cut: dict[str, set[int]] = {}
        for record in records:
            if "left_out" in record.labels:
                cut.setdefault(record.setting, set()).add(record.trial)
        return {
            "rows": len(self.rows),
            "rows_cut": {setting: len(trials) for setting, trials in cut.items()},
        }

    def _ids(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Those of a row's context (int32) and question (int64)."""
        if number not in self.encoded:
            row = self.rows[number]
            context, (question,) = split_prompt(self.tools.tokenizer, row.context, [row.question])
            self.encoded[number] = context, question
        return self.encoded[number]

    def _least(self, number: int) -> int:
        """Tokens of a row's prompt and answer; with the middle cut, both halves hold a question."""
        context, question = self._ids(number)
        whole = len(context) + len(question)
        least = min(whole, 2 * len(question)) if self.cut_middle else whole
        return least + self.answer_tokens(self.rows[number])
