"""RULER's needle tasks: the published prompts, at every length, for every tokenizer."""

import json
import re
import uuid
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.prompts import Trial
from memlm.evaluation.tasks import make_task, ruler_niah
from memlm.evaluation.tasks.base import ABSENT, CHANGED, PLAIN, Tools
from memlm.evaluation.tasks.ruler import NOISE
from memlm.evaluation.tasks.ruler_niah import DEPTHS, SETUPS, Essay, RulerNiah, niah_template

# haystack, type of keys, type of values, keys, values per key, keys asked for
PUBLISHED = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}
SENTENCE = re.compile(r"One of the special magic (numbers|uuids) for (.+?) is: (\S+?)\.(?=\s|$)")
QUESTION = re.compile(r"special magic (?:number|uuid)s? for (.+) mentioned .* for \1 mentioned")
UNITS = {"noise": len(NOISE) + 1, "essay": 80, "needle": 120}


def make(name: str, make_tools: Callable[..., Tools], *lengths: int, **kwargs) -> RulerNiah:
    task = make_task(name, make_tools({"lengths": list(lengths), "trials": 4}, **kwargs))
    assert isinstance(task, RulerNiah)
    return task


def texts(task: RulerNiah, trial: Trial) -> tuple[str, str]:
    """Context and question."""
    context = trial.context.read(0, len(trial.context)).tolist()
    decode = task.tools.tokenizer.decode
    return decode(context), decode(trial.questions[0].token_ids.tolist())


def tokens(trial: Trial) -> int:
    return len(trial.context) + len(trial.questions[0].token_ids) + trial.questions[0].new_tokens


def answer(task: RulerNiah, trial: Trial) -> str:
    """What somebody says who read the prompt and knows what it asks for."""
    context, question = texts(task, trial)
    asked = re.split(r", and |, ", QUESTION.search(question)[1])
    return " and ".join(value for _, key, value in SENTENCE.findall(context) if key in asked)


def test_the_configurations_are_the_published_ones() -> None:
    found = {
        name: (
            setup.haystack,
            setup.keys,
            setup.values,
            setup.needle_keys,
            setup.values_per_key,
            setup.queries,
        )
        for name, setup in SETUPS.items()
    }
    assert found == PUBLISHED


def test_singular_and_plural() -> None:
    assert niah_template(single=True) == (
        "A special magic {type_needle_v} is hidden within the following text. Make sure to "
        "memorize it. I will quiz you about the {type_needle_v} afterwards.\n",
        "\nWhat is the special magic {type_needle_v} for {query} mentioned in the provided text? "
        "The special magic {type_needle_v} for {query} mentioned in the provided text is",
    )
    assert niah_template(single=False) == (
        "Some special magic {type_needle_v} are hidden within the following text. Make sure to "
        "memorize it. I will quiz you about the {type_needle_v} afterwards.\n",
        "\nWhat are all the special magic {type_needle_v} for {query} mentioned in the provided "
        "text? The special magic {type_needle_v} for {query} mentioned in the provided text are",
    )


