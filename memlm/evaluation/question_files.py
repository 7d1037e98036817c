"""Questions about documents: SQuAD and HotpotQA, from files or the Hub.

Four layouts are read: SQuAD 2.0 and HotpotQA as they are published, and the rows of the Hub's data
sets, as a JSON list or one JSON object per line.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memlm.errors import UserError, nearest

_SQUAD = "a SQuAD 2.0 JSON file, such as dev-v2.0.json"
_HOTPOTQA = "a HotpotQA JSON file, such as hotpot_dev_distractor_v1.json"
_KINDS = {str: "a text", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class DocumentQuestion:
    """A question that documents answer.

    Attributes:
        text: the question.
        answers: the right ones, none empty; at least one.
        needed: numbers of the documents that hold the answer.
        related: numbers of the documents that belong to the question without being needed: the
            other paragraphs of the article (SQuAD), the distractors (HotpotQA).
    """

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    related: tuple[int, ...]


@dataclass(frozen=True)
class QuestionSet:
    """Documents, sorted and none twice, and questions about them in the order of the file."""

    documents: list[str]
    questions: list[DocumentQuestion]


class QuestionOrder:
    """Questions in a drawn order, those left out that are too long for a prompt's length."""

    def __init__(self, count: int, rng: np.random.Generator, tokens_of: Callable[[int], int]):
        """Draw the order.

        Args:
            count: questions.
            rng: draws the order.
            tokens_of: the least tokens of a prompt with the question of a number.
        """
        self.order: list[int] = rng.permutation(count).tolist()
        self.tokens_of = tokens_of
        self.fitting: dict[int, tuple[list[int], Iterator[int]]] = {}

    def pick(self, length: int, index: int) -> int | None:
        """The question of trial `index` among those that fit; None when none does.

        Behind the last one the first comes again.
        """
        found, rest = self.fitting.setdefault(length, ([], iter(self.order)))
        while len(found) <= index:
            number = next(rest, None)
            if number is None:
                break
            if self.tokens_of(number) <= length:
                found.append(number)
        return found[index % len(found)] if found else None

    def least(self) -> int:
        """Tokens of the shortest prompt."""
        return min(map(self.tokens_of, self.order))


class JsonPart:
    """A value in a JSON file that can say where it stands and what was expected there."""

    def __init__(self, value: Any, place: str, where: str):
        self.value = value
        self.place = place
        self.where = where

    def fail(self, problem: str) -> UserError:
        return UserError(f"{self.where}{self.place}{': ' if self.place else ''}{problem}")

    def of(self, kind: type) -> Any:
        """The value, which has to be of a kind."""
        if not isinstance(self.value, kind):
            raise self.fail(f"{_KINDS[kind]} is missing here")
        return self.value

    def field(self, name: str) -> "JsonPart":
        """A field that has to be there."""
        fields = self.of(dict)
        if name not in fields:
            raise self.fail(f"no field {name!r}{nearest(name, fields)}")
        return JsonPart(fields[name], f"{self.place}.{name}".lstrip("."), self.where)

    def has(self, name: str) -> bool:
        return isinstance(self.value, dict) and self.value.get(name) is not None

    def items(self) -> Iterator["JsonPart"]:
        for number, value in enumerate(self.of(list)):
            yield JsonPart(value, f"{self.place}[{number}]", self.where)

    def texts(self) -> list[str]:
        return [item.of(str) for item in self.items()]


def squad_questions(source: str, option: str) -> QuestionSet:
    """The questions of SQuAD (Rajpurkar et al., 2018) that have an answer.

    Args:
        source: a file, or the name of a Hub data set with the columns of rajpurkar/squad_v2.
        option: what the user would set, for messages: ruler.squad.

    Raises:
        UserError: for a file that is missing or malformed, a data set that cannot be loaded, no
            question with an answer.
    """
    content = read_content(source, option, None, _SQUAD)
    if isinstance(content.value, dict):
        articles = _squad_articles(content.field("data"))
    else:
        articles = _squad_rows(content)
    documents = sorted({text for article in articles for text, _ in article})
    numbers = {text: number for number, text in enumerate(documents)}
    questions = []
    for article in articles:
        members = tuple(dict.fromkeys(numbers[text] for text, _ in article))
        for text, asked in article:
            needed = numbers[text]
            related = tuple(number for number in members if number != needed)
            questions += [
                DocumentQuestion(question, answers, (needed,), related)
                for question, answers in asked
            ]
    return _checked(QuestionSet(documents, questions), content)


# Of each paragraph its text and its questions with their answers.
_Article = list[tuple[str, list[tuple[str, tuple[str, ...]]]]]


def _squad_articles(data: JsonPart) -> list[_Article]:
    """Articles as published: paragraphs with their questions."""
    articles = []
    for entry in data.items():
        article: _Article = []
        for paragraph in entry.field("paragraphs").items():
            asked = []
            for question in paragraph.field("qas").items():
                text = question.field("question").of(str)
                if question.has("is_impossible") and question.value["is_impossible"]:
                    continue
                answers = _answers(
                    [one.field("text").of(str) for one in question.field("answers").items()]
                )
                if answers:
                    asked.append((text, answers))
            article.append((paragraph.field("context").of(str), asked))
        articles.append(article)
    return articles


