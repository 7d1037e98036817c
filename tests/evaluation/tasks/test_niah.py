"""Needles in a haystack: the published sentence, question and places."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.config import NiahOptions
from memlm.evaluation.haystack import HaystackPiece
from memlm.evaluation.prompts import Trial
from memlm.evaluation.tasks import make_task
from memlm.evaluation.tasks.base import Tools
from memlm.evaluation.tasks.niah import (
    ACTIONS,
    CITIES,
    PLACES,
    WEATHERS,
    draw_facts,
    sentence_enders,
)

MakeTools = Callable[..., Tools]
# As published.
NEEDLE = (
    "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny "
    "day.\n"
)
QUESTION = "What is the best thing to do in San Francisco?"
PROMPT = (
    "You are a helpful AI bot that answers questions for a user. Keep your response short and "
    "direct\n"
    "\n"
    "Human: <context>\n"
    "{context}\n"
    "</context>\n"
    "\n"
    "{retrieval_question} Don't give information outside the document or repeat your findings\n"
    "\n"
    "Assistant: Here is the most relevant sentence in the context:"
)


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300,000 characters in sentences that all differ; the path of the file."""
    path = tmp_path_factory.mktemp("novel") / "novel.txt"
    sentences = [
        f"In the year {number} nobody {'ever ' * (number % 9)}asked for the weather."
        for number in range(4500)
    ]
    path.write_text(" ".join(sentences))
    return str(path)


def texts(trial: Trial, tokenizer: PreTrainedTokenizerBase, question: int = 0) -> tuple[str, str]:
    """Context and question."""
    context = tokenizer.decode(trial.context.read(0, len(trial.context)).tolist())
    return context, tokenizer.decode(trial.questions[question].token_ids.tolist())


def oracle(context: str, question: str) -> str:
    city = re.search(r"What is the best thing to do in (.*?)\?", question)[1]
    found = re.search(rf"The best thing to do in {city} is [^.]*\.", context)
    return f" {found[0]}" if found else " The text does not say."


def sizes_of(trial: Trial) -> list[int]:
    return [
        len(trial.context) + len(question.token_ids) + question.new_tokens
        for question in trial.questions
    ]


def test_the_published_prompt(make_tools: MakeTools, novel: str) -> None:
    task = make_task("niah", make_tools({"lengths": [2048], "haystack": [novel]}))
    for index in range(5):
        trial = task.trial(2048, index)
        context, question = texts(trial, ByteTokenizer())
        before, after = context.split(NEEDLE)
        head = PROMPT[: PROMPT.index("{context}")]
        assert before.startswith(head)
        text = before.removeprefix(head) + after
        assert text in Path(novel).read_text()
        whole = PROMPT.format(context=context.removeprefix(head), retrieval_question=QUESTION)
        assert context + question == whole
        assert trial.questions[0].references == ("eat a sandwich", "Dolores Park", "sunny day")
        assert sizes_of(trial)[0] >= 2048 - 20
        assert NEEDLE in trial.excerpt
    assert task.kind == "hits"


@pytest.mark.parametrize("length", [1024, 4096, 16384])
@pytest.mark.parametrize("needles", [1, 3])
def test_an_oracle_is_always_right(
    make_tools: MakeTools,
    sentencepiece_tokenizer: PreTrainedTokenizerBase,
    novel: str,
    length: int,
    needles: int,
) -> None:
    for tokenizer in (ByteTokenizer(), sentencepiece_tokenizer):
        settings = {"lengths": [length], "haystack": [novel], "niah": NiahOptions(5, needles)}
        task = make_task("niah", make_tools(settings, tokenizer))
        assert task.kind == ("hits" if needles == 1 else "shares")
        for index in range(5):
            trial = task.trial(length, index)
            answers = []
            for number, question in enumerate(trial.questions):
                answers.append(oracle(*texts(trial, tokenizer, number)))
                assert task.score(question, answers[-1]) == 1
                for phrase in question.references:
                    assert task.score(question, answers[-1].replace(phrase, "sleep")) == 0
            assert len(set(answers)) == needles
            if needles > 1:
                assert task.score(trial.questions[0], answers[1]) == 0
            assert length - 25 * needles <= max(sizes_of(trial)) <= length


def test_what_counts_as_an_answer(make_tools: MakeTools, novel: str) -> None:
    task = make_task("niah", make_tools({"lengths": [1024], "haystack": [novel]}))
    (question,) = task.trial(1024, 0).questions
    for right in (
        NEEDLE,
        "On a SUNNY day, sit in\nDolores\n Park and eat a sandwich!",
    ):
        assert task.score(question, right) == 1
    for wrong in ("", "eat a sandwich in Dolores Park", "Dolores Park on a sunny day", QUESTION):
        assert task.score(question, wrong) == 0
    assert question.new_tokens >= 2 * len(NEEDLE)


