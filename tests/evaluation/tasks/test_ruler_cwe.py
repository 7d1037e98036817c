"""RULER's common words: the prompt is the official one, and the references are the most common."""

import re
from collections import Counter
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.prompts import Trial
from memlm.evaluation.tasks import make_task
from memlm.evaluation.tasks.base import Tools
from memlm.evaluation.tasks.ruler_cwe import CommonWords
from memlm.evaluation.tasks.words import all_words

START = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
END = (
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words "
    "that appear most often in the list are:"
)


def make(make_tools: Callable[..., Tools], *lengths: int, **kwargs) -> CommonWords:
    task = make_task("cwe", make_tools({"lengths": list(lengths), "trials": 4}, **kwargs))
    assert isinstance(task, CommonWords)
    return task


def text(task: CommonWords, trial: Trial) -> str:
    ids = trial.context.read(0, len(trial.context)).tolist()
    return task.tools.tokenizer.decode(ids + trial.questions[0].token_ids.tolist())


def tokens(trial: Trial) -> int:
    return len(trial.context) + len(trial.questions[0].token_ids) + trial.questions[0].new_tokens


def entries(numbered: str) -> list[str]:
    words = re.split(r" ?\d+\. ", numbered)[1:]
    assert numbered == " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))
    return words


def lists(prompt: str, line_end: str = "\n") -> tuple[list[str], list[str], list[str]]:
    """The words of the list, of the example's and of its answer; all other text is compared."""
    start, end = START.replace("\n", line_end), END.replace("\n", line_end)
    assert prompt.startswith(start)
    assert prompt.endswith(end)
    *example, asked = prompt.removesuffix(end).split(start)[1:]
    if not example:
        return entries(asked), [], []
    shown, answer = example[0].split(end)
    assert answer.startswith(" 1. ")
    assert answer.endswith(line_end)
    return entries(asked), entries(shown), entries(answer[1:].removesuffix(line_end))


def check(words: list[str], common: list[str], kind: tuple[int, int], size: int) -> None:
    """Ten words stand as often as each other and more often than all the others."""
    found = Counter(words)
    assert len(found) == size
    assert len(set(common)) == 10
    assert {found.pop(word) for word in common} == {kind[0]}
    assert set(found.values()) == {kind[1]}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bytes", {1024: (3, 1, None), 2560: (6, 1, (20, 3, 1)), 16384: (30, 3, (40, 10, 3))}),
        ("sentencepiece", {1024: (3, 1, None), 3072: (6, 1, (20, 3, 1))}),
        ("sentencepiece", {16384: (30, 3, (40, 10, 3))}),
    ],
)
def test_prompts(
    kind: str,
    settings: dict[int, tuple],
    make_tools: Callable[..., Tools],
    sentencepiece_tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else sentencepiece_tokenizer
    task = make(make_tools, *settings, tokenizer=tokenizer)
    for length, (common, rare, example) in settings.items():
        for index in range(1 if length > 10_000 else 3):
            trial = task.trial(length, index)
            assert 0.98 * length < tokens(trial) <= length
            question = trial.questions[0]
            references = list(question.references)
            prompt = text(task, trial)
            asked, shown, answer = lists(prompt, "\n" if kind == "bytes" else " ")
            check(asked, references, (common, rare), trial.labels["words"])
            if example:
                check(shown, answer, example[1:], example[0])
            assert bool(shown) is trial.labels["example"] is (example is not None)
            assert set(asked + shown) <= set(all_words())
            oracle = [word for word, _ in Counter(asked).most_common(10)]
            assert task.score(question, "\n".join(oracle).upper()) == 1
            assert 0.3 <= task.score(question, " ".join(oracle[:3])) < 0.6
            assert task.score(question, "1. 2. 3.") == 0


def test_the_answer_as_in_the_example_fits_the_new_tokens(
    make_tools: Callable[..., Tools],
) -> None:
    task = make(make_tools, 1024)
    budgets = set()
    for index in range(32):
        question = task.trial(1024, index).questions[0]
        named = [f" {place}. {word}" for place, word in enumerate(question.references, 1)]
        answer = "".join(named)[: question.new_tokens]
        assert task.score(question, answer) == 1
        budgets.add(question.new_tokens)
    assert min(budgets) == 120
    assert max(budgets) > 120


def test_same_words_every_time(make_tools: Callable[..., Tools]) -> None:
    first, again = make(make_tools, 2048, 4096), make(make_tools, 2048)
    again.trial(2048, 3)
    assert first.trial(2048, 1).fingerprint() == again.trial(2048, 1).fingerprint()
    prints = {
        first.trial(length, index).fingerprint() for length in (2048, 4096) for index in (0, 1)
    }
    assert len(prints) == 4
    other = make_task("cwe", make_tools({"lengths": [2048], "seed": 1}))
    assert other.trial(2048, 1).fingerprint() != first.trial(2048, 1).fingerprint()


def test_more_words_than_there_are(make_tools: Callable[..., Tools]) -> None:
    task = make(make_tools, 1 << 19)
    trial = task.trial(1 << 19, 0)
    assert tokens(trial) > 0.98 * (1 << 19)
    asked, _, _ = lists(text(task, trial))
    check(asked, list(trial.questions[0].references), (30, 3), trial.labels["words"])
    assert trial.labels["words"] > len(all_words())
    assert set(trial.questions[0].references) <= set(all_words())


def test_a_length_that_is_too_short(make_tools: Callable[..., Tools]) -> None:
    with pytest.raises(UserError, match="cwe: lengths: 512 tokens are too short") as caught:
        make(make_tools, 512, 4096)
    least = int(re.findall(r"at least (\d+)$", str(caught.value))[0])
    assert 700 < least < 1024
    task = make(make_tools, least)
    assert all(tokens(task.trial(least, index)) <= least for index in range(20))