def test_depths_are_the_published_ones() -> None:
    assert list(DEPTHS) == np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist()


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts(
    name: str,
    kind: str,
    make_tools: Callable[..., Tools],
    sentencepiece_tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else sentencepiece_tokenizer
    haystack, keys, values, key_count, per_key, queries = PUBLISHED[name]
    task = make(name, make_tools, 1024, 4096, 16384, tokenizer=tokenizer)
    for length, indices in ((1024, 3), (4096, 2), (16384, 1)):
        for index in range(indices):
            trial = task.trial(length, index)
            # One more unit of the haystack, and what the variants may need, would be too long.
            assert length - 2 * UNITS[haystack] - 60 < tokens(trial) <= length
            context, question = texts(task, trial)
            found = SENTENCE.findall(context)
            if haystack == "needle":
                assert len(found) >= 4
                assert len({key for _, key, _ in found}) == len(found)
            else:
                assert len(found) == key_count * per_key
                assert len({key for _, key, _ in found}) == key_count
            for noun, key, value in found:
                assert noun == values
                if values == "numbers":
                    assert re.fullmatch(r"[1-9]\d{6}", value)
                else:
                    assert uuid.UUID(value).version == 4
                assert (keys == "uuids") == bool(re.fullmatch(r"[0-9a-f-]{36}", key))
            if haystack == "noise":
                assert SENTENCE.sub("", context).count("The grass is green.") >= 1
                assert set(SENTENCE.sub(NOISE, context).split("\n")[1:]) <= {NOISE} or (
                    kind == "sentencepiece"
                )
            references = trial.questions[0].references
            assert len(references) == queries * per_key
            asked = QUESTION.search(question)[1]
            assert len(re.split(r", and |, ", asked)) == queries
            assert task.score(trial.questions[0], answer(task, trial)) == 1
            assert task.score(trial.questions[0], "7 and no-word") == 0
            assert trial.questions[0].new_tokens == 128
            if haystack == "essay":
                assert {round(100 * place) for place in trial.labels["places"]} <= set(DEPTHS)
            assert 0 <= trial.labels["depth"] <= 1
            assert len(trial.labels["places"]) == len(references)
            assert any(reference in trial.excerpt for reference in references)
            assert len(trial.excerpt) <= 240 + 140


def test_the_text_of_a_whole_prompt(make_tools: Callable[..., Tools]) -> None:
    task = make("niah_single_1", make_tools, 620)
    trial = task.trial(620, 0)
    context, question = texts(task, trial)
    key, value = trial.labels["keys"][0], trial.questions[0].references[0]
    before = (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    needle = f"One of the special magic numbers for {key} is: {value}."
    assert context == f"{before}\n{needle}\n{NOISE}"
    assert question == (
        f"\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )


def test_several_keys_are_listed_as_published(make_tools: Callable[..., Tools]) -> None:
    task = make("niah_multiquery", make_tools, 2048)
    trial = task.trial(2048, 0)
    first, second, third, fourth = trial.labels["keys"]
    question = texts(task, trial)[1]
    assert question.count(f" for {first}, {second}, {third}, and {fourth} mentioned") == 2
    context = texts(task, trial)[0]
    by_key = {key: value for _, key, value in SENTENCE.findall(context)}
    assert trial.questions[0].references == tuple(by_key[key] for key in trial.labels["keys"])


@pytest.mark.parametrize("name", ["niah_multivalue", "niah_multiquery"])
def test_a_part_of_the_values_gets_a_part_of_the_score(
    name: str, make_tools: Callable[..., Tools]
) -> None:
    task = make(name, make_tools, 1024)
    assert task.kind == "shares"
    question = task.trial(1024, 0).questions[0]
    assert task.score(question, " " + " ".join(question.references[1:])) == 0.75
    assert make("niah_multikey_1", make_tools, 1024).kind == "hits"


@pytest.mark.parametrize("name", PUBLISHED)
def test_variants(name: str, make_tools: Callable[..., Tools]) -> None:
    task = make(name, make_tools, 1024, 2048)
    for length, index in ((1024, 0), (2048, 3)):
        plain, changed, absent = (
            task.trial(length, index, variant) for variant in (PLAIN, CHANGED, ABSENT)
        )
        old, new = plain.questions[0].references, changed.questions[0].references
        assert not set(old) & set(new)
        assert absent.questions[0].references == old
        before, after = texts(task, plain)[0], texts(task, changed)[0]
        for one, other in zip(old, new, strict=True):
            before = before.replace(one, other)
        # Nothing differs but the values.
        assert before == after
        assert task.score(changed.questions[0], answer(task, changed)) == 1
        assert task.score(plain.questions[0], answer(task, changed)) == 0
        assert task.score(absent.questions[0], answer(task, absent)) == 0
        assert not any(value in texts(task, absent)[0] for value in old)
        for other in (changed, absent):
            assert (other.questions[0].token_ids == plain.questions[0].token_ids).all()
            assert other.labels == plain.labels
            assert length - 250 < tokens(other) <= length
        hidden, left = (SENTENCE.findall(texts(task, one)[0]) for one in (plain, absent))
        if SETUPS[name].haystack == "needle":
            # Another needle stands in the place.
            assert len(left) == len(hidden)
        else:
            assert len(left) == len(hidden) - len(old)


@pytest.mark.parametrize("name", ["niah_single_2", "niah_multikey_2"])
def test_a_prompt_is_a_function_of_seed_and_index(
    name: str, make_tools: Callable[..., Tools]
) -> None:
    first, again = (make(name, make_tools, 1024, 2048, *more) for more in ((), (40_000,)))
    # In another order and with another length, so that nothing hangs on what else is asked.
    places = [(length, index) for length in (1024, 2048) for index in (0, 1)]
    prints = [first.trial(*place).fingerprint() for place in places]
    absent = [first.trial(*place, ABSENT).fingerprint() for place in places]
    assert [again.trial(*place, ABSENT).fingerprint() for place in places[::-1]] == absent[::-1]
    assert [again.trial(*place).fingerprint() for place in places[::-1]] == prints[::-1]
    assert len(set(prints)) == 4
    seeded = make_task(name, make_tools({"lengths": [1024], "seed": 1}))
    assert seeded.trial(1024, 0).fingerprint() != prints[0]


def test_all_depths_are_used(make_tools: Callable[..., Tools]) -> None:
    task = make("niah_multivalue", make_tools, 1024)
    places = {place for index in range(80) for place in task.trial(1024, index).labels["places"]}
    assert {round(100 * place) for place in places} == set(DEPTHS)


def test_other_needles_have_other_keys_and_values(
    make_tools: Callable[..., Tools], monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_few(kind: str, rng: np.random.Generator) -> str:
        return f"key-{rng.integers(8)}" if kind == "words" else str(rng.integers(1000000, 1000008))

    monkeypatch.setattr(ruler_niah, "_random_item", from_few)
    task = make("niah_multikey_2", make_tools, 4096)
    for index in range(4):
        plain, absent = task.trial(4096, index), task.trial(4096, index, ABSENT)
        (key,), (value,) = plain.labels["keys"], plain.questions[0].references
        context = texts(task, plain)[0]
        assert context.count(f" {key} ") == context.count(f" {value}.") == 1
        assert f" {key} " not in texts(task, absent)[0]
        assert f" {value}." not in texts(task, absent)[0]


def test_sentences() -> None:
    text = 'He said "go." Dr. Who went. Then e.g. nothing! (Yes.) 3 left?\n \nno capital. end'
    paragraphs = [part.split() for part in text.split("\n \n")]
    essay = Essay(paragraphs)
    borders = essay.borders(len(essay.words)).tolist()
    sentences = [essay.text(a, b) for a, b in pairwise(borders)]
    assert sentences == [
        'He said "go."',
        "Dr. Who went.",
        "Then e.g. nothing!",
        "(Yes.)",
        "3 left?",
        "no capital. end",
    ]
    # Behind its end the text repeats.
    total = len(essay.words)
    assert essay.text(total - 1, total + 2) == "end He said"
    assert essay.borders(2 * total).tolist() == [*borders, *(total + b for b in borders[1:])]


def test_needles_stand_between_sentences(make_tools: Callable[..., Tools], tmp_path: Path) -> None:
    text = " ".join(f"Sentence {number} ends here." for number in range(30))
    file = tmp_path / "PaulGrahamEssays.json"
    file.write_text(json.dumps({"text": text.replace(" ends", "\n  ends")}))
    tools = make_tools({"lengths": [4096], "trials": 4, "haystack": [str(file)]})
    task = make_task("niah_multikey_1", tools)
    context, _ = texts(task, task.trial(4096, 0))
    body = context.split("\n", 1)[1]
    # The last sentence is cut where the words end.
    parts = re.split(r"(?<=\.)\s+", body.strip())
    allowed = re.compile(r"Sentence \d+ ends here\.")
    assert all(allowed.fullmatch(part) or SENTENCE.fullmatch(part) for part in parts[:-1])
    # A text that is too short is repeated.
    assert body.count("Sentence 0 ends here.") > 1
    file.rename(tmp_path / "essay.txt")
    (tmp_path / "essay.txt").write_text(text)
    tools.config.haystack = [str(tmp_path / "essay.txt")]
    same = make_task("niah_multikey_1", tools)
    assert same.trial(4096, 0).fingerprint() == task.trial(4096, 0).fingerprint()


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "is not JSON"), ('{"txt": ""}', "no field 'text'"), ('{"text": " "}', "hold no text")],
)
def test_bad_essays(
    content: str, reason: str, make_tools: Callable[..., Tools], tmp_path: Path
) -> None:
    file = tmp_path / "essays.json"
    file.write_text(content)
    with pytest.raises(UserError, match=reason):
        make_task("niah_single_2", make_tools({"lengths": [1024], "haystack": [str(file)]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_length_that_is_too_short_is_told(name: str, make_tools: Callable[..., Tools]) -> None:
    with pytest.raises(UserError, match=f"{name}: lengths: 256 tokens .* use at least") as error:
        make(name, make_tools, 256)
    least = int(str(error.value).split()[-1])
    assert least < 1024
    task = make(name, make_tools, least)
    for variant in (PLAIN, CHANGED, ABSENT):
        assert all(tokens(task.trial(least, index, variant)) <= least for index in range(4))


class FourTokensPerCharacter:
    """No text is short for this one."""

    bos_token_id = None

    def __call__(self, text: str, **kwargs) -> SimpleNamespace | dict:
        return {"input_ids": [4 * ord(one) + part for one in text for part in range(4)]}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token // 4) for token in ids[::4])


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multiquery", "niah_multikey_3"])
def test_a_wasteful_tokenizer_finishes(name: str, make_tools: Callable[..., Tools]) -> None:
    task = make(name, make_tools, 8192, tokenizer=FourTokensPerCharacter())
    for variant in (PLAIN, CHANGED, ABSENT):
        assert 8192 - 4 * 300 < tokens(task.trial(8192, 1, variant)) <= 8192
    with pytest.raises(UserError, match="too short"):
        make(name, make_tools, 1024, tokenizer=FourTokensPerCharacter())


def test_few_passes_over_a_long_text(
    make_tools: Callable[..., Tools], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make("niah_multiquery", make_tools, 1 << 20)
    task.trial(1 << 20, 0)
    long: list[int] = []
    encode = ByteTokenizer.encode_bytes

    def counted(self, data: bytes) -> np.ndarray:
        long.append(len(data) > 1 << 19)
        return encode(self, data)

    monkeypatch.setattr(ByteTokenizer, "encode_bytes", counted)
    for index in range(1, 5):
        task.trial(1 << 20, index)
    assert sum(long) <= 3 * 4
