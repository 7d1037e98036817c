"""Recall-intensive completions: published rows, prompts and scores."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from memlm.errors import UserError
from memlm.evaluation.config import RecallCompletionOptions
from memlm.evaluation.prompts import Trial
from memlm.evaluation.runner import input_hashes
from memlm.evaluation.tasks import GROUPS, make_task
from memlm.evaluation.tasks.base import Tools
from memlm.evaluation.tasks.recall_completion import RecallCompletion

# As published: the whole prompt with its question, and the answer.
TEXTS = [
    {
        "doc_id": f"{number}.htm",
        "key": "genre",
        "value": f"Drama {number}",
        "text": f" A Film {number}\nDirector: Ann\nGenre: Drama {number}\n\nSummary: A\ngenre: \n",
    }
    for number in range(3)
]
DOCUMENTS = [
    {
        "doc_id": str(number),
        "context": f"[DOC] [TLE] Inn {number} [PAR] The keeper of inn {number} is Kay {number}.. ",
        "question": f"The keeper of inn {number} is ",
        "answers": [f"Kay {number}", "K."],
    }
    for number in range(3)
]


@pytest.fixture
def make(tmp_path: Path, make_tools: Callable[..., Tools]) -> Callable[..., RecallCompletion]:
    """`make("nq", rows)`: the task on a file with these rows."""

    def build(name: str, rows: list[dict], lengths=(512,), suffix=".jsonl") -> RecallCompletion:
        path = tmp_path / f"rows{suffix}"
        lines = "\n".join(map(json.dumps, rows))
        path.write_text(lines if suffix == ".jsonl" else json.dumps(rows))
        option = {"squad_completion": "squad"}.get(name, name)
        options = RecallCompletionOptions(**{option: str(path)})
        config = {"lengths": list(lengths), "trials": 4, "recall_completion": options}
        return make_task(name, make_tools(config))

    return build


def texts(task: RecallCompletion, trial: Trial) -> tuple[str, str]:
    (question,) = trial.questions
    decode = task.tools.tokenizer.decode
    context = trial.context.read(0, len(trial.context)).tolist()
    return decode(context), decode(question.token_ids.tolist())


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", ["swde", "fda"])
def test_whole_prompts_lose_white_space_at_their_ends(
    make: Callable[..., RecallCompletion], name: str, suffix: str
) -> None:
    task = make(name, TEXTS, suffix=suffix)
    for index in range(3):
        trial = task.trial(512, index)
        number = trial.labels["row"]
        assert texts(task, trial) == (
            f"A Film {number}\nDirector: Ann\nGenre: Drama {number}\n\nSummary: A\n",
            "genre:",
        )
        (question,) = trial.questions
        assert (question.references, question.new_tokens) == ((f"Drama {number}",), 48)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("A long story.\nThe end of it is", "\nThe end of it is"),
        ("Ann left. Bo came. The last was", " The last was"),
        ("only words here", " here"),
    ],
)
def test_without_a_key_the_question_is_the_last_sentence(
    make: Callable[..., RecallCompletion], text: str, question: str
) -> None:
    rows = [{"text": f"{text} ", "value": "Bo"}] * 2
    task = make("squad_completion", rows)
    context, asked = texts(task, task.trial(512, 0))
    assert context + asked == text
    assert asked == question


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("triviaqa", "  Inn {0}  The keeper of inn {0} is Kay {0}."),
        ("nq", "[DOC] [TLE] Inn {0} [PAR] The keeper of inn {0} is Kay {0}."),
        ("drop", "[DOC] [TLE] Inn {0} [PAR] The keeper of inn {0} is Kay {0}."),
    ],
)
def test_documents_and_cloze_questions(
    make: Callable[..., RecallCompletion], name: str, context: str
) -> None:
    # The last row's document ends with the question, twice and in other letters.
    *rows, last = DOCUMENTS
    again = last["question"].strip().upper()
    task = make(name, [*rows, {**last, "context": last["context"] + again + again}])
    for index in range(3):
        trial = task.trial(512, index)
        number = trial.labels["row"]
        expected = (
            context.format(number).lstrip(" ") if name == "triviaqa" else context.format(number)
        )
        assert texts(task, trial) == (expected, f" The keeper of inn {number} is")
        assert trial.questions[0].references == (f"Kay {number}", "K.")


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (" Kay 1", 1.0),
        ("it is kAY 12.", 1.0),  # contained, in any letters
        ("Kay\n1 Kay 1", 0.0),  # the first line alone
        ("\nKay 1", 0.0),  # as where generation stops at a line end
        ("K.", 1.0),  # any right one
        ("Kx", 0.0),  # whose full stop is no pattern
        ("", 0.0),
    ],
)
def test_an_answer_contains_a_right_one(
    make: Callable[..., RecallCompletion], prediction: str, score: float
) -> None:
    task = make("nq", DOCUMENTS)
    asked = {(trial := task.trial(512, index)).labels["row"]: trial for index in range(3)}
    assert task.score(asked[1].questions[0], prediction) == score


def test_rows_without_an_answer_and_rows_that_do_not_fit_are_left_out(
    make: Callable[..., RecallCompletion],
) -> None:
    long = {**DOCUMENTS[0], "context": "word " * 200}
    empty = {**DOCUMENTS[0], "answers": [" ", ""]}
    task = make("drop", [*DOCUMENTS, long, empty], lengths=[512, 2048])
    assert [one.trials for one in task.settings()] == [3, 4]
    assert all(len(task.trial(512, index).context) < 512 - 48 for index in range(3))
    assert task.details([])["rows"] == 4


def test_an_answer_that_takes_more_tokens_gets_them(make: Callable[..., RecallCompletion]) -> None:
    task = make("fda", [{**row, "value": "x" * 90} for row in TEXTS])
    assert task.trial(512, 0).questions[0].new_tokens == 91


def test_the_group() -> None:
    assert GROUPS["recall_completion"] == (
        *("swde", "fda", "squad_completion", "triviaqa", "nq", "drop"),
    )


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("swde", [{"txt": "a b", "value": "c"}], r"\[0\]: no field 'text'; did you mean 'txt'"),
        ("fda", [{"text": "a b", "value": 3}], r"\[0\].value: a text is missing"),
        ("squad_completion", [{"text": "word", "value": "c"}], r"a document and a question"),
        ("nq", [{**DOCUMENTS[0], "question": " "}], r"\[0\].question: a question is missing"),
        ("drop", [{**DOCUMENTS[0], "context": " .. "}], r"\[0\].context: a document is missing"),
        ("nq", [{**DOCUMENTS[0], "answers": "K"}], r"\[0\].answers: a list is missing"),
        ("nq", [], "no row with an answer; give a .json or .jsonl file of rows with context"),
        ("nq", DOCUMENTS[:1], r"1 of the 1 rows .* two are needed; give a file with more"),
        (
            "nq",
            [{**row, "context": "word " * 200} for row in DOCUMENTS],
            r"nq: lengths: 512 tokens hold 0 of the 3 rows .* use at least 10\d\d",
        ),
    ],
)
def test_damaged_rows_and_short_lengths_are_refused(
    make: Callable[..., RecallCompletion], name: str, rows: list[dict], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(name, rows)


def test_a_missing_file_is_refused_and_a_file_is_hashed(
    make: Callable[..., RecallCompletion], tmp_path: Path
) -> None:
    task = make("nq", DOCUMENTS)
    assert list(input_hashes(task.tools.config)) == [str(tmp_path / "rows.jsonl")]
    task.tools.config.recall_completion.nq = str(tmp_path / "other.jsonl")
    with pytest.raises(UserError, match=r"no such file; give a .json or .jsonl file of rows with"):
        make_task("nq", task.tools)


@pytest.mark.skipif("MEMLM_DATA" not in os.environ, reason="MEMLM_DATA names no corpora")
def test_paragraphs_of_squad(make: Callable[..., RecallCompletion]) -> None:
    (file,) = (Path(os.environ["MEMLM_DATA"]) / "squad").glob("*.json")
    articles = json.loads(file.read_text())["data"]
    paragraphs = [article["paragraphs"][0] for article in articles]
    rows = [
        {
            "text": f"{one['context']} {asked['question']} It is\n",
            "value": asked["answers"][0]["text"],
        }
        for one in paragraphs
        for asked in one["qas"][:5]
        if asked["answers"]
    ]
    task = make("squad_completion", rows, lengths=[4096])
    assert task.settings()[0].trials == 4
    for index in range(4):
        trial = task.trial(4096, index)
        row = rows[trial.labels["row"]]
        assert "".join(texts(task, trial)) == row["text"].strip()
        (question,) = trial.questions
        assert task.score(question, f" {row['value'].upper()}, they say\n") == 1.0
        assert row["value"] in texts(task, trial)[0]
