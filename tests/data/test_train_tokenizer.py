"""A trained tokenizer loses nothing, is SentencePiece's own, and loads without this package."""

import json
import os
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memlm.data import DataConfig, load_tokenizer
from memlm.data.corpus import build_corpora, in_split
from memlm.data.sources import stdlib_documents
from memlm.data.text_sample import PART_CHARACTERS, sample_sources
from memlm.data.train_sentencepiece import KINDS
from memlm.data.train_tokenizer import main

VOCABULARY = 600
NASTY = [
    "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<0x", "0A>", "\u2581", "\u2047", "\u2585", "\0",
    "\t", "\r\n", "\n\n", " ", "    ", "\x1b[0m", "\u200b", "\ufeff", "e\u0301", "é", "😀", "中",
    "self", "return", "12345", "a", "ab",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(),
    st.text("a "),
    st.text("self.\n"),
    st.lists(st.sampled_from(NASTY)).map("".join),
)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "code.txt"
    texts = islice((text for text in stdlib_documents() if 9_000 < len(text) < 20_000), 3)
    path.write_text("".join(texts) + "Ein Café, ein Café.\n" * 20)
    return path


@pytest.fixture(scope="module")
def folders(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp("tokenizers") / kind for kind in KINDS}
    for kind, folder in folders.items():
        assert train(text_file, folder, kind) == 0
    return folders


def train(text: Path, output: Path, kind: str = "bpe", vocab_size: int = VOCABULARY, *more) -> int:
    words = ["--text", text, "--vocab_size", vocab_size, "--kind", kind, "--output", output, *more]
    return main([str(word) for word in words])


def pair(
    folder: Path,
) -> tuple[PreTrainedTokenizerBase, sentencepiece.SentencePieceProcessor]:
    model = str(folder / "sentencepiece.model")
    return load_tokenizer(str(folder)), sentencepiece.SentencePieceProcessor(model_file=model)


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, folders: dict[str, Path]):
    return pair(folders[request.param])


@given(text=TEXTS)
def test_ids_are_those_of_sentencepiece_and_nothing_is_lost(both, text: str) -> None:
    tokenizer, processor = both
    ids = tokenizer(text)["input_ids"]
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert processor.decode(ids) == text


def test_texts_of_the_standard_library(both) -> None:
    tokenizer, processor = both
    for text in islice(stdlib_documents(), 0, 400, 20):
        ids = tokenizer(text)["input_ids"]
        assert ids == processor.encode(text)
        assert tokenizer.decode(ids) == text


def test_the_files_are_read_as_the_same_tokenizer(both, folders: dict[str, Path]) -> None:
    """The folder by AutoTokenizer, the model file by SentencePiece, a saved copy."""
    tokenizer, processor = both
    folder = Path(tokenizer.name_or_path)
    text = "  def name(self):\n\treturn '</s>'  # 😀\u2581\n"
    ids = processor.encode(text)
    assert load_tokenizer(str(folder / "sentencepiece.model"))(text)["input_ids"] == ids
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == ids
    assert len(tokenizer) == tokenizer.vocab_size == VOCABULARY


