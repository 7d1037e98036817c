"""RULER's question answering: the official prompt, its documents and what is asked about them."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.config import RulerOptions
from memlm.evaluation.prompts import Trial
from memlm.evaluation.tasks import make_task
from memlm.evaluation.tasks.base import Tools
from memlm.evaluation.tasks.ruler_qa import QuestionAnswering

START = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n"
)
END = (
    "\n\nAnswer the question based on the given documents. Only give me the answer and do not "
    "output any other words.\n\nQuestion: {query} Answer:"
)
FILLER = "It stands by the road that leads over the hill to the old mill, and few people pass it."


def squad(articles: int, paragraphs: int) -> dict:
    """Each paragraph names the keeper of one inn, and each article is about one town."""
    data = []
    for town in range(articles):
        members = []
        for inn in range(paragraphs):
            number = town * paragraphs + inn
            context = f"In town T{town} the keeper of inn N{number} is called K{number * 7919}. "
            answers = [{"text": f"K{number * 7919}", "answer_start": 0}]
            question = f"Who is the keeper of inn N{number}?"
            asked = {"question": question, "answers": answers, "is_impossible": False}
            members.append({"context": context + FILLER * (1 + inn % 3), "qas": [asked]})
        data.append({"title": f"T{town}", "paragraphs": members})
    return {"version": "v2.0", "data": data}


def hotpotqa(questions: int) -> list[dict]:
    """Two of ten documents lead from an inn to its keeper and from the keeper to a colour."""
    rows = []
    for number in range(questions):
        context = [
            [f"Inn N{number}", [f"The keeper of N{number} is K{number}.", f" {FILLER}"]],
            [f"Keeper K{number}", [f"The colour of K{number} is C{number * 7919}.", f" {FILLER}"]],
            *([f"Hill {number}-{other}", [FILLER, f" {FILLER}"]] for other in range(8)),
        ]
        rows.append(
            {
                "question": f"Which colour has the keeper of N{number}?",
                "answer": f"C{number * 7919}",
                "supporting_facts": [[context[0][0], 0], [context[1][0], 0]],
                "context": context,
            }
        )
    return rows


@pytest.fixture
def options(tmp_path: Path) -> RulerOptions:
    files = RulerOptions(str(tmp_path / "squad.json"), str(tmp_path / "hotpotqa.json"))
    Path(files.squad).write_text(json.dumps(squad(30, 8)), encoding="utf-8")
    Path(files.hotpotqa).write_text(json.dumps(hotpotqa(20)), encoding="utf-8")
    return files


def make(
    name: str, make_tools: Callable[..., Tools], options: RulerOptions, *lengths: int, **kwargs
) -> QuestionAnswering:
    config = {"lengths": list(lengths), "trials": 4, "ruler": options}
    task = make_task(name, make_tools(config, **kwargs))
    assert isinstance(task, QuestionAnswering)
    return task


def text(task: QuestionAnswering, trial: Trial) -> str:
    ids = trial.context.read(0, len(trial.context)).tolist()
    return task.tools.tokenizer.decode(ids + trial.questions[0].token_ids.tolist())


def tokens(trial: Trial) -> int:
    return len(trial.context) + len(trial.questions[0].token_ids) + trial.questions[0].new_tokens


def answer(name: str, prompt: str) -> str:
    """Looks the answer up in the documents."""
    inn = re.findall(r"N\d+", prompt)[-1]
    if name == "qa_1":
        return re.findall(rf"keeper of inn {inn} is called (K\d+)", prompt)[0]
    keeper = re.findall(rf"keeper of {inn} is (K\d+)", prompt)[0]
    return re.findall(rf"colour of {keeper} is (C\d+)", prompt)[0]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_prompts(
    name: str,
    kind: str,
    options: RulerOptions,
    make_tools: Callable[..., Tools],
    sentencepiece_tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else sentencepiece_tokenizer
    task = make(name, make_tools, options, 1024, 4096, 16384, tokenizer=tokenizer)
    for length, indices in ((1024, 3), (4096, 3), (16384, 2)):
        for index in range(indices):
            trial = task.trial(length, index)
            # The longest document, or 1 % where tokens are only estimated.
            assert length - max(350, length // 100) < tokens(trial) <= length
            question = trial.questions[0]
            assert question.new_tokens == 32
            prompt = text(task, trial)
            found = answer(name, prompt)
            assert question.references == (found,)
            assert task.score(question, f"The answer is {found.lower()}.") == 1
            assert task.score(question, f"{found[:-1]} {found[1:]}") == 0
            assert found in trial.excerpt
            headings = re.findall(r"Document (\d+):", prompt)
            assert headings == [str(place + 1) for place in range(trial.labels["documents"])]
            assert all(1 <= place <= len(headings) for place in trial.labels["places"])


def documents(prompt: str, query: str) -> list[str]:
    """The documents of a byte-level prompt, all other text compared."""
    end = END.format(query=query)
    assert prompt.startswith(START)
    assert prompt.endswith(end)
    parts = re.split(r"(?:^|\n\n)Document (\d+):\n", prompt.removeprefix(START).removesuffix(end))
    assert parts[0] == ""
    assert parts[1::2] == [str(place) for place in range(1, len(parts) // 2 + 1)]
    return parts[2::2]


def test_paragraphs_of_the_same_article_come_first(
    options: RulerOptions, make_tools: Callable[..., Tools]
) -> None:
    task = make("qa_1", make_tools, options, 1024, 8192)
    all_documents = task.corpus.documents
    places = set()
    for length in (1024, 8192):
        for index in range(4):
            trial = task.trial(length, index)
            inn = answer("qa_1", prompt := text(task, trial))
            number = int(inn[1:]) // 7919
            found = documents(prompt, f"Who is the keeper of inn N{number}?")
            assert set(found) <= set(all_documents)
            assert len(set(found)) == len(found) == trial.labels["documents"]
            same = [document for document in found if f"town T{number // 8} " in document]
            assert len(same) == min(8, len(found))
            needed = next(document for document in found if inn in document)
            assert trial.labels["places"] == [found.index(needed) + 1]
            places.add(tuple(trial.labels["places"]))
    assert len(found) > 20
    assert len(places) > 2


def test_all_ten_documents_or_the_supporting_ones(
    options: RulerOptions, make_tools: Callable[..., Tools]
) -> None:
    task = make("qa_2", make_tools, options, 1024, 8192)
    for length in (1024, 8192):
        trial = task.trial(length, 0)
        number = int(trial.questions[0].references[0][1:]) // 7919
        found = documents(text(task, trial), f"Which colour has the keeper of N{number}?")
        own = [f"Inn N{number}\n", f"Keeper K{number}\n", f"Hill {number}-"]
        of_context = [document for document in found if document.startswith(tuple(own))]
        assert sum(document.startswith(tuple(own[:2])) for document in found) == 2
        assert len(of_context) == min(10, len(found))
        assert (len(found) > 10) is (length == 8192)


def test_same_prompt_every_time(options: RulerOptions, make_tools: Callable[..., Tools]) -> None:
    first = make("qa_1", make_tools, options, 2048, 4096)
    again = make("qa_1", make_tools, options, 2048)
    again.trial(2048, 3)
    assert first.trial(2048, 1).fingerprint() == again.trial(2048, 1).fingerprint()
    places = [(length, index) for length in (2048, 4096) for index in (0, 1)]
    assert len({first.trial(*place).fingerprint() for place in places}) == 4
    # Behind the last question the first comes again, among other documents.
    count = len(first.corpus.questions)
    one, other = first.trial(2048, 1), first.trial(2048, 1 + count)
    assert one.questions[0].references == other.questions[0].references
    assert one.fingerprint() != other.fingerprint()


def test_an_answer_longer_than_official_has_room(
    make_tools: Callable[..., Tools], tmp_path: Path
) -> None:
    content = squad(2, 8)
    for entry in content["data"]:
        for paragraph in entry["paragraphs"]:
            paragraph["qas"][0]["answers"].append({"text": FILLER, "answer_start": 0})
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    task = make("qa_1", make_tools, RulerOptions(squad=str(path)), 1024)
    trial = task.trial(1024, 0)
    assert trial.questions[0].new_tokens == len(FILLER) + 1
    assert tokens(trial) <= 1024
    assert task.score(trial.questions[0], FILLER) == 1


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_lengths_that_cannot_be(
    name: str, options: RulerOptions, make_tools: Callable[..., Tools]
) -> None:
    option = "ruler.squad" if name == "qa_1" else "ruler.hotpotqa"
    with pytest.raises(UserError, match=rf"{name}: lengths: 256 tokens are too short") as caught:
        make(name, make_tools, options, 256, 1024)
    least = int(re.findall(r"at least (\d+)$", str(caught.value))[0])
    assert make(name, make_tools, options, least).trial(least, 0).labels["documents"] <= 2
    with pytest.raises(UserError, match=r"262144 tokens are more than the \d+ documents") as caught:
        make(name, make_tools, options, 1024, 1 << 18)
    assert f"--{option} FILE" in str(caught.value)
    most = int(re.findall(r"give: about (\d+);", str(caught.value))[0])
    total = sum(
        len(document) for document in make(name, make_tools, options, 1024).corpus.documents
    )
    assert total < most < 1.3 * total
    # Prompts of lengths that were not configured are checked as well.
    task = make(name, make_tools, options, 1024)
    trial = task.trial(most - 500, 0)
    assert tokens(trial) > most - 900
    # Of nearly all documents none comes twice.
    found = re.split(r"\s+Document \d+:\n", text(task, trial).partition(END[:40])[0])[1:]
    assert len(set(found)) == len(found) == trial.labels["documents"]
    with pytest.raises(UserError, match="are more than the"):
        task.trial(most + 500, 0)


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_published_files(
    name: str, make_tools: Callable[..., Tools], sentencepiece_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = os.environ.get("MEMLM_DATA")
    if not folder:
        pytest.skip("MEMLM_DATA is not set: the folder with squad/ and hotpotqa/")
    files = [str(next(Path(folder, part).glob("*.json"))) for part in ("squad", "hotpotqa")]
    for tokenizer in (None, sentencepiece_tokenizer):
        task = make(name, make_tools, RulerOptions(*files), 1024, 4096, 16384, tokenizer=tokenizer)
        for length in (1024, 4096, 16384):
            for index in range(3):
                trial = task.trial(length, index)
                assert tokens(trial) <= length
                assert tokens(trial) > length - 4000
                prompt = text(task, trial).lower()
                if name == "qa_1":
                    assert all(one.lower() in prompt for one in trial.questions[0].references)


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_without_the_documents_that_answer(
    name: str, options: RulerOptions, make_tools: Callable[..., Tools]
) -> None:
    task = make(name, make_tools, options, 2048)
    for index in range(4):
        plain, absent = (task.trial(2048, index, variant) for variant in ("plain", "absent"))
        assert absent.questions[0].references == plain.questions[0].references
        with pytest.raises(IndexError):
            answer(name, text(task, absent))
        shown = [re.findall(r"Document \d+:\n(.*)", text(task, trial)) for trial in (plain, absent)]
        assert len(shown[1]) == len(shown[0]) - (1 if name == "qa_1" else 2)
        assert set(shown[1]) < set(shown[0])
