"""SQuAD and HotpotQA: every layout gives the same questions, every broken file one line."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from memlm.errors import UserError
from memlm.evaluation.question_files import (
    DocumentQuestion,
    hotpotqa_questions,
    squad_questions,
)


def squad_article(title: str, *paragraphs: tuple[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {"title": title, "paragraphs": [{"context": c, "qas": q} for c, q in paragraphs]}


def asked(question: str, *answers: str, impossible: bool = False) -> dict[str, Any]:
    return {
        "question": question,
        "id": question,
        "is_impossible": impossible,
        "answers": [{"text": answer, "answer_start": 0} for answer in answers],
    }


SQUAD = {
    "version": "v2.0",
    "data": [
        squad_article(
            "Rivers",
            ("The Oder is long.", [asked("What is long?", "The Oder", "Oder", "Oder")]),
            ("A brook is short.", [asked("Who is he?", impossible=True), asked("Short?", "brook")]),
        ),
        squad_article("Hills", ("Hills are high.", [asked("What is high?", "Hills")])),
    ],
}
SQUAD_ROWS = [
    {
        "id": str(number),
        "title": title,
        "context": context,
        "question": question,
        "answers": {"text": answers, "answer_start": [0] * len(answers)},
    }
    for number, (title, context, question, answers) in enumerate(
        [
            ("Rivers", "The Oder is long.", "What is long?", ["The Oder", "Oder", "Oder"]),
            ("Rivers", "A brook is short.", "Who is he?", []),
            ("Rivers", "A brook is short.", "Short?", ["brook"]),
            ("Hills", "Hills are high.", "What is high?", ["Hills"]),
        ]
    )
]
SQUAD_DOCUMENTS = ["A brook is short.", "Hills are high.", "The Oder is long."]
SQUAD_QUESTIONS = [
    DocumentQuestion("What is long?", ("The Oder", "Oder"), (2,), (0,)),
    DocumentQuestion("Short?", ("brook",), (0,), (2,)),
    DocumentQuestion("What is high?", ("Hills",), (1,), ()),
]

CONTEXT = {"Oder": ["It is long.", " It is wide."], "Elbe": ["It is old."], "Alps": ["High."]}
HOTPOTQA = [
    {
        "_id": "1",
        "question": "Which river is long?",
        "answer": "Oder",
        "supporting_facts": [["Oder", 0], ["Elbe", 0]],
        "context": [[title, sentences] for title, sentences in CONTEXT.items()],
    }
]
HOTPOTQA_ROWS = [
    HOTPOTQA[0]
    | {
        "supporting_facts": {"title": ["Oder", "Elbe"], "sent_id": [0, 0]},
        "context": {"title": list(CONTEXT), "sentences": list(CONTEXT.values())},
    }
]
HOTPOTQA_DOCUMENTS = ["Alps\nHigh.", "Elbe\nIt is old.", "Oder\nIt is long. It is wide."]


def write(path: Path, content: Any) -> str:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, content)) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("dev.json", SQUAD), ("rows.json", SQUAD_ROWS), ("rows.jsonl", SQUAD_ROWS)],
)
def test_squad_layouts(name: str, content: Any, tmp_path: Path) -> None:
    found = squad_questions(write(tmp_path / name, content), "ruler.squad")
    assert found.documents == SQUAD_DOCUMENTS
    assert found.questions == SQUAD_QUESTIONS


def test_the_first_squad_has_no_is_impossible(tmp_path: Path) -> None:
    question = asked("What?", "Oder")
    del question["is_impossible"]
    content = {"data": [squad_article("Rivers", ("The Oder.", [question]))]}
    found = squad_questions(write(tmp_path / "dev.json", content), "ruler.squad")
    assert found.questions == [DocumentQuestion("What?", ("Oder",), (0,), ())]


@pytest.mark.parametrize(
    ("name", "content"),
    [("dev.json", HOTPOTQA), ("rows.json", HOTPOTQA_ROWS), ("rows.jsonl", HOTPOTQA_ROWS)],
)
def test_hotpotqa_layouts(name: str, content: Any, tmp_path: Path) -> None:
    found = hotpotqa_questions(write(tmp_path / name, content), "ruler.hotpotqa")
    assert found.documents == HOTPOTQA_DOCUMENTS
    assert found.questions == [
        DocumentQuestion("Which river is long?", ("Oder",), needed=(2, 1), related=(0,))
    ]


def test_without_supporting_facts_every_document_is_needed(tmp_path: Path) -> None:
    row = {name: value for name, value in HOTPOTQA[0].items() if name != "supporting_facts"}
    found = hotpotqa_questions(write(tmp_path / "dev.json", [row]), "ruler.hotpotqa")
    assert found.questions[0].needed == (2, 1, 0)
    assert found.questions[0].related == ()


@pytest.mark.parametrize(
    ("read", "rows", "config"),
    [(squad_questions, SQUAD_ROWS, None), (hotpotqa_questions, HOTPOTQA_ROWS, "distractor")],
)
def test_data_set_of_the_hub(read, rows, config, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        calls.append((name, config, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read("someone/questions", "ruler.squad")
    assert calls == [("someone/questions", config, "validation")]
    assert found.documents in (SQUAD_DOCUMENTS, HOTPOTQA_DOCUMENTS)
    assert len(found.questions) == (3 if read is squad_questions else 1)


@pytest.mark.parametrize("error", [ConnectionError("no network\nmore"), ValueError("no such")])
def test_data_set_that_cannot_be_loaded(error, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as caught:
        squad_questions("rajpurkar/squad_v2", "ruler.squad")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("'rajpurkar/squad_v2'", str(error).splitlines()[0], "--ruler.squad FILE"):
        assert part in message


BROKEN_SQUAD = {
    "no 'data'": ({"version": "v2.0"}, "no field 'data'"),
    "near miss": ({"dada": []}, "did you mean 'dada'"),
    "data no list": ({"data": {}}, "data: a list is missing"),
    "no paragraphs": ({"data": [{"title": "a"}]}, "data[0]: no field 'paragraphs'"),
    "no qas": (
        {"data": [{"paragraphs": [{"context": "a"}]}]},
        "data[0].paragraphs[0]: no field 'qas'",
    ),
    "no context": (
        {"data": [{"paragraphs": [{"qas": []}]}]},
        "data[0].paragraphs[0]: no field 'context'",
    ),
    "no answers": (
        {"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "b"}]}]}]},
        "data[0].paragraphs[0].qas[0]: no field 'answers'",
    ),
    "question no text": (
        {"data": [{"paragraphs": [{"context": "a", "qas": [{"question": 3, "answers": []}]}]}]},
        "qas[0].question: a text is missing",
    ),
    "nothing answered": (
        {"data": [squad_article("a", ("b", [asked("c", impossible=True), asked("d", " ")]))]},
        "no question with an answer",
    ),
    "empty list": ([], "no question with an answer"),
    "row without context": ([{"title": "a"}], "[0]: no field 'context'"),
    "row without title": ([{"context": "a"}], "[0]: no field 'title'"),
    "answers no columns": (
        [{"title": "a", "context": "b", "question": "c", "answers": ["d"]}],
        "[0].answers: an object is missing",
    ),
    "a number": (3, "a list is missing here"),
}
BROKEN_HOTPOTQA = {
    "an object": ({"data": []}, "a list is missing here"),
    "no context": ([{"question": "a"}], "[0]: no field 'context'"),
    "empty context": ([{"context": []}], "[0]: 'context' is empty"),
    "no pair": ([{"context": [["title"]]}], "[0].context[0]: a pair"),
    "sentences no list": ([{"context": [["title", "text"]]}], "[0].context[0][1]: a list"),
    "columns of two lengths": (
        [{"context": {"title": ["a", "b"], "sentences": [["c"]]}}],
        "[0].context: 2 in 'title' but 1 in 'sentences'",
    ),
    "no column": ([{"context": {"title": ["a"]}}], "[0].context: no field 'sentences'"),
    "supporting facts": (
        [{"context": [["a", ["b"]]], "supporting_facts": [[]]}],
        "[0].supporting_facts[0]: a pair",
    ),
    "no answer": ([{"context": [["a", ["b"]]]}], "[0]: no field 'answer'"),
    "no question": ([{"context": [["a", ["b"]]], "answer": "b"}], "[0]: no field 'question'"),
}


@pytest.mark.parametrize(
    ("read", "content", "problem"),
    [(squad_questions, *case) for case in BROKEN_SQUAD.values()]
    + [(hotpotqa_questions, *case) for case in BROKEN_HOTPOTQA.values()],
    ids=[*BROKEN_SQUAD, *BROKEN_HOTPOTQA],
)
def test_malformed_files(read, content: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(write(tmp_path / "broken.json", content), "ruler.squad")
    message = str(caught.value)
    assert message.startswith("ruler.squad: ")
    assert "broken.json" in message
    assert problem in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("missing.json", None, "no such file; give a SQuAD 2.0 JSON file"),
        ("missing.jsonl", None, "--ruler.squad FILE"),
        ("folder.json", "folder", "is a folder"),
        ("cut.json", b'{"data": [', "is not JSON"),
        ("lines.jsonl", b'{"title": "a"}\n{"title', "is not JSON"),
        ("empty.json", b"", "is not JSON"),
        ("latin.json", b'{"data": "\xe9"}', "is not UTF-8"),
    ],
)
def test_files_that_cannot_be_read(
    name: str, data: bytes | str | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        squad_questions(str(path), "ruler.squad")
    assert name in str(caught.value)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def data_file(*parts: str) -> str:
    folder = os.environ.get("MEMLM_DATA")
    if not folder:
        pytest.skip("MEMLM_DATA is not set: the folder with squad/ and hotpotqa/")
    return str(next(Path(folder, parts[0]).glob(parts[1])))


def test_a_published_squad_file() -> None:
    found = squad_questions(data_file("squad", "*.json"), "ruler.squad")
    assert len(found.documents) > 500
    for question in found.questions[:200]:
        assert question.answers[0] in found.documents[question.needed[0]]


def test_hotpotqa_in_the_columns_of_the_hub() -> None:
    found = hotpotqa_questions(data_file("hotpotqa", "*.json"), "ruler.hotpotqa")
    assert len(found.questions) == 100
    assert all(len(one.needed) == 2 for one in found.questions)
    assert {len(one.related) for one in found.questions} >= {8}
