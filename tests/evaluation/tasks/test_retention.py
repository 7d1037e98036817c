"""Knowledge retention: the paragraph first, text of other articles behind it, then the question."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.config import RetentionOptions
from memlm.evaluation.prompts import Question, Trial
from memlm.evaluation.tasks import make_task
from memlm.evaluation.tasks.base import ABSENT, PLAIN, Tools
from memlm.evaluation.tasks.retention import Retention

FILLER = " It stands by the road that leads over the hill to the old mill, and few people pass it."


def squad(articles: int = 6, paragraphs: int = 4) -> dict:
    """Each paragraph names the keeper of one inn, and each article is about one town."""
    data = []
    for town in range(articles):
        members = []
        for inn in range(paragraphs):
            number = town * paragraphs + inn
            context = f"In town T{town} the keeper of inn N{number} is called K{number * 7919}."
            answers = [{"text": f"K{number * 7919}", "answer_start": 0}]
            question = f"Who is the keeper of inn N{number}?"
            asked = {"question": question, "answers": answers, "is_impossible": False}
            nobody = {"question": "Who is nobody?", "answers": [], "is_impossible": True}
            members.append({"context": context + FILLER * (1 + inn), "qas": [nobody, asked]})
        data.append({"title": f"T{town}", "paragraphs": members})
    return {"version": "v2.0", "data": data}


@pytest.fixture
def facts(tmp_path: Path) -> str:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(squad()), encoding="utf-8")
    return str(path)


def make(make_tools: Callable[..., Tools], facts: str, *lengths: int, **kwargs) -> Retention:
    config = {"lengths": list(lengths), "trials": 4, "retention": RetentionOptions(facts)}
    task = make_task("retention", make_tools(config, **kwargs))
    assert isinstance(task, Retention)
    return task


def context(task: Retention, trial: Trial) -> str:
    return task.tools.tokenizer.decode(trial.context.read(0, len(trial.context)).tolist())


def asked(task: Retention, trial: Trial) -> str:
    return task.tools.tokenizer.decode(trial.questions[0].token_ids.tolist())


def tokens(trial: Trial) -> int:
    return len(trial.context) + len(trial.questions[0].token_ids) + trial.questions[0].new_tokens


def answer(prompt: str) -> str:
    """Looks the keeper up, or says that there is none."""
    inn = re.findall(r"N\d+", prompt)[-1]
    return (re.findall(rf"keeper of inn {inn} is called (K\d+)", prompt) or ["nobody"])[0]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_prompts(
    kind: str,
    facts: str,
    make_tools: Callable[..., Tools],
    sentencepiece_tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else sentencepiece_tokenizer
    task = make(make_tools, facts, 1024, 4096, 16384, tokenizer=tokenizer)
    for length, indices in ((1024, 4), (4096, 3), (16384, 2)):
        for index in range(indices):
            trial = task.trial(length, index)
            assert tokens(trial) == length
            question = trial.questions[0]
            assert question.new_tokens == 32
            text = context(task, trial)
            found = answer(text + asked(task, trial))
            assert question.references == (found,)
            assert task.score(question, f" {found}\nand more") == 1
            assert task.score(question, "K1") == 0
            # The paragraph stands at the start, all of it, and its town is never named again.
            assert text.startswith(trial.excerpt)
            assert found in trial.excerpt
            town = re.findall(r"town (T\d+) ", trial.excerpt)[0]
            assert len(re.findall(rf"{town}\b", text)) == 1
            absent = task.trial(length, index, ABSENT)
            assert tokens(absent) == length
            assert not context(task, absent).startswith(trial.excerpt)
            assert absent.questions[0].references == question.references
            assert asked(task, absent) == asked(task, trial)
            assert answer(context(task, absent) + asked(task, absent)) == "nobody"


def test_the_whole_text_of_a_prompt(facts: str, make_tools: Callable[..., Tools]) -> None:
    task = make(make_tools, facts, 2048)
    trial = task.trial(2048, 0)
    parts = context(task, trial).split("\n\n")
    paragraphs = [member["context"] for entry in squad()["data"] for member in entry["paragraphs"]]
    assert parts[0] == trial.excerpt
    assert len(parts) > 3
    assert set(parts[:-1]) <= set(paragraphs)
    assert len(set(parts)) == len(parts)
    assert any(one.startswith(parts[-1]) for one in paragraphs)
    inn = re.findall(r"N\d+", trial.excerpt)[0]
    assert asked(task, trial) == f"\n\nQuestion: Who is the keeper of inn {inn}?\nAnswer:"
    assert trial.labels == {"distance": len(trial.context) - len(trial.excerpt) - 2}


def test_the_haystack_follows_when_paragraphs_run_out(
    facts: str, make_tools: Callable[..., Tools], tmp_path: Path
) -> None:
    path = tmp_path / "sea.txt"
    path.write_text("The sea is wide. " * 50, encoding="utf-8")
    config = {
        "lengths": ["8k..4M"],
        "retention": RetentionOptions(facts),
        "haystack": [str(path)],
    }
    task = make_task("retention", make_tools(config))
    short, long = task.trial(8192, 0), task.trial(1 << 22, 0)
    assert tokens(short) == 8192
    assert tokens(long) == 1 << 22
    assert short.excerpt == long.excerpt
    assert long.labels["distance"] > 500 * short.labels["distance"]
    paragraphs = sum(
        len(member["context"]) + 2 for entry in squad()["data"] for member in entry["paragraphs"]
    )
    tail = context(task, short)[paragraphs:]
    assert set(tail.replace("The sea is wide. ", "")) <= set("The sea is wide.")
    # What is held is the paragraphs, not the text.
    assert len(long.context.pieces) < 30
    far = long.context.read((1 << 22) - 500, 1 << 22)
    assert b"The sea is wide. " in bytes(far.astype(np.uint8))


def test_same_prompt_every_time(facts: str, make_tools: Callable[..., Tools]) -> None:
    first, again = make(make_tools, facts, 2048, 4096), make(make_tools, facts, 2048)
    again.trial(2048, 3, ABSENT)
    for variant in (PLAIN, ABSENT):
        expected = first.trial(2048, 1, variant).fingerprint()
        assert again.trial(2048, 1, variant).fingerprint() == expected
    places = [(length, index) for length in (2048, 4096) for index in (0, 1)]
    prints = {first.trial(*place).fingerprint() for place in places}
    prints |= {first.trial(*place, ABSENT).fingerprint() for place in places}
    assert len(prints) == 8


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("New  York\tCity, of course", 1),
        ("\n  new york city\nParis", 1),
        ("Paris\nNew York City", 0),
        ("the big apple", 1),
        ("New York", 0),
        ("", 0),
    ],
)
def test_scores(
    prediction: str, expected: float, facts: str, make_tools: Callable[..., Tools]
) -> None:
    task = make(make_tools, facts, 2048)
    question = Question(np.array([1]), ("New York\n City", "big apple"), 32)
    assert task.score(question, prediction) == expected


def test_out_of_the_reach_of_attention(facts: str, make_tools: Callable[..., Tools]) -> None:
    task = make(make_tools, facts, 1024, distance=700)
    assert task.details([]) == {"least_distance_tokens": 700}
    excerpts = set()
    for index in range(30):
        trial = task.trial(1024, index)
        assert trial.labels["distance"] >= 700
        excerpts.add(trial.excerpt)
    # Paragraphs that are too long for that are never taken, the others all are.
    lengths = {len(excerpt) for excerpt in excerpts}
    assert 1 < len(excerpts) < 24
    assert max(lengths) + 2 + 700 <= 1024 - len("\n\nQuestion: \nAnswer:") - 32
    with pytest.raises(UserError, match="retention: lengths: 1024 tokens are too short") as caught:
        make(make_tools, facts, 1024, 4096, distance=900)
    least = int(re.findall(r"at least (\d+)$", str(caught.value))[0])
    assert make(make_tools, facts, least, distance=900).trial(least, 0).labels["distance"] == 900


def test_one_article_is_not_enough(tmp_path: Path, make_tools: Callable[..., Tools]) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps(squad(articles=1)), encoding="utf-8")
    with pytest.raises(UserError, match=r"retention\.facts: .*one\.json' holds one article only"):
        make(make_tools, str(path), 1024)


def test_a_published_file(make_tools: Callable[..., Tools]) -> None:
    folder = os.environ.get("MEMLM_DATA")
    if not folder:
        pytest.skip("MEMLM_DATA is not set: the folder with squad/")
    task = make(make_tools, str(next(Path(folder, "squad").glob("*.json"))), 2048, 65536)
    for length in (2048, 65536):
        for index in range(3):
            trial = task.trial(length, index)
            assert tokens(trial) == length
            assert any(one in trial.excerpt for one in trial.questions[0].references)
            assert context(task, trial).startswith(trial.excerpt)
