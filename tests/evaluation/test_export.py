"""Task files of lm-evaluation-harness, read by hand: the prompts and scores are ours."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.config import EvaluationConfig, RecallCompletionOptions, RetentionOptions
from memlm.evaluation.export.__main__ import main
from memlm.evaluation.export.documents import checked_text
from memlm.evaluation.export.task_files import SCORES
from memlm.evaluation.prompts import Question
from memlm.evaluation.tasks import make_task
from memlm.evaluation.tasks.base import PromptTask, Tools

LENGTH = 2048
TRIALS = 3
TASKS = (
    *("needle", "passkey", "niah", "niah_single_1", "niah_multiquery", "vt", "qa_1", "retention"),
    *("babilong_qa1", "babilong_qa8", "babilong_qa19", "nq", "swde", "stories_2"),
)


class Loader(yaml.SafeLoader):
    """Reads the harness's functions as their names."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options that name files with rows."""
    folder = tmp_path_factory.mktemp("corpora")
    articles = [
        {
            "title": f"T{town}",
            "paragraphs": [
                {
                    "context": f"In town T{town} the keeper of inn N{town}{inn} is Kay {inn}. " * 3,
                    "qas": [
                        {
                            "question": f"Who keeps inn N{town}{inn}?",
                            "answers": [{"text": f"Kay {inn}"}, {"text": "The Keeper"}],
                        }
                    ],
                }
                for inn in range(4)
            ],
        }
        for town in range(5)
    ]
    texts = [
        {"text": f"Inn {inn}\nKeeper: Kay {inn}\nkeeper:", "key": "keeper", "value": f"Kay {inn}"}
        for inn in range(4)
    ]
    documents = [
        {"context": f"Inn {inn}.", "question": "The inn is", "answers": [f"inn {inn}", "(an inn)"]}
        for inn in range(4)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    (folder / "texts.json").write_text(json.dumps(texts))
    (folder / "documents.json").write_text(json.dumps(documents))
    return {
        "ruler.squad": str(folder / "squad.json"),
        "retention.facts": str(folder / "squad.json"),
        "recall_completion.swde": str(folder / "texts.json"),
        "recall_completion.nq": str(folder / "documents.json"),
    }


@pytest.fixture(scope="module")
def exported(corpora: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tasks"
    named = [word for key, value in corpora.items() for word in (f"--{key}", value)]
    words = (
        f"--lengths {LENGTH} --trials {TRIALS} --tokenizer bytes --seed 3 --output {folder} "
        "--stories.haystack true"
    )
    assert main(["--tasks", ",".join(TASKS), *words.split(), *named]) == 0
    return folder


@pytest.fixture(scope="module")
def tools(corpora: dict[str, str]) -> Tools:
    config = EvaluationConfig(
        tasks=list(TASKS),
        lengths=[LENGTH],
        trials=TRIALS,
        seed=3,
        retention=RetentionOptions(corpora["retention.facts"]),
        recall_completion=RecallCompletionOptions(
            swde=corpora["recall_completion.swde"], nq=corpora["recall_completion.nq"]
        ),
    )
    config.ruler.squad = corpora["ruler.squad"]
    config.stories.haystack = True
    return Tools(config, ByteTokenizer())


def read(folder: Path, task: str) -> tuple[dict, list[dict]]:
    """The task file and its documents."""
    found = yaml.load((folder / f"memlm_{task}_{LENGTH}.yaml").read_text(), Loader)
    lines = Path(found["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    return found, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def scores(exported: Path) -> ModuleType:
    """The Python file beside the task files."""
    spec = importlib.util.spec_from_file_location("scores", exported / "answer_scores.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def harness_score(task: dict, scores: ModuleType, document: dict, prediction: str) -> float:
    """What the harness makes of a generated text, as its documentation says."""
    for end in task["generation_kwargs"]["until"]:
        prediction = prediction.split(end)[0]
    if "process_results" in task:
        file, function = task["process_results"].split(".")
        assert file == "answer_scores"
        (metric,) = task["metric_list"]
        return getattr(scores, function)(document, [prediction])[metric["metric"]]
    (chain,) = task["filter_list"]
    regex, first = chain["filter"]
    assert (regex["function"], first["function"]) == ("regex", "take_first")
    assert task["metric_list"][0]["metric"] == "exact_match"
    found = re.findall(regex["regex_pattern"], prediction)
    return float((found[0].strip() if found else "[invalid]") == document[task["doc_to_target"]])


def answers(question: Question, others: list[str]) -> list[str]:
    """Right, nearly right and wrong ones."""
    right = list(question.references)
    plain = [*right, ", ".join(right), " and ".join(reversed(right)), right[0][:-1], *others]
    changes: list[Callable[[str], str]] = [
        str,
        str.upper,
        str.swapcase,
        lambda text: f"\n {text}",
        lambda text: f"\t{text}\nmore of it.",
        lambda text: f"It is {text}. And 7, or the garden",
        lambda text: f"No.\n{text}",
        lambda text: f"00{text}",
        lambda text: f"{text}9",
        lambda text: text.replace(" ", " \n "),
        lambda text: text.replace(",", ", "),
        lambda text: f"\x01{text}s<example> hallway",
    ]
    return ["", " ", "0", *(change(text) for text in plain for change in changes)]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_scores_are_those_of_the_evaluation(
    exported: Path, tools: Tools, scores: ModuleType, name: str
) -> None:
    task, documents = read(exported, name)
    own = make_task(name, tools)
    assert isinstance(own, PromptTask)
    trials = [own.trial(LENGTH, index) for index in range(TRIALS)]
    asked = [(trial, question) for trial in trials for question in trial.questions]
    assert len(documents) == len(asked) >= TRIALS
    assert task["output_type"] == "generate_until"
    assert task["generation_kwargs"]["max_gen_toks"] == max(one.new_tokens for _, one in asked)
    others = [question.references[0] for _, question in asked]
    seen = set()
    for document, (trial, question) in zip(documents, asked, strict=True):
        ids = np.concatenate([trial.context.read(0, LENGTH), question.token_ids])
        # The harness adds no special token where the tokenizer adds none.
        text = document[task["doc_to_text"]]
        assert tools.tokenizer(text)["input_ids"] == ids.tolist()
        for prediction in answers(question, others):
            expected = own.score(question, prediction)
            assert harness_score(task, scores, document, prediction) == expected, prediction
            seen.add(expected)
    assert {0.0, 1.0} <= seen


def test_ablations_of_the_score_would_be_seen(exported: Path, scores: ModuleType) -> None:
    """The comparison above fails for a pattern that takes another number."""
    task, (document, *_) = read(exported, "needle")
    task["filter_list"][0]["filter"][0]["regex_pattern"] = r"(\d+)"
    late = f"no. {document['target']}"
    assert harness_score(task, scores, document, late) == 1.0
    task, (document, *_) = read(exported, "needle")
    assert harness_score(task, scores, document, late) == 0.0


def test_every_score_names_a_function_or_a_pattern(scores: ModuleType) -> None:
    for score in SCORES.values():
        assert (score.pattern is None) == callable(getattr(scores, score.function, None))


def test_ids_that_are_other_ones_as_text_are_refused() -> None:
    tokenizer = ByteTokenizer()
    assert checked_text(tokenizer, tokenizer.encode_bytes("née".encode()), "here") == "née"
    half = tokenizer.encode_bytes("née".encode()[:2])
    with pytest.raises(UserError, match=r"here: .* 4 tokens instead of 2, others from token 1 on"):
        checked_text(tokenizer, half, "here")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks mqar", "tasks: mqar cannot be exported: it scores token ids"),
        ("--tasks needle,longbench_lcc", "tasks: longbench_lcc cannot be exported"),
        ("--tasks scbench_kv", "tasks: scbench_kv cannot be exported"),
        ("--tasks needel", "unknown task 'needel'; did you mean 'needle'"),
        ("--tasks needle --model x", "--model is no option of the export"),
        ("--tasks needle --lengths 32", "lengths: 32 tokens are too short"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    output = tmp_path / "out"
    assert main([*words.split(), "--tokenizer", "bytes", "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_a_haystack_that_is_cut_inside_a_character_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("é" * 4000)
    words = f"--tasks needle --lengths 512 --trials 9 --haystack {tmp_path / 'text.txt'}"
    output = tmp_path / "out"
    assert main([*words.split(), "--tokenizer", "bytes", "--output", str(output)]) == 2
    assert "this tokenizer cannot export the task" in capsys.readouterr().err
    assert not output.exists()


def test_a_folder_that_holds_something_and_a_missing_tokenizer_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").write_text("")
    words = ["--tasks", "needle", "--output", str(tmp_path)]
    assert main([*words, "--tokenizer", "bytes"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(words) == 2
    assert "--tokenizer is needed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_answers_of_different_lengths_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], corpora: dict[str, str]
) -> None:
    rows = json.loads(Path(corpora["recall_completion.nq"]).read_text())
    rows[0]["answers"].append("x" * 69)  # and a space: 70 bytes
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = f"--tasks nq --lengths 512 --tokenizer bytes --output {tmp_path / 'out'}"
    assert main([*words.split(), "--recall_completion.nq", str(tmp_path / "rows.json")]) == 0
    assert (
        "memlm_nq_512: answers have at most 48 to 70 tokens in eval.py" in capsys.readouterr().err
    )


def test_the_command_reads_every_prompt_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--tasks passkey,needle --lengths 512,1k --trials 2 --tokenizer bytes"
    assert main([*words.split(), "--output", str(tmp_path / "out")]) == 0
    command = capsys.readouterr().out
    for length in (512, 1024):
        assert f"memlm_passkey_{length},memlm_" in command
    length = int(re.search(r"max_length=(\d+)", command)[1])
    # A pass key's prompt is as long as fits: 1024 tokens with its answer, or a key's digit less.
    assert 1020 <= length <= 1024
