"""Knowledge retention: a paragraph, then unrelated text, then a question about the paragraph.

In the manner of MemoryLLM (Wang et al., 2024, arXiv:2402.04624) and M+ (Wang et al., 2025,
arXiv:2502.00592), which write a paragraph into a memory, then others, and ask when the paragraph is
long gone. Here all of it is one text of a given length; the paragraph is always its start, so the
distance to the question grows with the length. Paragraphs of other articles follow in a drawn
order, then text of the haystack when they run out.
"""

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from memlm.errors import UserError
from memlm.evaluation.prompts import (
    Context,
    Piece,
    Question,
    Trial,
    check_writes,
    encode,
    encode_behind,
    encode_prompt,
)
from memlm.evaluation.question_files import DocumentQuestion, QuestionOrder, squad_questions
from memlm.evaluation.tasks.base import ABSENT, PLAIN, PromptTask, Record, Tools

NEW_TOKENS = 32  # of an answer; more where a tokenizer needs more for the right one
_OPTION = "retention.facts"


class Retention(PromptTask):
    """Questions about the first paragraph of a long text."""

    title = "Knowledge retention"
    description = (
        "A paragraph, then unrelated text, then a question about the paragraph; an answer whose "
        "first line contains one of the right ones counts. Absent prompts tell how many are known "
        "without the paragraph."
    )
    variants = (ABSENT,)

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        check_writes(tools.tokenizer, string.ascii_lowercase + string.digits, name)
        self.distance = tools.distance
        self.source = tools.config.retention.facts
        self.corpus = squad_questions(self.source, _OPTION)
        first = self.corpus.questions[0]
        if len(first.needed) + len(first.related) == len(self.corpus.documents):
            raise UserError(
                f"{_OPTION}: {self.source!r} holds one article only; give a file with two or more"
            )
        self.encoded: dict[int, np.ndarray] = {}
        self.order = QuestionOrder(len(self.corpus.questions), self.rng(), self._least)
        self._question(min(tools.config.all_lengths), 0)

    def trial(self, length: int, index: int, variant: str = PLAIN) -> Trial:
        asked = self._question(length, index)
        question, new_tokens = self._question_ids(asked), self._answer_tokens(asked)
        rng = self.rng(length, index)
        offset = int(rng.integers(1 << 62))
        others = np.ones(len(self.corpus.documents), dtype=bool)
        others[[*asked.needed, *asked.related]] = False
        filler = rng.permutation(np.flatnonzero(others)).tolist()
        fact = filler.pop() if variant == ABSENT else asked.needed[0]
        room = length - len(question) - new_tokens
        start = self._start_ids(fact)[: room - 1]
        pieces: list[Piece | np.ndarray] = [start]
        left = distance = room - len(start)
        for number in filler:
            if left == 0:
                break
            pieces.append(self._ids(number)[:left])
            left -= len(pieces[-1])
        if left > 0:
            haystack = self.tools.haystack
            pieces.append(haystack.piece(offset % len(haystack), left))
        return Trial(
            Context(pieces),
            (Question(question, asked.answers, new_tokens),),
            {"distance": distance},
            self.corpus.documents[fact],
        )

    def _question(self, length: int, index: int) -> DocumentQuestion:
        number = self.order.pick(length, index)
        if number is None:
            raise UserError(
                f"{self.name}: lengths: {length} tokens are too short for a question of "
                f"{self.source!r} {self.distance} tokens (attention's reach) behind its paragraph; "
                f"use at least {self.order.least()}"
            )
        return self.corpus.questions[number]

    def _least(self, number: int) -> int:
        """Tokens of the shortest prompt with a question, out of attention's reach."""
        asked = self.corpus.questions[number]
        fact = len(self._start_ids(asked.needed[0]))
        asking = len(self._question_ids(asked)) + self._answer_tokens(asked)
        return fact + max(1, self.distance) + asking

    def _ids(self, number: int) -> np.ndarray:
        """Token ids of a paragraph behind an empty line, and of another one, int32."""
        if number not in self.encoded:
            ids = encode_behind(self.tools.tokenizer, "\n\n", self._text(number))
            self.encoded[number] = ids.astype(np.int32)
        return self.encoded[number]

    def _start_ids(self, number: int) -> np.ndarray:
        """Those of a paragraph that starts a prompt."""
        return encode_prompt(self.tools.tokenizer, self._text(number))

    def _text(self, number: int) -> str:
        return f"{self.corpus.documents[number]}\n\n"

    def _question_ids(self, asked: DocumentQuestion) -> np.ndarray:
        text = f"\n\nQuestion: {asked.text}\nAnswer:"
        return encode_behind(self.tools.tokenizer, ".", text)

    def _answer_tokens(self, asked: DocumentQuestion) -> int:
        answers = (len(encode(self.tools.tokenizer, f" {answer}")) for answer in asked.answers)
        return max(NEW_TOKENS, *answers)

    def score(self, question: Question, prediction: str) -> float:
        line = _normal(prediction.strip().partition("\n")[0])
        return float(any(_normal(answer) in line for answer in question.references))

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        return {"least_distance_tokens": self.distance}


def _normal(text: str) -> str:
    """Lower case, with single spaces for all white space."""
    return " ".join(text.lower().split())
