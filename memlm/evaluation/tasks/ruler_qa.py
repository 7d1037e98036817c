"""RULER's question answering: the documents that answer a question, among others.

qa_1 asks questions of SQuAD and hides their paragraph among those of its article, then among all
others; qa_2 asks questions of HotpotQA and hides their ten documents among all others. Unlike in
RULER each prompt is filled on its own, the order of the questions is drawn, and no document comes
twice: a file that is too small for a length is an error. Where the ten documents of a HotpotQA
question are longer than the prompt, those with supporting facts stay and as many others as fit.
"""

import string

import numpy as np

from memlm.errors import UserError
from memlm.evaluation.prompts import (
    Question,
    Trial,
    check_writes,
    encode,
    encode_prompt,
    text_trial,
)
from memlm.evaluation.question_files import (
    DocumentQuestion,
    QuestionOrder,
    hotpotqa_questions,
    squad_questions,
)
from memlm.evaluation.tasks.base import ABSENT, PLAIN, PromptTask, Tools
from memlm.evaluation.tasks.ruler import TEMPLATES, around, match_part

_MARGIN = 300  # characters shown on each side of an answer


class QuestionAnswering(PromptTask):
    """Questions about a paragraph (qa_1) or two documents (qa_2) among others."""

    description = (
        "Documents in random order, one or two of which answer the question; an answer that "
        "contains one of the right ones counts, in RULER's prompt. Absent: without the documents "
        "that are needed."
    )
    variants = (ABSENT,)

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        check_writes(tools.tokenizer, string.ascii_lowercase + string.digits, name)
        prompt = TEMPLATES["qa"]
        self.before, self.after = (prompt.template + prompt.answer_prefix).split("{context}")
        self.new_tokens = prompt.tokens_to_generate
        if name == "qa_1":
            self.title = "RULER qa_1: questions of SQuAD"
            self.option, self.source = "ruler.squad", tools.config.ruler.squad
            self.corpus = squad_questions(self.source, self.option)
        else:
            self.title = "RULER qa_2: questions of HotpotQA"
            self.option, self.source = "ruler.hotpotqa", tools.config.ruler.hotpotqa
            self.corpus = hotpotqa_questions(self.source, self.option)
        self.sizes: dict[int, int] = {}
        self.order = QuestionOrder(len(self.corpus.questions), self.rng(), self._least)
        self._question(min(tools.config.all_lengths), 0)
        self._check_corpus(max(tools.config.all_lengths))

    def trial(self, length: int, index: int, variant: str = PLAIN) -> Trial:
        asked = self._question(length, index)
        rng = self.rng(length, index)
        others = np.ones(len(self.corpus.documents), dtype=bool)
        others[[*asked.needed, *asked.related]] = False
        order = np.concatenate(
            [asked.needed, rng.permutation(asked.related), rng.permutation(np.flatnonzero(others))]
        ).astype(np.int64)

        count = self._count(asked, order.tolist(), length)
        shuffled = rng.permutation(order[:count]).tolist()
        # Counts of single documents are not exact where tokens reach from one into the next.
        while (tokens := self._tokens(asked, shuffled)) > length and count > len(asked.needed):
            excess = (tokens - length) * count // tokens
            count = max(count - max(1, excess), len(asked.needed))
            kept = set(order[:count].tolist())
            shuffled = [number for number in shuffled if number in kept]
        if count == len(order):
            raise self._too_small(length, tokens)
        if tokens > length:
            # Of the needed ones alone only their own order is known to fit.
            shuffled = list(asked.needed)
        places = sorted(shuffled.index(one) + 1 for one in asked.needed)
        if variant == ABSENT:
            shuffled = [number for number in shuffled if number not in asked.needed]
        return text_trial(
            self.tools.tokenizer,
            self._context(shuffled),
            [(self.after.format(query=asked.text), asked.answers)],
            self._answer_tokens(asked),
            {"documents": count, "places": places},
            self._excerpt(asked),
        )

    def _excerpt(self, asked: DocumentQuestion) -> str:
        """The needed documents around the answer, or their start where it is not in them."""
        text = "\n\n".join(self.corpus.documents[number] for number in asked.needed)
        start = max(0, text.find(asked.answers[0]))
        return around(text, start, start + len(asked.answers[0]), _MARGIN)

    def _count(self, asked: DocumentQuestion, order: list[int], length: int) -> int:
        """How many documents of the order fit by their own token counts."""
        tokens = self._tokens(asked, list(asked.needed))
        for count in range(len(asked.needed), len(order)):
            tokens += self._size(order[count])
            if tokens > length:
                return count
        return len(order)

    def _size(self, number: int) -> int:
        """Tokens of a document with its heading, the widest there is."""
        if number not in self.sizes:
            documents = self.corpus.documents
            text = f"Document {len(documents)}:\n{documents[number]}\n\n"
            self.sizes[number] = len(encode(self.tools.tokenizer, text))
        return self.sizes[number]

    def _question(self, length: int, index: int) -> DocumentQuestion:
        number = self.order.pick(length, index)
        if number is None:
            raise UserError(
                f"{self.name}: lengths: {length} tokens are too short for a question of "
                f"{self.source!r} and its documents with this tokenizer; use at least "
                f"{self.order.least()}"
            )
        return self.corpus.questions[number]

    def _least(self, number: int) -> int:
        """Tokens of a prompt with nothing but the documents that are needed."""
        asked = self.corpus.questions[number]
        return self._tokens(asked, list(asked.needed))

    def _tokens(self, asked: DocumentQuestion, documents: list[int]) -> int:
        text = self._context(documents) + self.after.format(query=asked.text)
        return len(encode_prompt(self.tools.tokenizer, text)) + self._answer_tokens(asked)

    def _answer_tokens(self, asked: DocumentQuestion) -> int:
        """As many as RULER allows; more where a tokenizer needs more for a right answer."""
        answers = (len(encode(self.tools.tokenizer, f" {answer}")) for answer in asked.answers)
        return max(self.new_tokens, *answers)

    def _context(self, documents: list[int]) -> str:
        return self.before + "\n\n".join(
            f"Document {place}:\n{self.corpus.documents[number]}"
            for place, number in enumerate(documents, start=1)
        )

    def _check_corpus(self, length: int) -> None:
        """Raise UserError when all documents together are shorter than the longest prompt."""
        total = self._tokens(self.corpus.questions[0], [])
        for number in range(len(self.corpus.documents)):
            total += self._size(number)
            if total > length:
                return
        raise self._too_small(length, total)

    def _too_small(self, length: int, tokens: int) -> UserError:
        return UserError(
            f"{self.name}: lengths: {length} tokens are more than the {len(self.corpus.documents)} "
            f"documents of {self.source!r} give: about {tokens}; use shorter lengths, or a larger "
            f"file with --{self.option} FILE"
        )

    def score(self, question: Question, prediction: str) -> float:
        return match_part(prediction, question.references)