def test_a_copy_in_a_run_folder(both, tmp_path: Path) -> None:
    tokenizer, _ = both
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "memlm"}))
    copy = load_tokenizer(str(tmp_path))
    text = "a <s>\u2581  "
    assert copy(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert copy.special_tokens_map == tokenizer.special_tokens_map


def test_special_tokens(both) -> None:
    tokenizer, processor = both
    ids = [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert [*ids, tokenizer.pad_token_id] == [0, 1, 2, 3]
    assert [processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()] == [
        0, 1, 2, 3,
    ]  # fmt: skip
    assert tokenizer.decode([2, *tokenizer("a").input_ids, 3], skip_special_tokens=True) == "a"
    batch = tokenizer(["a", ""], padding=True)
    assert batch["input_ids"][1] == [3]
    assert batch["attention_mask"] == [[1], [0]]


def test_a_corpus_of_tokens(both) -> None:
    tokenizer, _ = both
    texts = ["one text", "another </s> text", "a third"]
    corpus = build_corpora(texts, tokenizer, 0.0)["train"]
    parts = [corpus.tokens[a:b] for a, b in zip(corpus.starts, corpus.starts[1:], strict=False)]
    assert [tokenizer.decode(part) for part in parts] == texts


def test_loaded_where_this_package_is_not_imported(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    load_tokenizer("bytes").save_pretrained(tmp_path)
    program = """
import sys
from transformers import AutoTokenizer
text = "  a <s>\\u2581\\0\\t\\n 😀"
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode([*tokenizer(text).input_ids, tokenizer.eos_token_id]) != text
assert tokenizer(text).input_ids == list(text.encode())
assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
assert "memlm" not in sys.modules
"""
    command = [sys.executable, "-c", program, *map(str, folders.values()), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_give_the_same_files(
    kind: str, folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    assert train(text_file, tmp_path / "again", kind) == 0
    for path in folders[kind].iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_what_is_told(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train(text_file, tmp_path / "new", "bpe", 600, "--max_bytes", 20_000) == 0
    sample, result = capsys.readouterr().out.splitlines()
    assert "drawn at random from" in sample
    assert str(text_file) in sample
    assert "bpe, 600 tokens" in result


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocab_size", "100000000"], "too large for this text: at most"),
        (["--vocab_size", "200"], "too small: the special tokens, the 256 bytes"),
        (["--vocab_size", "0"], "--vocab_size must be at least 1"),
        (["--max_bytes", "0"], "--max_bytes must be between 1"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--text", "zero.jsonl"], "are empty"),
        (["--output", "."], "is there already"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--config", "missing.yaml", "--column", "body"], "--column goes with --text"),
        (["--preset", "tiny"], "--preset goes with --config"),
        (["--data.seed", "1"], "unknown arguments without --config: --data.seed 1"),
        (["--kind", "wordpiece"], "invalid choice: 'wordpiece'"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: list[str],
    message: str,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero.jsonl").write_text(json.dumps({"text": "\0"}) + "\n")
    given = {"--vocab_size": "600", "--kind": "bpe", "--output": "out"}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    if "--config" not in given:
        given.setdefault("--text", str(text_file))
    assert main([word for item in given.items() for word in item]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("out").exists()


def test_the_smallest_vocabulary(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(text_file, tmp_path / "out", "unigram", 200) == 2
    least = int(capsys.readouterr().err.split()[-1])
    assert train(text_file, tmp_path / "out", "unigram", least) == 0
    tokenizer, processor = pair(tmp_path / "out")
    assert len(tokenizer) == least
    assert tokenizer("<s> 😀").input_ids == processor.encode("<s> 😀")


def documents(folder: Path, name: str, texts: list[str]) -> dict:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"type": "text", "files": [str(path)]}


def words(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(["one", "two", "three\n"]) for _ in range(count))


def test_a_sample_of_everything(tmp_path: Path) -> None:
    texts = ["short", words(0, 20_000), "x" * (3 * PART_CHARACTERS), "  end"]
    config = DataConfig(sources=[documents(tmp_path, "a.jsonl", texts)], validation_fraction=0.0)
    (sample,) = sample_sources(config, 10**9)
    assert "".join(sample.parts) == "".join(texts)
    assert max(map(len, sample.parts)) <= PART_CHARACTERS
    assert sample.kept_bytes == sample.read_bytes == sum(map(len, texts))
    assert sample.documents == 4


def test_a_sample_is_drawn_from_all_of_the_text(tmp_path: Path) -> None:
    texts = [f"{number:04d} " + "y" * 995 for number in range(500)]
    config = DataConfig(sources=[documents(tmp_path, "a.jsonl", texts)], validation_fraction=0.0)
    (sample,) = sample_sources(config, 100_000)
    numbers = [int(part[:4]) for part in sample.parts]
    assert len(numbers) == 100
    assert numbers == sorted(numbers)
    assert sum(number < 250 for number in numbers) in range(30, 71)
    assert sample_sources(config, 100_000)[0].parts == sample.parts


def test_sources_have_their_shares(tmp_path: Path) -> None:
    texts = ["z" * 1000 for _ in range(100)]
    sources = [
        {**documents(tmp_path, "a.jsonl", texts), "weight": 3.0},
        {**documents(tmp_path, "b.jsonl", texts), "weight": 1.0},
        {"type": "mqar"},
    ]
    config = DataConfig(sources=sources, validation_fraction=0.0)
    assert [s.kept_bytes for s in sample_sources(config, 40_000)] == [30_000, 10_000]


def test_texts_that_are_held_out_are_left_out(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(200)]
    config = DataConfig(sources=[documents(tmp_path, "a.jsonl", texts)], validation_fraction=0.3)
    (sample,) = sample_sources(config, 10**9)
    assert sample.parts == [text for text in texts if in_split(text, "train", 0.3)]
    assert 0 < len(sample.parts) < 200


def test_a_stream_is_read_until_its_share_is_full(tmp_path: Path) -> None:
    texts = [f"{number:04d} " + "y" * 995 for number in range(100)]
    documents(tmp_path, "a.jsonl", texts)
    source = {"type": "hub", "dataset": str(tmp_path)}
    config = DataConfig(sources=[source], validation_fraction=0.0)
    (sample,) = sample_sources(config, 10_000)
    assert sample.parts == texts[:10]
    assert not sample.ended


def test_sources_without_texts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "mqar.yaml"
    config.write_text("data: {sources: [{type: mqar}]}\n")
    words = ["--config", config, "--vocab_size", 400, "--output", tmp_path / "out"]
    assert main([str(word) for word in words]) == 2
    assert "no source has texts" in capsys.readouterr().err
