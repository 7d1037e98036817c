"""RULER's variable tracking."""

import re
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.prompts import Trial
from memlm.evaluation.tasks import make_task
from memlm.evaluation.tasks.base import ABSENT, CHANGED, PLAIN, Tools
from memlm.evaluation.tasks.ruler import NOISE
from memlm.evaluation.tasks.ruler_vt import VariableTracking

START = "Memorize and track the chain(s) of variable assignment hidden in the following text."
LINE = re.compile(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d+)")


def make(make_tools: Callable[..., Tools], *lengths: int, **kwargs) -> VariableTracking:
    task = make_task("vt", make_tools({"lengths": list(lengths), "trials": 4}, **kwargs))
    assert isinstance(task, VariableTracking)
    return task


def text(task: VariableTracking, trial: Trial) -> str:
    ids = trial.context.read(0, len(trial.context)).tolist()
    return task.tools.tokenizer.decode(ids + trial.questions[0].token_ids.tolist())


def tokens(trial: Trial) -> int:
    return len(trial.context) + len(trial.questions[0].token_ids) + trial.questions[0].new_tokens


def answer(prompt: str) -> str:
    """Follows the assignments from the number that the prompt ends with."""
    value = re.findall(r"are assigned the value (\d+), they are:", prompt)[-1]
    known = {value}
    found = []
    for name, source in LINE.findall(prompt):
        if source in known:
            known.add(name)
            found.append(name)
    return " ".join(found)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_prompts(
    kind: str,
    make_tools: Callable[..., Tools],
    sentencepiece_tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else sentencepiece_tokenizer
    task = make(make_tools, 1024, 4096, 16384, tokenizer=tokenizer)
    for length, indices in ((1024, 3), (4096, 2), (16384, 1)):
        for index in range(indices):
            trial = task.trial(length, index)
            assert length - len(NOISE) - 10 < tokens(trial) <= length
            assert trial.questions[0].new_tokens == 30
            prompt = text(task, trial)
            assert prompt.count(START) == 2
            example, asked = prompt.split(START)[1:]
            for part, letters in ((example, 3), (asked, 5)):
                lines = LINE.findall(part)
                assert len(lines) == 5
                assert all(len(name) == letters for name, _ in lines)
                assert [source for _, source in lines[1:]] == [name for name, _ in lines[:-1]]
                assert 10000 <= int(lines[0][1]) < 99999
            references = trial.questions[0].references
            assert references == tuple(name for name, _ in LINE.findall(asked))
            assert task.score(trial.questions[0], answer(prompt)) == 1
            assert task.score(trial.questions[0], answer(example)) == 0
            assert task.score(trial.questions[0], " ".join(references[:2]).lower()) == 0.4
            assert references[0] in trial.excerpt


def test_the_text_of_a_whole_prompt(make_tools: Callable[..., Tools]) -> None:
    task = make(make_tools, 1536)
    trial = task.trial(1536, 0)
    prompt = text(task, trial)
    numbers = re.findall(r"VAR [A-Z]+ = (\d+)", prompt)
    names = [name for name, _ in LINE.findall(prompt)][:5]
    question, prefix = (
        "\nQuestion: Find all variables that are assigned the value {0} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
        "are assigned the value {0}, they are: ",
    )
    for number in numbers:
        assert (question + prefix).format(number) in prompt
    # The answer of the example, an empty line, and the task itself.
    assert f"they are:  {' '.join(names)}\n\n{START}\n\n" in prompt
    assert prompt.endswith(prefix.format(numbers[1]))
    body = prompt.split(START)[2].split("\n\n")[1].split("\nQuestion")[0].split("\n")
    assert {LINE.sub("", line) for line in body} <= {"", " ", NOISE}
    # As published: a line that takes its value from a variable ends with a space.
    assert all(line.endswith(" ") for line in body if "= VAR" in line)
    assert len(set(numbers)) == 2
    assert tuple(re.findall(r"VAR (\w{5}) =", prompt)) == trial.questions[0].references


def test_the_example_is_as_long_as_it_may_be(
    make_tools: Callable[..., Tools], sentencepiece_tokenizer: PreTrainedTokenizerBase
) -> None:
    # 500 bytes hold one line of noise; of the SentencePiece tokens there is room for the
    # published least of 5.
    assert make(make_tools, 1024).example_noise == 1
    task = make(make_tools, 4096, tokenizer=sentencepiece_tokenizer)
    assert task.example_noise >= 5
    example = text(task, task.trial(4096, 0)).split(START)[1]
    asked, _ = example.split(" they are:")
    assert example.count("The grass is green.") == task.example_noise
    count = len(sentencepiece_tokenizer(START + asked + " they are:")["input_ids"])
    assert 500 - 60 < count <= 510


def test_variants(make_tools: Callable[..., Tools]) -> None:
    task = make(make_tools, 1024, 4096)
    for length, index in ((1024, 0), (4096, 2)):
        plain, changed, absent = (
            task.trial(length, index, variant) for variant in (PLAIN, CHANGED, ABSENT)
        )
        old, new = plain.questions[0].references, changed.questions[0].references
        assert not set(old) & set(new)
        assert absent.questions[0].references == old
        before = text(task, plain)
        for one, other in zip(old, new, strict=True):
            before = before.replace(one, other)
        assert before == text(task, changed)
        assert task.score(changed.questions[0], answer(text(task, changed))) == 1
        assert task.score(plain.questions[0], answer(text(task, changed))) == 0
        assert task.score(absent.questions[0], answer(text(task, absent))) == 0
        assert not any(name in text(task, absent) for name in old)
        assert len(LINE.findall(text(task, absent))) == 5
        assert all(tokens(one) <= length for one in (changed, absent))


def test_a_prompt_is_a_function_of_seed_and_index(make_tools: Callable[..., Tools]) -> None:
    first, again = (make(make_tools, 1024, 2048) for _ in range(2))
    places = [(length, index) for length in (1024, 2048) for index in (0, 1)]
    prints = [first.trial(*place).fingerprint() for place in places]
    assert [again.trial(*place).fingerprint() for place in places[::-1]] == prints[::-1]
    assert len(set(prints)) == 4
    seeded = make_task("vt", make_tools({"lengths": [1024], "seed": 1}))
    assert seeded.trial(1024, 0).fingerprint() != prints[0]


def test_a_length_that_is_too_short_is_told(make_tools: Callable[..., Tools]) -> None:
    with pytest.raises(UserError, match="vt: lengths: 256 tokens .* at least") as error:
        make(make_tools, 256)
    least = int(str(error.value).split()[-1])
    task = make(make_tools, least)
    for variant in (PLAIN, CHANGED, ABSENT):
        assert all(tokens(task.trial(least, index, variant)) <= least for index in range(4))


class FourTokensPerCharacter:
    """Not even the smallest example fits 500 tokens."""

    bos_token_id = None

    def __call__(self, text: str, **kwargs) -> dict:
        return {"input_ids": [4 * ord(one) + part for one in text for part in range(4)]}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token // 4) for token in ids[::4])


def test_a_wasteful_tokenizer_finishes(make_tools: Callable[..., Tools]) -> None:
    task = make(make_tools, 8192, tokenizer=FourTokensPerCharacter())
    assert task.example_noise == 0
    assert 8192 - 4 * 100 < tokens(task.trial(8192, 0)) <= 8192
    with pytest.raises(UserError, match="too short"):
        make(make_tools, 1024, tokenizer=FourTokensPerCharacter())
