"""Pass keys: the published prompt, cut by characters, as long as fits into a number of tokens."""

import re
import time
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.prompts import Context, Trial, encode_prompt
from memlm.evaluation.tasks import make_task
from memlm.evaluation.tasks.base import Tools
from memlm.evaluation.tasks.passkey import encode_passkey, garbage, prompt_text

MakeTools = Callable[..., Tools]
# As published.
PROMPT = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there.\n"
    "{before}\n"
    "The pass key is {key}. Remember it. {key} is the pass key.\n"
    "{after}\n"
    "What is the pass key? The pass key is"
)
SENTENCES = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
ENDLESS = " ".join([SENTENCES] * 5000)


def text_of(trial: Trial, tokenizer: PreTrainedTokenizerBase) -> str:
    context = trial.context.read(0, len(trial.context))
    return tokenizer.decode(np.concatenate([context, trial.questions[0].token_ids]).tolist())


def oracle(text: str) -> str:
    found = re.search(r"The pass key is (\d+)\. Remember it\. (\d+) is the pass key\.", text)
    return f" {found[1]}. " if found and found[1] == found[2] else " none"


def size_of(trial: Trial) -> int:
    (question,) = trial.questions
    assert question.new_tokens == 10
    return len(trial.context) + len(question.token_ids) + question.new_tokens


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 89), (90, 5), (1234, 77)])
def test_the_published_prompt(before: int, after: int) -> None:
    expected = PROMPT.format(key=417, before=ENDLESS[:before], after=ENDLESS[:after])
    assert "".join(prompt_text(417, before, after)) == expected
    assert len(garbage(before)) == before


@pytest.mark.parametrize("length", [1024, 4096, 16384])
def test_an_oracle_is_always_right(
    make_tools: MakeTools, sentencepiece_tokenizer: PreTrainedTokenizerBase, length: int
) -> None:
    for tokenizer in (ByteTokenizer(), sentencepiece_tokenizer):
        task = make_task("passkey", make_tools({"lengths": [length]}, tokenizer))
        for index in range(6):
            trial = task.trial(length, index)
            (question,) = trial.questions
            answer = oracle(text_of(trial, tokenizer))
            assert task.score(question, answer) == 1
            assert task.score(question, answer.replace(question.references[0], "50001")) == 0
            assert length - 10 <= size_of(trial) <= length
            assert f"The pass key is {question.references[0]}." in trial.excerpt


def test_bytes_spell_the_published_prompt(make_tools: MakeTools) -> None:
    task = make_task("passkey", make_tools({"lengths": [5000]}))
    for index in range(10):
        trial = task.trial(5000, index)
        before, after = trial.labels["characters_before"], trial.labels["characters_after"]
        key = trial.questions[0].references[0]
        expected = PROMPT.format(key=key, before=ENDLESS[:before], after=ENDLESS[:after])
        assert text_of(trial, ByteTokenizer()) == expected
        # Room is left for the changed key, whose five digits stand there twice.
        assert 5000 - 8 <= size_of(trial) <= 5000
        assert max(size_of(trial), size_of(task.trial(5000, index, "changed"))) == 5000


def test_the_first_number_counts(make_tools: MakeTools) -> None:
    task = make_task("passkey", make_tools({"lengths": [1024]}))
    (question,) = task.trial(1024, 0).questions
    key = int(question.references[0])
    for right in (f" {key}", f"{key}. Remember 1", f"is\n0{key} "):
        assert task.score(question, right) == 1
    for wrong in ("", " the sky", f" {key + 1}", f" 7 {key}", f" {key}0", f" {key // 10}"):
        assert task.score(question, wrong) == 0


