"""Tokenizers: bytes are lossless, everything survives a run folder."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

import memlm  # noqa: F401  (AutoTokenizer knows its models then)
from memlm.data import (
    ByteTokenizer,
    SentencePieceTokenizer,
    byte_level,
    load_tokenizer,
    register_tokenizers,
)
from memlm.data.tokenizers import IntegerTokenizer
from memlm.errors import UserError


class FolderConfig(PreTrainedConfig):
    model_type = "memlm_tokenizer_test"


register_tokenizers(FolderConfig)


def save_run(tokenizer, folder: Path) -> None:
    FolderConfig().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.encode_bytes(text.encode()).tolist() == ids
    assert tokenizer.decode(ids) == text


def test_names_of_special_tokens_in_a_text_stay_text() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer("a<eos><pad>").input_ids
    assert max(ids) < 256
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<eos><pad>"


def test_byte_vocabulary() -> None:
    tokenizer = ByteTokenizer()
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert special == {256, 257, 258}
    assert len(tokenizer) == 259
    assert tokenizer.vocab_size == 256
    assert byte_level(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<eos>") == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("no token") is None


def test_decoding_what_is_no_text() -> None:
    tokenizer = ByteTokenizer()
    half = list("é".encode())[:1]
    assert tokenizer.decode([*half, 65]) == "\ufffdA"
    # A model with a padded embedding may pick ids that stand for nothing.
    assert tokenizer.decode([65, 300, 66]) == "AB"
    assert tokenizer.decode([65, tokenizer.eos_token_id]) == "A<eos>"
    assert tokenizer.decode([65, tokenizer.eos_token_id], skip_special_tokens=True) == "A"


def test_byte_tokenizer_pads() -> None:
    tokenizer = ByteTokenizer()
    batch = tokenizer(["ab", "c"], padding=True, padding_side="left", return_tensors="pt")
    assert batch["input_ids"].tolist() == [[97, 98], [tokenizer.pad_token_id, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]


@pytest.fixture(scope="module")
def bytes_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The saved byte tokenizer as it loads where its class is not known."""
    folder = tmp_path_factory.mktemp("bytes")
    ByteTokenizer().save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@given(st.text() | st.sampled_from(["<eos>", "a<pad>", "\0 \t  \r\n", "\u2581"]))
def test_bytes_elsewhere(bytes_elsewhere: PreTrainedTokenizerFast, text: str) -> None:
    ids = bytes_elsewhere(text)["input_ids"]
    assert ids == list(text.encode())
    assert bytes_elsewhere.decode(ids) == text


def test_byte_tokenizer_elsewhere_has_the_same_special_tokens(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path)
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert other.special_tokens_map == tokenizer.special_tokens_map
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (256, 257, 258)
    assert len(other) == len(tokenizer) == 260
    assert other.convert_tokens_to_ids("<tool>") == 259
    assert other.decode([195, 65, 257], skip_special_tokens=True) == "\ufffdA"


def test_byte_tokenizer_from_a_run_folder(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    save_run(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is ByteTokenizer
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.eos_token_id == tokenizer.eos_token_id
    assert loaded("é<eos>").input_ids == tokenizer("é<eos>").input_ids


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [f"line {i} speaks of the number {i * 7919 % 10007}" for i in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "small"),
        vocab_size=310,
        byte_fallback=True,
        minloglevel=2,
    )
    return folder / "small.model"


def test_sentencepiece_file(sentencepiece_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_file))
    assert not byte_level(tokenizer)
    assert type(tokenizer) is SentencePieceTokenizer
    assert tokenizer.eos_token == "</s>"
    text = "the number 12 speaks é"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    save_run(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is SentencePieceTokenizer
    assert loaded(text).input_ids == ids
    assert loaded.decode(ids) == text


def test_tokenizers_library_tokenizer_in_a_run_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    save_run(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), tmp_path)
    assert load_tokenizer(str(tmp_path))("b a c").input_ids == [1, 0, 2]


