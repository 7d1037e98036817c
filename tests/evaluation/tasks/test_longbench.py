"""LongBench: published rows, prompts and what is cut, left out and refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from memlm.errors import UserError
from memlm.evaluation.config import LongbenchOptions
from memlm.evaluation.longbench.prompts import PROMPTS
from memlm.evaluation.prompts import Trial
from memlm.evaluation.runner import input_hashes
from memlm.evaluation.tasks import GROUPS, TASKS, make_task
from memlm.evaluation.tasks.base import Record, Tools
from memlm.evaluation.tasks.longbench import Longbench

ENGLISH = {
    *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"),
    *("gov_report", "qmsum", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
}
ANSWERS = {
    "trec": "Date",
    "lsht": "体育",
    "passage_count": "7",
    "passage_retrieval_en": "Paragraph 3",
}
CLASSES = {"trec": ["Date", "Other location"], "lsht": ["体育", "农业"]}


def published(data: str, words: list[int]) -> list[dict]:
    """Rows with contexts of so many words."""
    return [
        {
            "input": f"Who is number {number}?",
            "context": f"begin{number} " + "word " * count + f"end{number}",
            "answers": [ANSWERS.get(data, f"person {number}"), ANSWERS.get(data, "somebody")],
            "length": count,
            "dataset": data,
            "language": "en",
            "all_classes": CLASSES.get(data),
            "_id": f"{number:048x}",
        }
        for number, count in enumerate(words)
    ]


@pytest.fixture
def make(tmp_path: Path, make_tools: Callable[..., Tools]) -> Callable[..., Longbench]:
    """`make("trec", [20, 30])`: the task on rows with so many words."""

    def build(data: str, words: list[int], lengths=(2048,), rows=None, **options) -> Longbench:
        lines = [json.dumps(row) for row in rows or published(data, words)]
        (tmp_path / f"{data}.jsonl").write_text("\n".join(lines))
        longbench = LongbenchOptions(data=str(tmp_path), **options)
        config = {"lengths": list(lengths), "trials": 4, "longbench": longbench}
        return make_task(f"longbench_{data}", make_tools(config))

    return build


def text(task: Longbench, trial: Trial) -> str:
    (question,) = trial.questions
    context = trial.context.read(0, len(trial.context)).tolist()
    return task.tools.tokenizer.decode(context + question.token_ids.tolist())


@pytest.mark.parametrize("data", sorted(ENGLISH | {"lsht", "passage_retrieval_zh"}))
def test_every_task_asks_in_its_template_and_gives_right_answers_full_marks(
    make: Callable[..., Longbench], data: str
) -> None:
    rows = published(data, [20, 30])
    if data == "passage_retrieval_zh":
        rows = [{**row, "answers": ["段落3"]} for row in rows]
    task = make(data, [], rows=rows)
    for index in range(2):
        trial = task.trial(2048, index)
        (question,) = trial.questions
        row = rows[trial.labels["row"]]
        prompt = text(task, trial)
        assert prompt.count(row["context"]) == 1
        summaries = ("gov_report", "multi_news", "passage_count", "lcc")
        assert prompt.count(row["input"]) == (data not in summaries)
        assert "{" not in prompt
        # The question stands behind the context.
        before = task.tools.tokenizer.decode(trial.context.read(0, len(trial.context)).tolist())
        assert before.endswith(row["context"])
        assert question.references == tuple(row["answers"])
        for answer in row["answers"]:
            assert task.score(question, answer) == pytest.approx(1.0, abs=1e-7)
        assert task.score(question, "99") == 0.0


def test_the_templates_are_the_published_ones() -> None:
    # Of the values of LongBench/config/dataset2prompt.json, for the tasks that are scored here.
    templates = {name: prompt.template for name, prompt in PROMPTS.items()}
    found = hashlib.sha256(json.dumps(templates, sort_keys=True).encode()).hexdigest()
    assert found == "298025bea89d743863b009bdfa4260ec8826e5d8d418aa99b78c63dc0a8616c7"


def test_the_prompt_of_hotpotqa_is_the_published_one(make: Callable[..., Longbench]) -> None:
    task = make("hotpotqa", [3, 3])
    trial = task.trial(2048, 0)
    number = trial.labels["row"]
    say = "Only give me the answer and do not output any other words."
    assert text(task, trial) == (
        f"Answer the question based on the given passages. {say}\n\n"
        f"The following are given passages.\nbegin{number} word word word end{number}\n\n"
        f"Answer the question based on the given passages. {say}\n\n"
        f"Question: Who is number {number}?\nAnswer:"
    )
    assert trial.questions[0].new_tokens == 32


def test_answers_of_examples_end_with_their_first_line(make: Callable[..., Longbench]) -> None:
    (question,) = make("trec", [3, 3]).trial(2048, 0).questions
    task = make("trec", [3, 3])
    assert task.score(question, "\n\nDate\nType: Other location") == 1.0
    assert task.score(question, "Date, Other location") == 0.5
    # Others are read whole.
    task = make("passage_count", [3, 3])
    (question,) = task.trial(2048, 0).questions
    assert task.score(question, "7\n8") == 0.5


def test_rows_that_do_not_fit_are_left_out_and_none_comes_twice(
    make: Callable[..., Longbench],
) -> None:
    task = make("hotpotqa", [20, 30, 2000, 40], lengths=[1024, 16384])
    assert [(one.label, one.trials) for one in task.settings()] == [("1024", 3), ("16384", 4)]
    rows = [task.trial(1024, index).labels for index in range(3)]
    assert sorted(labels["row"] for labels in rows) == [0, 1, 3]
    assert all("left_out" not in labels for labels in rows)


def test_the_middle_is_cut_when_asked_for_and_recorded(make: Callable[..., Longbench]) -> None:
    whole = make("hotpotqa", [20, 2000], lengths=[16384])
    cut = make("hotpotqa", [20, 2000], lengths=[1024], cut_middle=True)
    trials = {(trial := cut.trial(1024, index)).labels["row"]: trial for index in range(2)}
    assert "left_out" not in trials[0].labels
    prompts = {}
    for index in range(2):
        trial = whole.trial(16384, index)
        prompts[trial.labels["row"]] = text(whole, trial)
    assert text(cut, trials[0]) == prompts[0]
    half = (1024 - 32) // 2  # a token is a byte
    assert text(cut, trials[1]) == prompts[1][:half] + prompts[1][-half:]
    assert trials[1].labels["left_out"] == len(prompts[1]) - 2 * half
    records = [
        Record("1024", index, "on", 0.0, labels=cut.trial(1024, index).labels) for index in range(2)
    ]
    assert cut.details(records) == {"rows": 2, "rows_cut": {"1024": 1}}


def test_a_question_is_never_cut(make: Callable[..., Longbench]) -> None:
    asked = "Who? " * 100
    rows = [{**row, "input": asked} for row in published("hotpotqa", [900, 900])]
    question = (
        "\n\nAnswer the question based on the given passages. Only give me the answer and do not "
        f"output any other words.\n\nQuestion: {asked}\nAnswer:"
    )
    least = 2 * len(question) + 32  # each half is as long as the question, and there is an answer
    with pytest.raises(UserError, match=rf"512 tokens hold 0 of the 2 .* use at least {least}$"):
        make("hotpotqa", [], rows=rows, lengths=[512], cut_middle=True)
    task = make("hotpotqa", [], rows=rows, lengths=[least], cut_middle=True)
    assert text(task, task.trial(least, 0)).endswith(question)


def test_the_group_is_the_english_tasks_and_all_21_have_a_name() -> None:
    assert {name.removeprefix("longbench_") for name in GROUPS["longbench"]} == ENGLISH
    assert sum(name.startswith("longbench_") for name in TASKS) == 21


@pytest.mark.parametrize("data", ["multifieldqa_zh", "dureader", "vcsum"])
def test_chinese_words_are_refused(make: Callable[..., Longbench], data: str) -> None:
    with pytest.raises(UserError, match=r"jieba.*longbench_lsht, longbench_passage_retrieval_zh"):
        make(data, [3, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": []}, r"\[1\].answers: no right answer"),
        ({"answers": "person"}, r"\[1\].answers: a list is missing"),
        ({"context": None}, r"\[1\].context: a text is missing"),
        ({"all_classes": None}, r"\[1\].all_classes: a list is missing"),
    ],
)
def test_damaged_rows_are_refused(
    make: Callable[..., Longbench], change: dict, message: str
) -> None:
    first, second = published("trec", [3, 3])
    with pytest.raises(UserError, match=message):
        make("trec", [], rows=[first, second | change])


def test_missing_and_broken_files_are_refused(
    make: Callable[..., Longbench], tmp_path: Path, make_tools: Callable[..., Tools]
) -> None:
    tools = make_tools({"longbench": LongbenchOptions(data=str(tmp_path))})
    with pytest.raises(UserError, match=r"no such file; give a folder with LongBench's files"):
        make_task("longbench_trec", tools)
    (tmp_path / "trec.jsonl").write_text('{"input": ')
    with pytest.raises(UserError, match=r"trec.jsonl': is not JSON"):
        make_task("longbench_trec", tools)
    (tmp_path / "trec.jsonl").write_text("")
    with pytest.raises(UserError, match="no row"):
        make_task("longbench_trec", tools)


def test_the_files_are_hashed(make: Callable[..., Longbench], tmp_path: Path) -> None:
    task = make("trec", [3, 3])
    assert list(input_hashes(task.tools.config)) == [str(tmp_path / "trec.jsonl")]