@pytest.mark.parametrize("depths", [1, 5, 11])
def test_depths_and_sentence_ends(make_tools: MakeTools, novel: str, depths: int) -> None:
    options = NiahOptions(depths)
    settings = {"lengths": [4096], "haystack": [novel], "niah": options}
    task = make_task("niah", make_tools(settings))
    grid = [round(percent) / 100 for percent in np.linspace(0, 100, depths)]
    for index in range(2 * depths):
        trial = task.trial(4096, index)
        depth = trial.labels["depth"]
        assert depth == grid[index % depths]
        context, _ = texts(trial, ByteTokenizer())
        text, place = context[context.index("<context>\n") + 10 :], trial.labels["positions"][0]
        assert text[place:].startswith(NEEDLE)
        wanted = int((len(text) - len(NEEDLE)) * depth)
        if depth == 1:
            assert text.endswith(NEEDLE)
            assert trial.labels["distance"] == 0
        elif depth == 0:
            assert place == 0
        else:
            assert text[place - 1] == "."
            # No later end of a sentence would do; the text is up to 20 tokens longer than it has
            # to be, for a longer changed needle.
            assert "." not in (text[:place] + text[place + len(NEEDLE) :])[place : wanted - 20]
            assert wanted - 100 <= place <= wanted


def test_several_needles_follow_in_even_steps(make_tools: MakeTools, novel: str) -> None:
    options = NiahOptions(depths=3, needles=4)
    settings = {"lengths": [16384], "haystack": [novel], "niah": options}
    task = make_task("niah", make_tools(settings))
    for index in range(6):
        trial = task.trial(16384, index)
        context, _ = texts(trial, ByteTokenizer())
        context = context[context.index("<context>\n") + 10 :]
        needles = list(re.finditer(r"\nThe best thing to do in .*\.\n", context))
        assert len(needles) == 4 or trial.labels["depth"] == 1
        start = trial.labels["depth"]
        if start == 1:
            assert re.search(r"(\nThe best thing to do in [^.]*\.\n){4}$", context)
            continue
        for number, needle in enumerate(needles):
            wanted = (start + number * (1 - start) / 4) * len(context)
            assert wanted - 550 <= needle.start() <= wanted
            assert needle.start() == 0 or context[needle.start() - 1] == "."
        cities = [re.search("in (.*?) is", needle[0])[1] for needle in needles]
        asked = [texts(trial, ByteTokenizer(), number)[1] for number in range(4)]
        assert all(f"do in {city}?" in text for city, text in zip(cities, asked, strict=True))
        assert trial.excerpt.count("The best thing to do in") == 4


def test_needles_close_together_stay_whole(make_tools: MakeTools, tmp_path) -> None:
    """Without any full stop all needles move to the start, one behind the other."""
    (tmp_path / "text").write_text("no end of this " * 2000)
    options = NiahOptions(depths=3, needles=3)
    settings = {"lengths": [4096], "haystack": [str(tmp_path / "text")], "niah": options}
    trial = make_task("niah", make_tools(settings)).trial(4096, 1)
    context, _ = texts(trial, ByteTokenizer())
    assert re.search(r"<context>\n(\nThe best thing to do in [^.]*\.\n){3}", context)
    assert trial.labels["positions"] == [0, 0, 0]


@pytest.mark.parametrize("needles", [1, 3])
def test_variants(make_tools: MakeTools, novel: str, needles: int) -> None:
    options = NiahOptions(needles=needles)
    settings = {"lengths": [4096], "haystack": [novel], "niah": options}
    task = make_task("niah", make_tools(settings))
    tokenizer = ByteTokenizer()
    changes = set()
    for index in range(10):
        plain, changed, absent = (
            task.trial(4096, index, variant) for variant in ("plain", "changed", "absent")
        )
        text, other, nothing = (texts(trial, tokenizer)[0] for trial in (plain, changed, absent))
        sentence = re.compile(r"\nThe best thing to do in [^.]*\.\n")
        assert sentence.sub("", text) == sentence.sub("", other)
        assert nothing.startswith(sentence.sub("", text))
        assert len(sentence.findall(other)) == needles
        assert max(sizes_of(plain) + sizes_of(changed)) <= 4096
        assert max(sizes_of(absent)) == 4096
        assert "best thing" not in nothing + absent.excerpt
        for number in range(needles):
            before, after, gone = (trial.questions[number] for trial in (plain, changed, absent))
            assert np.array_equal(before.token_ids, after.token_ids)
            assert not set(before.references) & set(after.references)
            assert gone.references == before.references
            question = texts(plain, tokenizer, number)[1]
            assert task.score(before, oracle(text, question)) == 1
            assert task.score(after, oracle(text, question)) == 0
            assert task.score(after, oracle(other, question)) == 1
            assert task.score(gone, oracle(nothing, question)) == 0
            changes.add(after.references)
    assert len(changes) == 10 * needles


