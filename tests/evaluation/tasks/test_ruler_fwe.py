"""RULER's frequent words: the official prompt, and frequencies of a zeta distribution."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.prompts import Trial
from memlm.evaluation.tasks import make_task
from memlm.evaluation.tasks.base import Tools
from memlm.evaluation.tasks.ruler_fwe import FrequentWords, coded_words, frequencies

START = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. "
)
END = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text? Answer: According to the coded text "
    "above, the three most frequently appeared words are:"
)


def make(make_tools: Callable[..., Tools], *lengths: int, **kwargs) -> FrequentWords:
    task = make_task("fwe", make_tools({"lengths": list(lengths), "trials": 4}, **kwargs))
    assert isinstance(task, FrequentWords)
    return task


def text(task: FrequentWords, trial: Trial) -> str:
    ids = trial.context.read(0, len(trial.context)).tolist()
    return task.tools.tokenizer.decode(ids + trial.questions[0].token_ids.tolist())


def tokens(trial: Trial) -> int:
    return len(trial.context) + len(trial.questions[0].token_ids) + trial.questions[0].new_tokens


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_prompts(
    kind: str,
    make_tools: Callable[..., Tools],
    sentencepiece_tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else sentencepiece_tokenizer
    line_end = "\n" if kind == "bytes" else " "
    task = make(make_tools, 1024, 4096, 16384, tokenizer=tokenizer)
    for length, indices in ((1024, 4), (4096, 3), (16384, 2)):
        for index in range(indices):
            trial = task.trial(length, index)
            assert 0.98 * length < tokens(trial) <= length
            question = trial.questions[0]
            assert question.new_tokens == 50
            prompt = text(task, trial)
            end = END.replace("\n", line_end)
            assert prompt.startswith(START)
            assert prompt.endswith(end)
            words = prompt.removeprefix(START).removesuffix(end).split(" ")
            counts = Counter(words)
            assert all(re.fullmatch(r"[a-z]{6}|\.\.\.", word) for word in counts)
            assert len(words) == trial.labels["words"]
            assert len(counts) <= trial.labels["vocabulary"] == (length - 50) // 50
            ranked = counts.most_common(5)
            assert ranked[0][0] == "..."
            assert len({count for _, count in ranked}) == 5
            # Rank k has 1 / k^2 of what the first has.
            for rank, (_, count) in enumerate(ranked, start=1):
                assert count == pytest.approx(ranked[0][1] / rank**2, abs=1)
            oracle = [word for word, _ in ranked[1:4]]
            assert list(question.references) == oracle
            assert task.score(question, ", ".join(oracle).upper()) == 1
            assert task.score(question, f"{oracle[1]} {ranked[4][0]}") == pytest.approx(1 / 3)
            assert task.score(question, f"... {ranked[4][0]}") == 0


def test_frequencies_and_words() -> None:
    expected = [int(1000 / rank**2 / 1.6449340668) for rank in range(1, 31)]
    assert frequencies(1000, 30).tolist() == expected
    assert expected[-1] == 0
    words = coded_words(5000, np.random.default_rng(0))
    assert len(set(words)) == 5000
    assert {len(word) for word in words} == {6}
    assert len(set("".join(words))) == 26


def test_same_words_every_time(make_tools: Callable[..., Tools]) -> None:
    first, again = make(make_tools, 2048, 4096), make(make_tools, 2048)
    again.trial(2048, 3)
    assert first.trial(2048, 1).fingerprint() == again.trial(2048, 1).fingerprint()
    places = [(length, index) for length in (2048, 4096) for index in (0, 1)]
    assert len({first.trial(*place).fingerprint() for place in places}) == 4
    assert len({first.trial(*place).questions[0].references for place in places}) == 4


def test_a_length_that_is_too_short(make_tools: Callable[..., Tools]) -> None:
    with pytest.raises(UserError, match="fwe: lengths: 512 tokens are too short") as caught:
        make(make_tools, 512, 4096)
    least = int(re.findall(r"at least (\d+)$", str(caught.value))[0])
    make(make_tools, least)
    with pytest.raises(UserError):
        make(make_tools, least - 1)
