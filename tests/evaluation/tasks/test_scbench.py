"""SCBench: what is made, what is read from published files, and what is refused."""

import json
import re
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.config import ScbenchOptions
from memlm.evaluation.prompts import CONTEXT, Trial
from memlm.evaluation.runner import input_hashes
from memlm.evaluation.tasks import GROUPS, make_task
from memlm.evaluation.tasks.base import Record, Tools
from memlm.evaluation.tasks.scbench import Scbench

MADE = GROUPS["scbench"]


def make(name: str, make_tools: Callable[..., Tools], *lengths: int, **kwargs) -> Scbench:
    tokenizer = kwargs.pop("tokenizer", None)
    config = {"lengths": list(lengths), "trials": 4, "scbench": ScbenchOptions(**kwargs)}
    task = make_task(name, make_tools(config, tokenizer))
    assert isinstance(task, Scbench)
    return task


def texts(task: Scbench, trial: Trial) -> tuple[str, list[str]]:
    """The context and the questions."""
    decode = task.tools.tokenizer.decode
    context = decode(trial.context.read(0, len(trial.context)).tolist())
    return context, [decode(question.token_ids.tolist()) for question in trial.questions]


def prompts(task: Scbench, trial: Trial) -> list[str]:
    """The whole text of every request."""
    context = trial.context.read(0, len(trial.context)).tolist()
    return [
        task.tools.tokenizer.decode(context + question.token_ids.tolist())
        for question in trial.questions
    ]


def answer_kv(prompt: str) -> list[str]:
    (key,) = re.findall(r'Key: "([0-9a-f-]{36})"', prompt)
    assert prompt.count(key) == 2
    return [re.findall(rf'"{key}": "([^"]+)"', prompt)[0]]


def answer_prefix_suffix(prompt: str) -> list[str]:
    prefix, suffix = (re.findall(rf'{end}: "(\w+)"', prompt)[0] for end in ("Prefix", "Suffix"))
    lines = re.findall(r"\b[a-z]{24}\b", prompt)
    found = [line for line in lines if line.startswith(prefix) and line.endswith(suffix)]
    assert len(found) == 1
    return found


def answer_vt(prompt: str) -> list[str]:
    (value,) = set(re.findall(r"value (\d{5})", prompt))
    known, found = {value}, []
    for name, source in re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)", prompt):
        if source in known:
            known.add(name)
            found.append(name)
    assert len(found) == 5
    return found


def answer_mf(prompt: str) -> list[str]:
    left = json.loads(re.findall(r"\[[\d, ]+\]", prompt)[0])
    rank, which = re.findall(r"The (second |third |)(largest|smallest|median) number", prompt)[0]
    if which == "median":
        below = {one: sum(other < one for other in left) for one in left}
        return [str(next(one for one in left if 2 * below[one] + 1 == len(left)))]
    pick = {"largest": max, "smallest": min}[which]
    for _ in range(("", "second ", "third ").index(rank)):
        left.remove(pick(left))
    return [str(pick(left))]


def answer_many_shot(prompt: str) -> list[str]:
    pattern = r"Object: size: (\w+), colour: (\w+), shape: (\w+), material: (\w+)\sClass:"
    shots = re.findall(pattern + r" (\([A-E]\))", prompt)
    (asked,) = re.findall(pattern + "$", prompt)
    assert len(shots) == prompt.count("Object:") - 1
    assert asked not in [shot[:4] for shot in shots]
    found = set()
    for place in range(4):
        rule = {shot[place]: set() for shot in shots}
        for shot in shots:
            rule[shot[place]].add(shot[4])
        if all(len(labels) == 1 for labels in rule.values()):
            found |= rule[asked[place]]
    assert len(found) == 1
    return list(found)


