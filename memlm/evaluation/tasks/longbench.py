"""LongBench: 16 English and code tasks on long documents, and two Chinese ones.

Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding" (2023),
arXiv:2308.14508. Prompts, answer lengths and scores are the published ones. There, the middle of a
prompt is left out where it is too long for a model; here rows that fit a length are taken, and the
middle of the others is left out only with `longbench.cut_middle`: of the prompt's tokens the first
and the last half of what there is room for stay, and every record tells how many are gone. The
other three Chinese tasks compare words, which takes a package that finds them.
"""

from pathlib import Path

from memlm.errors import UserError
from memlm.evaluation.longbench.prompts import CHINESE, PROMPTS, UNSCORED
from memlm.evaluation.prompts import Question, check_writes, encode
from memlm.evaluation.question_files import JsonPart, read_content
from memlm.evaluation.tasks.base import Tools
from memlm.evaluation.tasks.rows import Row, RowQuestion, RowsTask

PREFIX = "longbench_"
OPTION = "longbench.data"
_WANTED = "a folder with LongBench's files, such as hotpotqa.jsonl"


class Longbench(RowsTask):
    """One of the tasks."""

    metric = "score (%)"
    kind = "shares"

    def __init__(self, name: str, tools: Tools):
        """Read the rows.

        Raises:
            UserError: for a task that has no score here, a file that is missing or malformed, a
                data set that cannot be loaded, a length that too few rows fit.
        """
        data = name.removeprefix(PREFIX)
        if data in UNSCORED:
            scored = ", ".join(PREFIX + one for one in CHINESE)
            raise UserError(
                f"{name}: its score compares Chinese words, which take the package jieba to find; "
                f"memlm does without it (Chinese tasks that are scored: {scored})"
            )
        self.prompt = PROMPTS[data]
        self.title = f"LongBench {data}"
        self.description = f"Rows of {data} that fit; {self.prompt.scored_by}."
        check_writes(tools.tokenizer, "段落" if data in CHINESE else "aeint0123456789", name)
        options = tools.config.longbench
        content = read_content(_place(options.data, data), OPTION, data, _WANTED, split="test")
        rows = [self._row(row) for row in content.items()]
        if not rows:
            raise content.fail("no row")
        where = f"{OPTION} ({options.data!r})"
        super().__init__(name, tools, rows, where, options.cut_middle)

    def _row(self, row: JsonPart) -> Row:
        answers = tuple(row.field("answers").texts())
        if not answers:
            raise row.field("answers").fail("no right answer")
        classes = row.field("all_classes").texts() if self.prompt.classes else ()
        asked = row.field("input").of(str)
        before, after = self.prompt.template.split("{context}")
        # No field of the templates stands before the context.
        return Row(
            before + row.field("context").of(str),
            after.replace("{input}", asked),
            answers,
            tuple(classes),
        )

    def answer_tokens(self, row: Row) -> int:
        """As many as are published; more where a tokenizer needs more for a short right answer."""
        if self.prompt.summary:
            return self.prompt.new_tokens
        needed = (len(encode(self.tools.tokenizer, f" {answer}")) for answer in row.references)
        return max(self.prompt.new_tokens, *needed)

    def score(self, question: Question, prediction: str) -> float:
        assert isinstance(question, RowQuestion)
        if self.prompt.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        return max(
            self.prompt.metric(prediction, reference, question.row.classes)
            for reference in question.references
        )


def _place(source: str, data: str) -> str:
    """The file of a task in a folder; `source` itself where it is none."""
    folder = Path(source).expanduser()
    return str(folder / f"{data}.jsonl") if folder.is_dir() else source