NUMBERS = IntegerTokenizer(12)


def test_numbers_are_their_own_ids() -> None:
    assert NUMBERS.vocab_size == 12
    assert len(NUMBERS) == 16
    special = {NUMBERS.bos_token_id, NUMBERS.eos_token_id, NUMBERS.unk_token_id}
    assert special | {NUMBERS.pad_token_id} == {12, 13, 14, 15}
    assert NUMBERS(" ".join(map(str, range(12)))).input_ids == list(range(12))
    assert NUMBERS("  5\n10\t7 ").input_ids == [5, 10, 7]
    assert NUMBERS.decode([5, 10, 7]) == "5 10 7"
    assert NUMBERS.decode([1, NUMBERS.eos_token_id]) == "1 <eos>"
    assert NUMBERS.decode([1, NUMBERS.eos_token_id], skip_special_tokens=True) == "1"
    assert NUMBERS.decode([1, 40, 2]) == "1 2"


@pytest.mark.parametrize("word", ["12", "007", "-1", "+3", "3.0", "x", "٣", "9" * 5000])
def test_what_is_no_number_below_is_unknown(word: str) -> None:
    assert NUMBERS(f"1 {word} 2").input_ids == [1, NUMBERS.unk_token_id, 2]


@pytest.fixture(scope="module")
def numbers_saved(tmp_path_factory: pytest.TempPathFactory) -> list:
    """The saved tokenizer as loaded here, beside a model, and where its class is not known."""
    alone, run = (tmp_path_factory.mktemp(name) for name in ("alone", "run"))
    NUMBERS.save_pretrained(alone)
    save_run(NUMBERS, run)
    found = [load_tokenizer(str(alone)), load_tokenizer(str(run))]
    found.append(AutoTokenizer.from_pretrained(run))
    assert {type(tokenizer) for tokenizer in found} == {IntegerTokenizer}
    return [*found, PreTrainedTokenizerFast.from_pretrained(alone)]


@given(st.lists(st.integers(0, 30).map(str) | st.sampled_from(["<eos>", "<pad>", "a", "01", "é"])))
def test_saved_numbers_are_the_same(numbers_saved: list, words: list[str]) -> None:
    text = " ".join(words)
    ids = NUMBERS(text).input_ids
    special = {"<eos>": NUMBERS.eos_token_id, "<pad>": NUMBERS.pad_token_id}
    known = special | {str(number): number for number in range(12)}
    assert ids == [known.get(word, NUMBERS.unk_token_id) for word in words]
    for other in numbers_saved:
        assert other(text).input_ids == ids
        for skip in (False, True):
            assert other.decode(ids, skip_special_tokens=skip) == NUMBERS.decode(
                ids, skip_special_tokens=skip
            )
        assert other.special_tokens_map == NUMBERS.special_tokens_map
        assert len(other) == 16


@pytest.mark.parametrize("number", ["0", "", "x", "-3", "3.5", "1000001", "9" * 5000])
def test_numbers_that_cannot_be(number: str) -> None:
    with pytest.raises(UserError, match="expected how many numbers, from 1 to 1000000"):
        load_tokenizer(f"integers:{number}")
    assert len(load_tokenizer("integers:1")) == 5


@pytest.mark.parametrize("spec", ["no/such-tokenizer", "missing.model", "broken.model"])
def test_tokenizers_that_cannot_be_loaded(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=spec):
        load_tokenizer(spec)


@pytest.mark.parametrize("model_type", ["memlm", "qwen3", "gpt2", "gemma", "t5"])
def test_a_model_without_a_tokenizer_is_told(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match="without the files of a tokenizer; valid: 'bytes'"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("damage", [{}, {"added_tokens": [], "model": {"type": "Other"}}])
def test_a_damaged_tokenizer_is_told(damage: dict, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(damage))
    with pytest.raises(UserError, match=r"could not be loaded \((KeyError|Exception): "):
        load_tokenizer(str(tmp_path))