ORACLES = {
    "scbench_kv": answer_kv,
    "scbench_prefix_suffix": answer_prefix_suffix,
    "scbench_vt": answer_vt,
    "scbench_mf": answer_mf,
    "scbench_many_shot": answer_many_shot,
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_answers_follow_from_the_context_alone(
    kind: str,
    name: str,
    make_tools: Callable[..., Tools],
    sentencepiece_tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else sentencepiece_tokenizer
    task = make(name, make_tools, 3000, 6000, mode="multi_request", tokenizer=tokenizer)
    contexts = set()
    for length, trials in ((3000, 3), (6000, 1)):
        for index in range(trials):
            trial = task.trial(length, index)
            context, asked = texts(task, trial)
            contexts.add(context)
            assert len(asked) == len(set(asked)) == 5
            for question, text in zip(trial.questions, prompts(task, trial), strict=True):
                found = ORACLES[name](text)
                assert list(question.references) == found
                assert task.score(question, " ".join(found)) == 1
                others = [one.references for one in trial.questions]
                wrong = next((one for one in others if one != question.references), ("(Z)",))
                assert task.score(question, " ".join(wrong)) == 0
                assert question.new_tokens >= len(tokenizer.encode(" ".join(found)))
            # A conversation with the right answers, and room for one answer per turn.
            gold = make(name, make_tools, length, tokenizer=tokenizer).trial(length, index)
            assert texts(task, gold)[0] == context
            total = len(gold.context) + sum(
                len(one.token_ids) + one.new_tokens for one in gold.questions
            )
            assert 0.85 * length < total <= length
    assert len(contexts) == 4


def test_one_prefix_or_one_suffix_is_not_enough(make_tools: Callable[..., Tools]) -> None:
    task = make("scbench_prefix_suffix", make_tools, 20000, mode="multi_request")
    context, asked = texts(task, task.trial(20000, 0))
    lines = context.split("\n")[2:]
    for question in asked:
        prefix, suffix = re.findall(r'"(\w+)"', question)
        assert sum(line.startswith(prefix) for line in lines) > 3
        assert sum(line.endswith(suffix) for line in lines) > 3


def test_extremes_and_rules_cannot_be_guessed(make_tools: Callable[..., Tools]) -> None:
    mf = make("scbench_mf", make_tools, 2000, turns=7)
    found = [{q.turn.input: q.references for q in mf.trial(2000, i).questions} for i in range(4)]
    assert all(len({answers[key] for answers in found}) > 1 for key in found[0])
    shots = make("scbench_many_shot", make_tools, 3000, turns=20)
    labels = [one.references[0] for i in range(8) for one in shots.trial(3000, i).questions]
    assert max(labels.count(label) for label in set(labels)) < 0.35 * len(labels)


ROWS = {
    "scbench_kv": [
        {
            "id": 0,
            "context": '{"a": "b", "c": "d"}',
            "multi_turns": [
                {"input": 'Key: "a"\nValue: ', "answer": "b"},
                {"input": 'Key: "c"\nValue: ', "answer": "d"},
            ],
        }
    ],
    "scbench_vt": [
        {"context": "VAR A = 1", "multi_turns": [{"input": "1?", "answer": ["A", "B"]}]},
    ],
    "scbench_mf": [
        {
            "id": 7,
            "context": [5, 9, 1],
            "multi_turns": [
                {"input": "One number. The largest number of the list is: ", "answer": 9},
                {"input": "One number. The median number of the list is: ", "answer": 5},
            ],
        }
    ],
    "scbench_choice_eng": [
        {
            "context": "A book.",
            "multi_turns": [
                {"input": "Who?", "answer": "Jo", "options": ["Al", "Bo", "Jo", "Mo"]},
                {"input": "Where?", "answer": "here", "options": ["here", "x", "y", "z"]},
            ],
        }
    ],
    "scbench_qa_chn": [{"context": "书。", "multi_turns": [{"input": "谁？", "answer": "小明"}]}],
    "scbench_repoqa_and_kv": [
        {
            "repo": "one",
            "lang": "python",
            "context": "def f(): ...",
            "multi_turns": [
                {"task": "scbench_repoqa", "input": "Find f.", "answer": "def f(x): return x + 1"},
                {"task": "scbench_kv", "input": "Key: a", "answer": "b"},
            ],
        },
        {
            "repo": "one",
            "lang": "python",
            "context": "def g(): ...",
            "multi_turns": [{"task": "scbench_repoqa", "input": "Find g.", "answer": "def g(): 0"}],
        },
    ],
}
CONVERSATIONS = {
    "scbench_kv": (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        '{"a": "b", "c": "d"}',
        ['\n\nKey: "a"\nValue: ', 'b\n\nKey: "c"\nValue: '],
    ),
    "scbench_vt": ("VAR A = 1", ["\n\n1?"]),
    "scbench_mf": (
        "What is the largest number of the list?\n\n[5, 9, 1]",
        [
            "\n\nOne number. The largest number of the list is: ",
            "9\n\nWhat is the median number of the list?\n\n"
            "One number. The median number of the list is: ",
        ],
    ),
    "scbench_choice_eng": (
        "Read the book and answer the question.\n\nA book.",
        [
            "\n\nQuestion: Who?\nA. Al\nB. Bo\nC. Jo\nD. Mo\n\nThe the correct answer is",
            "Jo\n\nQuestion: Where?\nA. here\nB. x\nC. y\nD. z\n\n"
            "The letter of the correct answer is",
        ],
    ),
    "scbench_qa_chn": ("阅读以下书籍然后回答问题。\n\n书。", ["\n\n问题：谁？\n答案："]),
    "scbench_repoqa_and_kv": (
        "def f(): ...",
        ["\n\nFind f.", "def f(x): return x + 1\n\nKey: a"],
    ),
}


def write(folder, name: str, rows: list[dict]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("name", ROWS)
def test_published_rows(name: str, tmp_path, make_tools: Callable[..., Tools]) -> None:
    data = write(tmp_path, name, ROWS[name])
    task = make(name, make_tools, 9000, data=data)
    first = {row["context"] if isinstance(row["context"], str) else None for row in ROWS[name]}
    trials = [task.trial(9000, index) for index in range(len(ROWS[name]))]
    trial = next(one for one in trials if texts(task, one) == CONVERSATIONS[name])
    for turn, question in zip(ROWS[name][0]["multi_turns"], trial.questions, strict=True):
        answer = turn["answer"]
        parts = answer if isinstance(answer, list) else [str(answer)]
        assert question.references == tuple(parts)
        assert task.score(question, f" {' '.join(parts)}") == 1
        assert task.score(question, "nothing") < 0.3
    alone = make(name, make_tools, 9000, data=data, mode="multi_request").trial(9000, 0)
    assert alone.follows == CONTEXT
    assert len(first) == len(ROWS[name])
    one_turn = make(name, make_tools, 9000, data=data, turns=1).trial(9000, 0)
    assert len(one_turn.questions) == 1


def test_rows_that_fit_are_taken(tmp_path, make_tools: Callable[..., Tools]) -> None:
    long = ROWS["scbench_kv"][0] | {"context": json.dumps({"a": "b" * 3000, "c": "d"})}
    data = write(tmp_path, "scbench_kv", [long, *ROWS["scbench_kv"]])
    task = make("scbench_kv", make_tools, 1000, 9000, data=data)
    assert {len(task.trial(1000, index).context) for index in range(3)} == {100}
    assert {len(task.trial(9000, index).context) for index in range(2)} == {100, 3099}
    paths = input_hashes(task.tools.config)
    assert [path.rpartition("/")[2] for path in paths] == ["scbench_kv.jsonl"]


WRONG = {
    "no row": ("scbench_kv", [], "no row"),
    "no turns": (
        "scbench_kv",
        [{"context": "a", "multi_turns": []}],
        r"\[0\].multi_turns: no turn",
    ),
    "misspelt": ("scbench_kv", [{"kontext": "a"}], "no field 'context'; did you mean 'kontext'"),
    "answer": (
        "scbench_kv",
        [{"context": "a", "multi_turns": [{"input": "b", "answer": {}}]}],
        r"multi_turns\[0\].answer: a text, a number",
    ),
    "options": (
        "scbench_choice_eng",
        [{"context": "a", "multi_turns": [{"input": "b", "answer": "c", "options": ["d"]}]}],
        "'options' has to hold 4 texts, one of them 'c'",
    ),
    "turn's task": (
        "scbench_repoqa_and_kv",
        [
            {
                "context": "a",
                "repo": "r",
                "multi_turns": [{"input": "b", "answer": "c", "task": "scbench_vt"}],
            }
        ],
        "'scbench_vt' is none of scbench_repoqa, scbench_kv",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_malformed_rows(case: str, tmp_path, make_tools: Callable[..., Tools]) -> None:
    name, rows, message = WRONG[case]
    data = write(tmp_path, name, rows)
    with pytest.raises(UserError, match=message):
        make(name, make_tools, 4096, data=data)


def test_refusals(tmp_path, make_tools: Callable[..., Tools]) -> None:
    with pytest.raises(UserError, match="no such file"):
        make("scbench_kv", make_tools, 4096, data=str(tmp_path))
    with pytest.raises(UserError, match="no generator; name SCBench's data"):
        make("scbench_summary", make_tools, 4096)
    with pytest.raises(UserError, match="8 is too many for scbench_mf; the most is 7"):
        make("scbench_mf", make_tools, 4096, turns=8)
    with pytest.raises(UserError, match="did you mean 'multi_turn'"):
        ScbenchOptions(mode="multiturn").validate()
    for name in MADE:
        with pytest.raises(UserError, match="use at least (\\d+)") as caught:
            make(name, make_tools, 100)
        least = int(re.findall(r"use at least (\d+)", str(caught.value))[0])
        assert len(make(name, make_tools, least).trial(least, 0).questions) == 5


def test_scores_by_turn(make_tools: Callable[..., Tools]) -> None:
    task = make("scbench_mf", make_tools, 2000, turns=2)
    records = [
        Record(
            "2000",
            trial,
            condition,
            0.5,
            [{"score": float(first)}, {"score": float(condition == "on")}],
            {"turn": [1, 2]},
        )
        for trial, first in enumerate((1, 0, 0, 0))
        for condition in ("on", "off")
    ]
    found = task.details(records)
    assert (found["mode"], found["history"]) == ("multi_turn", "gold")
    values = {
        condition: [estimate.value for estimate in turns.values()]
        for condition, turns in found["turns"]["2000"].items()
    }
    assert values == {"on": [0.25, 1.0], "off": [0.25, 0.0]}
