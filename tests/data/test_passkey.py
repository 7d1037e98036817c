"""Passkeys: the same line in training rows and needles, answers marked exactly."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.data import ByteTokenizer, DataConfig, PackedDataset
from memlm.data.passkey import PasskeyRows
from memlm.errors import UserError

TOKENIZER = ByteTokenizer()
LINE = re.compile(r"# The pass key is (\d+)\.\n")
TEXT = "".join(f"value_{i} = compute({i * 37 % 101})\n" for i in range(400))
HAYSTACK = TOKENIZER.encode_bytes(TEXT.encode())


def make_rows(length: int, digits: tuple[int, int], seed: int = 0, **values) -> PasskeyRows:
    queries = values.get("queries", (1, 3))
    tokens = values.get("tokens", HAYSTACK)
    return PasskeyRows(tokens, TOKENIZER, length, seed, digits, queries)


@pytest.mark.parametrize(
    ("length", "digits"), [(128, (5, 30)), (256, (5, 30)), (512, (5, 5)), (2048, (5, 5))]
)
def test_rows_hide_one_key_and_ask_for_it(length: int, digits: tuple[int, int]) -> None:
    batch = make_rows(length, digits).batch(np.arange(200))
    counts, key_lengths, distances = set(), set(), []
    for row in range(200):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        assert np.array_equal(ids[1:], labels[:-1])
        text = TOKENIZER.decode([*ids.tolist(), int(labels[-1])])
        lines = list(LINE.finditer(text))
        keys = {line[1] for line in lines}
        assert len(keys) == 1
        assert all(line.start() == 0 or text[line.start() - 1] == "\n" for line in lines)
        # The answers are the digits of every line but the first, and nothing else.
        targets = np.flatnonzero(batch["loss_groups"][row]) + 1
        expected = [i for line in lines[1:] for i in range(*line.span(1))]
        assert targets.tolist() == expected
        # Without the lines, what stands there is the haystack.
        assert LINE.sub("", text) in TEXT
        counts.add(len(lines) - 1)
        key_lengths.add(len(lines[0][1]))
        distances.append(lines[-1].start() - lines[0].end())
        assert length - lines[-1].end() <= 40
    assert counts == {1, 2, 3}
    assert min(key_lengths) == digits[0]
    assert max(key_lengths) >= min(digits[1], length // 6)
    assert min(distances) < 0.2 * length
    assert max(distances) > (0.3 if length < 256 else 0.7) * length
    assert (batch["segment_ids"] == 1).all()
    assert np.array_equal(batch["position_ids"][3], np.arange(length))


def test_keys_are_uniform_and_differ_between_rows_and_seeds() -> None:
    rows = make_rows(512, (5, 5))
    batch = rows.batch(np.arange(2000))
    answers = batch["labels"][batch["loss_groups"] == 1] - ord("0")
    shares = np.bincount(answers, minlength=10) / len(answers)
    assert shares.min() > 0.085
    assert shares.max() < 0.115
    firsts = [LINE.search(TOKENIZER.decode(ids.tolist()))[1] for ids in batch["input_ids"]]
    assert len(set(firsts)) > 1900
    other = make_rows(512, (5, 5), seed=1).batch(np.arange(5))
    assert not np.array_equal(other["input_ids"], batch["input_ids"][:5])


@given(st.integers(0, 10**12), st.integers(64, 700), st.integers(0, 10))
@settings(max_examples=40)
def test_rows_are_pure_functions_of_the_index(index: int, length: int, seed: int) -> None:
    rows = make_rows(length, (2, 9), seed)
    together = rows.batch(np.array([5, index, 6]))
    alone = make_rows(length, (2, 9), seed).batch(np.array([index]))
    for name, values in alone.items():
        assert np.array_equal(values[0], together[name][1])


def test_tiny_and_unbroken_texts_still_make_rows() -> None:
    for text in ("x", "no line ends here " * 100):
        tokens = TOKENIZER.encode_bytes(text.encode())
        batch = make_rows(200, (5, 5), tokens=tokens).batch(np.arange(20))
        for ids in batch["input_ids"]:
            assert len(LINE.findall(TOKENIZER.decode(ids.tolist()))) >= 2


def test_rows_too_short_for_their_lines() -> None:
    with pytest.raises(UserError, match=r"rows of 40 tokens are too short: .* need 63"):
        make_rows(40, (5, 5))
    make_rows(63, (5, 5)).batch(np.arange(50))


def test_digits_change_with_the_stage() -> None:
    config = DataConfig(sources=[{"type": "passkey", "digits": [5, 30]}])
    data = PackedDataset(config, TOKENIZER, "train", 256)
    stage = data.with_length(1024, digits=(5, 5))
    counts = data.batch(range(50))["loss_groups"].sum(dim=1)
    assert len(set(counts.tolist())) > 10
    assert set((stage.batch(range(50))["loss_groups"].sum(dim=1)).tolist()) == {5, 10, 15}
    assert torch.equal(stage.row(7)["labels"], stage.batch([3, 7])["labels"][1])


def test_vocabularies_without_newlines_hide_keys_anywhere() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *"0123456789", "#", "The", "pass", "key", "is", ".", "word"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    haystack = np.full(500, words.index("word"))
    rows = PasskeyRows(haystack, tokenizer, 128, 0, (5, 5), (1, 3)).batch(np.arange(50))
    gaps = [np.ptp(np.flatnonzero(ids == words.index("key"))) for ids in rows["input_ids"]]
    assert len(set(gaps)) > 20
