"""Recall-intensive tasks as completions: a document, then a sentence that its facts complete.

Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff"
(2024), arXiv:2402.18668 (swde, fda, squad_completion), and Arora et al., "Just read twice: closing
the recall gap for recurrent language models" (2024), arXiv:2407.05483 (triviaqa, nq, drop). Rows of
the first kind hold the whole prompt; white space at its ends is taken off, for a prompt that ends
with a space or a line end makes models answer nothing. Those of the second kind are put together
here: the document without full stops at its end and without the question where it ends with it, a
full stop, the question in the form of a cloze.

An answer is right when its first line contains one of the right ones, upper and lower case alike.
Published evaluations cut what does not fit a model, and the answer may be in what is cut; here such
rows are left out.
"""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from memlm.errors import UserError
from memlm.evaluation.prompts import Question, check_writes, encode
from memlm.evaluation.question_files import JsonPart, read_content
from memlm.evaluation.tasks.base import Tools
from memlm.evaluation.tasks.rows import Row, RowsTask

NEW_TOKENS = 48  # of an answer; more where a tokenizer needs more for the right one
_MARKS = re.compile(r"\[(?:PAR|DOC|TLE)\]")  # of TriviaQA's documents


def _whole_prompt(row: JsonPart) -> Row:
    """{"text", "value"}, and "key" where the text ends with one: the question, "name:"."""
    text = row.field("text").of(str).strip()
    key = f"{row.value['key']}:" if row.has("key") else ""
    if key and text.lower().endswith(key.lower()):
        place = len(text) - len(key)
    else:
        # The last sentence.
        place = max(text.rfind("\n"), text.rfind(". ") + 1)
    if not text[:place].strip():
        place = text.rfind(" ")
    if place < 1:
        raise row.field("text").fail("a document and a question behind it are missing here")
    return Row(text[:place], text[place:], (row.field("value").of(str),))


def _document(row: JsonPart) -> Row:
    """{"context", "question", "answers"}."""
    context = row.field("context").of(str).strip()
    question = row.field("question").of(str).strip()
    if not question:
        raise row.field("question").fail("a question is missing here")
    while context.lower().endswith(question.lower()):
        context = context[: -len(question)]
    context = context.strip().strip(".")
    if not context:
        raise row.field("context").fail("a document is missing here")
    return Row(f"{context}.", f" {question}", tuple(row.field("answers").texts()))


def _marked_document(row: JsonPart) -> Row:
    """The same, with TriviaQA's marks in the context, which are taken out."""
    context = _MARKS.sub("", row.field("context").of(str).strip())
    return _document(JsonPart({**row.value, "context": context}, row.place, row.where))


@dataclass(frozen=True)
class Format:
    """A task's rows.

    Attributes:
        subject: for the title.
        option: of `recall_completion`.
        read: makes a prompt of a row.
        fields: what a row holds, for messages.
    """

    subject: str
    option: str
    read: Callable[[JsonPart], Row]
    fields: str


_TEXT = "text, key and value"
_DOCUMENT = "context, question and answers"
FORMATS = {
    "swde": Format("attributes of web pages", "swde", _whole_prompt, _TEXT),
    "fda": Format("attributes of reports on devices", "fda", _whole_prompt, _TEXT),
    "squad_completion": Format(
        "questions of SQuAD as completions", "squad", _whole_prompt, "text and value"
    ),
    "triviaqa": Format(
        "questions of TriviaQA as completions", "triviaqa", _marked_document, _DOCUMENT
    ),
    "nq": Format("Natural Questions as completions", "nq", _document, _DOCUMENT),
    "drop": Format("questions of DROP as completions", "drop", _document, _DOCUMENT),
}


class RecallCompletion(RowsTask):
    """One of the six tasks."""

    description = (
        "A document and the start of a sentence that a fact of the document completes; an answer "
        "whose first line contains a right one counts. Documents have the length that they have; "
        "those that fit are asked about."
    )

    def __init__(self, name: str, tools: Tools):
        """Read the rows.

        Raises:
            UserError: for a file that is missing or malformed, a data set that cannot be loaded, a
                length that too few rows fit.
        """
        found = FORMATS[name]
        self.title = f"{name}: {found.subject}"
        check_writes(tools.tokenizer, string.ascii_lowercase + string.digits, name)
        option, source = (
            f"recall_completion.{found.option}",
            getattr(tools.config.recall_completion, found.option),
        )
        wanted = f"a .json or .jsonl file of rows with {found.fields}"
        content = read_content(source, option, None, wanted)
        rows = [_answered(found.read(row)) for row in content.items()]
        answered = [row for row in rows if row.references]
        if not answered:
            raise UserError(f"{option}: {source!r}: no row with an answer; give {wanted}")
        super().__init__(name, tools, answered, f"{option} ({source!r})")

    def answer_tokens(self, row: Row) -> int:
        needed = (len(encode(self.tools.tokenizer, f" {answer}")) for answer in row.references)
        return max(NEW_TOKENS, *needed)

    def score(self, question: Question, prediction: str) -> float:
        line = prediction.split("\n")[0]
        return float(
            any(re.search(re.escape(one), line, re.IGNORECASE) for one in question.references)
        )


def _answered(row: Row) -> Row:
    """Without the empty answer, which every text contains."""
    references = tuple(dict.fromkeys(answer for answer in row.references if answer.strip()))
    return Row(row.context, row.question, references)