def test_keys_and_places_are_uniform(make_tools: MakeTools) -> None:
    task = make_task("passkey", make_tools({"lengths": [1024]}))
    trials = [task.trial(1024, index) for index in range(500)]
    keys = np.array([int(trial.questions[0].references[0]) for trial in trials])
    assert 1 <= keys.min() <= keys.max() <= 50000
    rows = np.bincount((keys - 1) // 10000, minlength=5)
    assert ((rows - 100) ** 2 / 100).sum() < 18
    assert keys.min() < 1000
    depths, counts = np.unique([trial.labels["depth"] for trial in trials], return_counts=True)
    assert depths.tolist() == [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
    assert ((counts - 50) ** 2 / 50).sum() < 28
    for trial in trials[:20]:
        before, after = trial.labels["characters_before"], trial.labels["characters_after"]
        assert abs(before / (before + after) - trial.labels["depth"]) <= 0.0501


def test_variants(make_tools: MakeTools) -> None:
    task = make_task("passkey", make_tools({"lengths": [2048]}))
    for index in range(8):
        plain, changed, absent = (
            task.trial(2048, index, variant) for variant in ("plain", "changed", "absent")
        )
        tokenizer = ByteTokenizer()
        key, other = plain.questions[0].references[0], changed.questions[0].references[0]
        assert key != other
        hidden = "The pass key is {0}. Remember it. {0} is the pass key.\n"
        text = text_of(plain, tokenizer)
        assert text.replace(hidden.format(key), hidden.format(other)) == text_of(changed, tokenizer)
        assert text.replace(hidden.format(key), "") == text_of(absent, tokenizer)
        assert task.score(changed.questions[0], oracle(text_of(changed, tokenizer))) == 1
        assert absent.questions[0].references == (key,)
        assert task.score(absent.questions[0], oracle(text_of(absent, tokenizer))) == 0
        assert key not in absent.excerpt
        assert max(size_of(changed), size_of(absent)) <= 2048


def test_prompts_are_regenerated(make_tools: MakeTools) -> None:
    prompts = set()
    for seed in (0, 1):
        first, second = (
            make_task("passkey", make_tools({"lengths": [1024], "seed": seed})) for _ in range(2)
        )
        backwards = [second.trial(1024, index).fingerprint() for index in reversed(range(4))]
        assert [first.trial(1024, index).fingerprint() for index in range(4)] == backwards[::-1]
        prompts |= set(backwards)
    assert len(prompts) == 8


def words_tokenizer(pieces: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose longest-first pieces may reach over words; "." for what is missing."""
    model = models.Unigram([("?", -30.0), *((piece, -1.0) for piece in pieces)], unk_id=0)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "words", "two periods"])
def test_folded_garbage_has_the_tokens_of_the_text(
    kind: str, sentencepiece_tokenizer: PreTrainedTokenizerBase
) -> None:
    characters = sorted(set(PROMPT + SENTENCES + "0123456789"))
    tokenizer = {
        "bytes": ByteTokenizer(),
        "sentencepiece": sentencepiece_tokenizer,
        "words": words_tokenizer([*characters, "The ", "is ", "grass is green. T", "again. The"]),
        # One piece for two periods: copies of a single one are wrong.
        "two periods": words_tokenizer([*characters, 2 * (SENTENCES + " ")]),
    }[kind]
    rng = np.random.default_rng(1)
    sizes = [(int(before), int(after)) for before, after in rng.integers(0, 3000, size=(60, 2))]
    sizes += [(200, 9000), (9000, 200), (0, 5000), (5000, 0), (4500, 4500), (449, 450)]
    unfolded = 0
    for before, after in sizes:
        for key in (None, 48213):
            prompt = encode_passkey(tokenizer, key, before, after)
            ids = Context(prompt.pieces).read(0, len(prompt))
            written = encode_prompt(tokenizer, "".join(prompt_text(key, before, after)))
            assert np.array_equal(np.concatenate([ids, prompt.question]), written)
            assert len(prompt) == len(written)
            unfolded += len(prompt.pieces) == 1
    assert unfolded > 60 if kind == "two periods" else unfolded < 20


def test_long_prompts_have_the_tokens_of_the_text(
    make_tools: MakeTools, sentencepiece_tokenizer: PreTrainedTokenizerBase
) -> None:
    for tokenizer in (ByteTokenizer(), sentencepiece_tokenizer):
        task = make_task("passkey", make_tools({"lengths": [65536]}, tokenizer))
        trial = task.trial(65536, 3)
        before, after = trial.labels["characters_before"], trial.labels["characters_after"]
        key = int(trial.questions[0].references[0])
        written = encode_prompt(tokenizer, "".join(prompt_text(key, before, after)))
        ids = trial.context.read(0, len(trial.context))
        assert np.array_equal(np.concatenate([ids, trial.questions[0].token_ids]), written)


def test_a_million_tokens_are_made_at_once_and_read_in_pieces(
    make_tools: MakeTools, sentencepiece_tokenizer: PreTrainedTokenizerBase
) -> None:
    for tokenizer in (ByteTokenizer(), sentencepiece_tokenizer):
        task = make_task("passkey", make_tools({"lengths": ["1M", "4M"]}, tokenizer))
        for length in (1 << 20, 1 << 22):
            start = time.process_time()
            trial = task.trial(length, 1)
            assert time.process_time() - start < 1.5
            assert length - 10 <= size_of(trial) <= length
            assert sum(len(piece.ids) for piece in trial.context.pieces) < 5000
            middle = tokenizer.decode(trial.context.read(length // 2, length // 2 + 400).tolist())
            assert "The sky is blue. The sun is yellow." in middle


@pytest.mark.parametrize("length", [64, 256])
def test_too_short(make_tools: MakeTools, length: int) -> None:
    with pytest.raises(UserError, match=rf"lengths: {length} tokens are too short.*at least 257"):
        make_task("passkey", make_tools({"lengths": [length, 1024]}))
    task = make_task("passkey", make_tools({"lengths": [257]}))
    assert max(size_of(task.trial(257, index)) for index in range(8)) == 257
    with pytest.raises(UserError, match="too short"):
        task.trial(240, 0)


def test_a_tokenizer_without_a_digit(make_tools: MakeTools) -> None:
    tokenizer = words_tokenizer([*"abcdefghijklmnopqrstuvwxyz .012345689"])
    with pytest.raises(UserError, match="passkey: the tokenizer cannot write '7'"):
        make_task("passkey", make_tools({"lengths": [1024]}, tokenizer))