def test_values_cannot_be_guessed() -> None:
    assert min(map(len, (CITIES, ACTIONS, PLACES))) >= 20
    for parts in (CITIES, ACTIONS, PLACES, WEATHERS):
        assert len(set(parts)) == len(parts)
        # No part is told by another one.
        assert not any(one in other for one in parts for other in parts if one != other)
    plain, changed = draw_facts(20, np.random.default_rng(0))
    for facts in (plain, changed):
        for part in ("city", "action", "place"):
            assert len({getattr(fact, part) for fact in facts}) == 20
    assert [fact.city for fact in plain] == [fact.city for fact in changed]
    other, _ = draw_facts(20, np.random.default_rng(1))
    assert len({fact.phrases for fact in plain} & {fact.phrases for fact in other}) == 0


def test_prompts_are_regenerated(make_tools: MakeTools, novel: str) -> None:
    prompts = set()
    for seed in (0, 1):
        settings = {"lengths": [1024], "seed": seed, "haystack": [novel]}
        first, second = (make_task("niah", make_tools(settings)) for _ in range(2))
        backwards = [second.trial(1024, index).fingerprint() for index in reversed(range(4))]
        assert [first.trial(1024, index).fingerprint() for index in range(4)] == backwards[::-1]
        prompts |= set(backwards)
    assert len(prompts) == 8


def test_a_million_tokens_are_made_at_once_and_read_in_pieces(
    make_tools: MakeTools, novel: str
) -> None:
    options = NiahOptions(needles=5)
    settings = {"lengths": ["1M", "4M"], "haystack": [novel], "niah": options}
    task = make_task("niah", make_tools(settings))
    assert len(task.tools.haystack) < 1 << 20
    for length in (1 << 20, 1 << 22):
        start = time.process_time()
        trial = task.trial(length, 2)
        assert time.process_time() - start < 0.5
        assert length - 100 <= max(sizes_of(trial)) <= length
        held = [len(one) for one in trial.context.pieces if not isinstance(one, HaystackPiece)]
        assert sum(held) < 2000
        place = trial.labels["positions"][0]
        around = trial.context.read(place, place + 500).tolist()
        assert "\nThe best thing to do in " in ByteTokenizer().decode(around)


def test_tokens_that_end_a_sentence(sentencepiece_tokenizer: PreTrainedTokenizerBase) -> None:
    assert np.flatnonzero(sentence_enders(ByteTokenizer())).tolist() == [ord(".")]
    ids = sentencepiece_tokenizer("The end. Not yet").input_ids
    found = sentence_enders(sentencepiece_tokenizer)[ids]
    before = sentencepiece_tokenizer.decode(ids[: int(np.flatnonzero(found)[0]) + 1])
    assert before.endswith("The end.")
    assert found.sum() == 1


def test_no_space_starts_a_needle(
    make_tools: MakeTools, sentencepiece_tokenizer: PreTrainedTokenizerBase, novel: str
) -> None:
    settings = {"lengths": [1024], "haystack": [novel]}
    trial = make_task("niah", make_tools(settings, sentencepiece_tokenizer)).trial(1024, 2)
    context, _ = texts(trial, sentencepiece_tokenizer)
    assert re.search(r"weather\. ?The best thing", " ".join(context.split()))
    assert "  The best" not in context


def test_bad_input(make_tools: MakeTools, novel: str) -> None:
    options = NiahOptions
    with pytest.raises(UserError, match="niah.needles: 25 are too many; at most 24"):
        make_task("niah", make_tools({"niah": options(needles=25)}))
    with pytest.raises(UserError, match="lengths: 400 tokens are too short") as error:
        make_task("niah", make_tools({"lengths": [400, 2048]}))
    least = int(re.search(r"use at least (\d+)", str(error.value))[1])
    task = make_task("niah", make_tools({"lengths": [least], "haystack": [novel]}))
    for index in range(10):
        assert max(sizes_of(task.trial(least, index))) <= least
    with pytest.raises(UserError, match="too short"):
        task.trial(400, 0)


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        ("abcdefghijklmnopqrstuvwxyz ", "has no token that ends with a full stop"),
        ("abcdefghijklmnopqrsuvwxyz .", "cannot write 'eat a sandwich'"),
    ],
)
def test_a_tokenizer_that_cannot_write_the_needle(
    make_tools: MakeTools, characters: str, message: str
) -> None:
    model = models.BPE({"?": 0, **{one: 1 + i for i, one in enumerate(characters)}}, [])
    model.unk_token = "?"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="?")
    with pytest.raises(UserError, match=message):
        make_task("niah", make_tools({"lengths": [4096]}, tokenizer))
