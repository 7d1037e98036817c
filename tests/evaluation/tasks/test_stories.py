"""The prompts of `stories_1` to `stories_3`, alone and in a haystack."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from memlm.data import ByteTokenizer
from memlm.data.stories.tokens import StoryTokens
from memlm.errors import UserError
from memlm.evaluation.config import StoriesOptions
from memlm.evaluation.prompts import Trial
from memlm.evaluation.tasks import expand_tasks, make_task
from memlm.evaluation.tasks.base import ABSENT, Record, Tools
from memlm.evaluation.tasks.stories import Stories

NAMES = ("stories_1", "stories_2", "stories_3")


def make(name: str, make_tools: Callable[..., Tools], **config) -> Stories:
    tokenizer = config.pop("tokenizer", None)
    task = make_task(name, make_tools({"trials": 4} | config, tokenizer))
    assert isinstance(task, Stories)
    return task


def context_of(task: Stories, trial: Trial, stop: int | None = None) -> str:
    ids = trial.context.read(0, len(trial.context) if stop is None else stop)
    return task.tools.tokenizer.decode(ids.tolist())


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_stories_alone(
    kind: str,
    name: str,
    make_tools: Callable[..., Tools],
    sentencepiece_tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else sentencepiece_tokenizer
    options = StoriesOptions(sentences=[6, 12])
    task = make(name, make_tools, stories=options, tokenizer=tokenizer)
    assert [setting.label for setting in task.settings()] == ["6", "12"]
    for setting in task.settings():
        most = 0
        for index in range(4):
            trial = task.trial(int(setting.label), index)
            story = task.story(int(setting.label), index)
            (question,) = trial.questions
            assert words(context_of(task, trial)) == " ".join(story.facts)
            asked = tokenizer.decode(question.token_ids.tolist())
            assert words(asked) == f"Question: {story.question} Answer:"
            assert question.references == (story.answer,)
            assert len(story.supporting) == task.hops == int(name[-1])
            assert trial.labels["facts"] == len(story.facts) == int(setting.label)
            told = [story.facts[place] for place in trial.labels["supporting"]]
            assert trial.labels["supporting_facts"] == told
            # As many tokens back ends the last supporting fact.
            end = len(trial.context) - trial.labels["distance"]
            assert words(context_of(task, trial, end)).endswith(told[-1])
            assert all(fact in words(trial.excerpt) for fact in told)
            most = max(most, len(trial.context) + len(question.token_ids) + question.new_tokens)
            # The training rows hold the same ids.
            ids, answer = StoryTokens(tokenizer).whole(story)
            prompt = np.concatenate([trial.context.read(0, len(trial.context)), question.token_ids])
            assert ids[:-answer].tolist() == prompt.tolist()
            assert answer <= question.new_tokens
        assert setting.tokens == most


def test_scores(make_tools: Callable[..., Tools]) -> None:
    task = make("stories_3", make_tools, stories=StoriesOptions([12]))
    question = task.trial(12, 0).questions[0]
    (answer,) = question.references
    (after,) = re.findall(r"before the (\w+)\?", task.story(12, 0).question)
    others = sorted({"kitchen", "office", "garden"} - {answer, after})
    assert task.score(question, f" {answer}.") == 1
    assert task.score(question, f" the {answer.upper()}, before the {after}. In the garden") == 1
    assert task.score(question, f" {others[0]}.") == 0
    assert task.score(question, f" {answer} or {others[0]}.") == 0
    assert task.score(question, "") == 0


def test_the_most_frequent_answer_of_the_trials(make_tools: Callable[..., Tools]) -> None:
    task = make("stories_1", make_tools, stories=StoriesOptions([6]))
    told = ["kitchen", "office", "kitchen", "garden", "kitchen"]
    records = [
        Record("6", trial, condition, 0.0, answers=[{"references": [place]}])
        for condition in ("on", "off", "absent")
        for trial, place in enumerate(told)
        if condition != "off" or trial < 3  # however often a trial is asked
    ]
    assert task.details(records) == {"constant_answer": 3 / 5}


@pytest.mark.parametrize("name", NAMES)
def test_absent_prompts_lack_the_supporting_facts_alone(
    name: str, make_tools: Callable[..., Tools]
) -> None:
    task = make(name, make_tools, stories=StoriesOptions([10]))
    for index in range(4):
        plain, absent = task.trial(10, index), task.trial(10, index, ABSENT)
        facts = [f"{fact}." for fact in context_of(task, plain).removesuffix(".").split(". ")]
        for place in reversed(plain.labels["supporting"]):
            facts.pop(place)
        assert context_of(task, absent) == " ".join(facts)
        assert absent.questions[0].references == plain.questions[0].references
        assert absent.labels["facts"] == 10 - task.hops


@pytest.mark.parametrize("name", NAMES)
def test_stories_in_a_haystack(name: str, make_tools: Callable[..., Tools], tmp_path) -> None:
    text = "".join(f"Nothing of note is written in line {number}. " for number in range(2000))
    (tmp_path / "hay.txt").write_text(text)
    options = StoriesOptions(sentences=[5, 9], haystack=True)
    config = {"lengths": [1500, 6000], "haystack": [str(tmp_path / "hay.txt")]}
    task = make(name, make_tools, stories=options, **config)
    assert [setting.tokens for setting in task.settings()] == [1500, 6000]
    for length in (1500, 6000):
        for index in range(4):
            trial, story = task.trial(length, index), task.story(length, index)
            (question,) = trial.questions
            tokens = len(trial.context) + len(question.token_ids) + question.new_tokens
            assert tokens == length
            assert len(story.facts) == (5, 9)[index % 2]
            whole = context_of(task, trial)
            places = [re.escape(fact) for fact in story.facts]
            assert re.search(".*".join(places), whole, re.DOTALL)
            rest = re.sub("|".join(places), "", whole)
            assert "Nothing of note" in rest and not re.search("John|Mary|Daniel|Sandra", rest)
            end = len(trial.context) - trial.labels["distance"]
            last = story.facts[story.supporting[-1]]
            assert context_of(task, trial, end).endswith(last)
            depth = (end - len(last)) / len(trial.context)
            assert trial.labels["depth"] == pytest.approx(depth, abs=0.051)
            absent = context_of(task, task.trial(length, index, ABSENT))
            assert len(absent) == len(whole)
            told = [story.facts[place] for place in story.supporting]
            for fact in set(story.facts):
                assert absent.count(fact) == story.facts.count(fact) - told.count(fact)
    assert task.story(1500, 1) == task.story(6000, 1)


def test_refusals(make_tools: Callable[..., Tools]) -> None:
    assert expand_tasks(["stories"]) == list(NAMES)
    with pytest.raises(UserError, match="use at least (\\d+)") as caught:
        make("stories_2", make_tools, lengths=[128], stories=StoriesOptions([8], haystack=True))
    least = int(re.findall(r"use at least (\d+)", str(caught.value))[0])
    options = StoriesOptions([8], haystack=True)
    task = make("stories_2", make_tools, lengths=[least], stories=options)
    alone = [" ".join(task.story(least, index).facts) for index in range(4)]
    found = [context_of(task, task.trial(least, index)) for index in range(4)]
    # The longest story fills the length with its facts alone.
    assert sum(one == other for one, other in zip(alone, found, strict=True)) == 1
    with pytest.raises(UserError, match="stories_3: stories.sentences: 300 .* most is 256"):
        make("stories_3", make_tools, stories=StoriesOptions([8, 300]))
    assert make("stories_2", make_tools, stories=StoriesOptions([8, 300])).settings()
    with pytest.raises(UserError, match="3 is too small; the least is 4"):
        StoriesOptions(sentences=[3]).validate()
    with pytest.raises(UserError, match="empty"):
        StoriesOptions(sentences=[]).validate()