def _squad_rows(rows: JsonPart) -> list[_Article]:
    """Rows of the Hub, one per question; those of an article have its title in common."""
    articles: dict[str, dict[str, list]] = {}
    for row in rows.items():
        paragraphs = articles.setdefault(row.field("title").of(str), {})
        asked = paragraphs.setdefault(row.field("context").of(str), [])
        text = row.field("question").of(str)
        answers = _answers(row.field("answers").field("text").texts())
        if answers:
            asked.append((text, answers))
    return [list(paragraphs.items()) for paragraphs in articles.values()]


def hotpotqa_questions(source: str, option: str) -> QuestionSet:
    """The questions of HotpotQA (Yang et al., 2018) with the documents of their contexts.

    A document is its title, a line end and its sentences. Needed are those with supporting facts,
    or all of a question's documents where the file names none.

    Args:
        source: a file, or the name of a Hub data set with the columns of hotpotqa/hotpot_qa.
        option: what the user would set, for messages: ruler.hotpotqa.

    Raises:
        UserError: as `squad_questions` does.
    """
    content = read_content(source, option, "distractor", _HOTPOTQA)
    read = []
    for row in content.items():
        context = _hotpotqa_context(row.field("context"))
        if not context:
            raise row.fail("'context' is empty")
        read.append((row, context, _supporting_titles(row)))
    documents = sorted({text for _, context, _ in read for _, text in context})
    numbers = {text: number for number, text in enumerate(documents)}
    questions = []
    for row, context, supporting in read:
        of_context = tuple(dict.fromkeys(numbers[text] for _, text in context))
        found = {numbers[text] for title, text in context if title in supporting}
        needed = tuple(number for number in of_context if number in found) or of_context
        related = tuple(number for number in of_context if number not in needed)
        answers = _answers([row.field("answer").of(str)])
        text = row.field("question").of(str)
        if answers:
            questions.append(DocumentQuestion(text, answers, needed, related))
    return _checked(QuestionSet(documents, questions), content)


def _hotpotqa_context(context: JsonPart) -> list[tuple[str, str]]:
    """Titles and whole documents."""
    if isinstance(context.value, dict):
        titles = context.field("title").texts()
        bodies = [sentences.texts() for sentences in context.field("sentences").items()]
        if len(titles) != len(bodies):
            raise context.fail(f"{len(titles)} in 'title' but {len(bodies)} in 'sentences'")
    else:
        titles, bodies = [], []
        for entry in context.items():
            pair = list(entry.items())
            if len(pair) != 2:
                raise entry.fail("a pair of a title and a list of sentences is missing here")
            titles.append(pair[0].of(str))
            bodies.append(pair[1].texts())
    return [
        (title, f"{title}\n{''.join(sentences)}")
        for title, sentences in zip(titles, bodies, strict=True)
    ]


def _supporting_titles(row: JsonPart) -> set[str]:
    if not row.has("supporting_facts"):
        return set()
    facts = row.field("supporting_facts")
    if isinstance(facts.value, dict):
        return set(facts.field("title").texts())
    titles = set()
    for fact in facts.items():
        pair = list(fact.items())
        if not pair:
            raise fact.fail("a pair of a title and a sentence's number is missing here")
        titles.add(pair[0].of(str))
    return titles


def _answers(texts: list[str]) -> tuple[str, ...]:
    """Without repetitions and without the empty one, which every text contains."""
    return tuple(dict.fromkeys(text for text in texts if text.strip()))


def _checked(found: QuestionSet, content: JsonPart) -> QuestionSet:
    if not found.questions:
        raise content.fail("no question with an answer")
    return found


def read_content(
    source: str, option: str, config: str | None, wanted: str, split: str = "validation"
) -> JsonPart:
    """What a file or a data set holds.

    Args:
        source: a .json or .jsonl file, or the name of a Hub data set.
        option: what the user would set, for messages: ruler.squad.
        config, split: of the data set.
        wanted: what a file has to be, for messages.

    Raises:
        UserError: for a file that is missing or no JSON, a data set that cannot be loaded.
    """
    path = Path(source)
    where = f"{option}: {source!r}: "
    if path.exists() or path.suffix in (".json", ".jsonl"):
        return JsonPart(_read(path, where, option, wanted), "", where)
    return JsonPart(_download(source, option, config, wanted, split), "", where)


def _read(path: Path, where: str, option: str, wanted: str) -> Any:
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{where}{problem}; give {wanted}, with --{option} FILE")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return json.loads(text)
        # Not splitlines: JSON may hold the other characters that end a line.
        lines = [line for line in text.split("\n") if line.strip()]
        return [json.loads(line) for line in lines]
    except OSError as error:
        raise UserError(f"{where}cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}is not UTF-8 text; give {wanted}") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}is not JSON ({error.msg}, character {error.pos}); give {wanted}"
        ) from error


def _download(
    name: str, option: str, config: str | None, wanted: str, split: str
) -> list[dict[str, Any]]:
    """The rows of a data set's split."""
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split).to_list()
    # A data set that comes as a script is a RuntimeError.
    except (ValueError, OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{option}: the data set {name!r} cannot be loaded from the Hub ({reason}); give "
            f"{wanted}, with --{option} FILE"
        ) from error
