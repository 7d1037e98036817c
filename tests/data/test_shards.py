"""Rows from shards are the rows from memory; shards that do not fit or are damaged are refused."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memlm.data import ByteTokenizer, DataConfig, PackedDataset, load_tokenizer, shard_writer
from memlm.data.corpus import build_corpus
from memlm.data.shard_manifest import MANIFEST_FILE, tokenizer_hash
from memlm.data.shards import ShardedTokens, prepare_shards, read_shards
from memlm.data.sources import stdlib_documents
from memlm.data.text_origin import text_origin
from memlm.data.tokenize import main
from memlm.errors import UserError

WORDS = ["a", "lake", "and", "hills", "1", "22", "of", "\N{SNOWMAN}", "naïve\n", "words\t"]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some 70 documents in txt, jsonl and parquet files, in chunks of about a hundred bytes."""
    monkeypatch.setattr(shard_writer, "_LEAST_CHUNK", 100)
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(WORDS, size=rng.integers(1, 60))) for _ in range(70)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(documents[:20]):
        (folder / f"{number:02}.txt").write_text(text)
    lines = [json.dumps({"text": text}) for text in documents[20:40]]
    (folder / "more.jsonl").write_text("\n".join(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents[40:]}), folder / "more.parquet")
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Bytes, a byte-level BPE with a bos, and a SentencePiece model."""
    folder = tmp_path_factory.mktemp("tokenizers")
    lines = [" ".join(WORDS) + f" {i} {i * 7}" for i in range(200)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(lines, trainer)
    (folder / "lines.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"),
        model_prefix=str(folder / "pieces"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    return {
        "bytes": ByteTokenizer(),
        "bpe": fast,
        "sentencepiece": load_tokenizer(str(folder / "pieces.model")),
    }


def same_rows(config: dict, tokenizer: object, shards: Path, length: int = 32, **options) -> None:
    """Every row of both splits, over more than an epoch, is the same from files and memory."""
    for split in ("train", "validation"):
        memory = PackedDataset(DataConfig(**config), tokenizer, split, length, **options)
        disk = PackedDataset(
            DataConfig(**config, shards=str(shards)), tokenizer, split, length, **options
        )
        assert disk.epoch_rows == memory.epoch_rows
        indices = list(range(2 * (memory.epoch_rows or 20)))
        expected, found = memory.batch(indices), disk.batch(indices)
        assert expected.keys() == found.keys()
        for name in expected:
            assert torch.equal(expected[name], found[name])


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
@pytest.mark.parametrize("carry", [False, True])
def test_rows_are_those_from_memory(
    kind: str, carry: bool, texts: Path, tmp_path: Path, tokenizers: dict
) -> None:
    sources = [{"type": "text", "files": [str(texts)]}]
    config = {"sources": sources, "validation_fraction": 0.2, "carry": carry}
    shards = tmp_path / "shards"
    same_rows(config, tokenizers[kind], shards, lanes=3 if carry else 1)
    assert len(list(shards.rglob("train-*.safetensors"))) > 10


def test_rows_of_passkeys_and_mixtures(texts: Path, tmp_path: Path) -> None:
    files = [str(texts)]
    passkey = {"type": "passkey", "files": files, "digits": [1, 2], "queries": [1, 1]}
    config = {"sources": [passkey, {"type": "text", "files": files, "weight": 2}]}
    same_rows(config, ByteTokenizer(), tmp_path / "shards", length=128)
    # One set of texts, one set of shards.
    assert len(list((tmp_path / "shards").iterdir())) == 1


def test_a_single_document_and_no_validation(texts: Path, tmp_path: Path, tokenizers: dict) -> None:
    file = texts / "only.txt"
    file.write_text("One long document, cut in two. " * 20)
    sources = [{"type": "text", "files": [str(file)]}]
    config = {"sources": sources, "validation_fraction": 0.3}
    same_rows(config, tokenizers["bpe"], tmp_path / "shards")
    data = DataConfig(sources=sources, validation_fraction=0.0, shards=str(tmp_path / "all"))
    rows = PackedDataset(data, ByteTokenizer(), "train", 8)
    assert rows.epoch_rows == -(-file.stat().st_size // 8)
    with pytest.raises(UserError, match="no validation split"):
        PackedDataset(data, ByteTokenizer(), "validation", 8)
    assert len(list((tmp_path / "all").rglob("*.safetensors"))) == 1


def test_a_dataset_of_the_hub(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    shutil.copy(texts / "more.jsonl", folder / "train.jsonl")
    source = {"type": "hub", "dataset": str(folder), "streaming": False}
    config = {"sources": [source], "validation_fraction": 0.2}
    same_rows(config, ByteTokenizer(), tmp_path / "shards")
    assert next((tmp_path / "shards").iterdir()).name.startswith("hub-")
    data = DataConfig(**config, shards=str(tmp_path / "shards"))
    with monkeypatch.context() as patch:
        # The files that the library made of it tell that it is the same.
        patch.setattr("memlm.data.shards.survey_texts", None)
        _open(data)
    lines = (texts / "more.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[::-1]))
    with pytest.raises(UserError, match="another source .its texts changed"):
        _open(data)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n\n")
    _open(data)


def test_a_dataset_that_has_no_files_is_compared_by_its_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library keeps small datasets in memory where it is told to.
    monkeypatch.setattr("datasets.config.IN_MEMORY_MAX_SIZE", 1 << 30)
    file = tmp_path / "dataset" / "train.jsonl"
    file.parent.mkdir()
    source = {"type": "hub", "dataset": str(file.parent), "streaming": False}
    data = DataConfig(sources=[source], validation_fraction=0.0, shards=str(tmp_path / "shards"))
    file.write_text(json.dumps({"text": "one"}))
    _open(data)
    file.write_text(json.dumps({"text": "two"}))
    with pytest.raises(UserError, match="another source .its texts changed"):
        _open(data)


def test_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = list(stdlib_documents())[:5]
    monkeypatch.setattr("memlm.data.text_origin.stdlib_documents", lambda: iter(few))
    shards = tmp_path / "shards"
    tokenizer = ByteTokenizer()
    (source,) = DataConfig().parsed_sources()
    folder = prepare_shards(shards, text_origin(source), tokenizer, 0.5, 2)
    for split in ("train", "validation"):
        expected, found = build_corpus(few, tokenizer, split, 0.5), read_shards(folder, split)
        assert np.array_equal(found.tokens, expected.tokens)
        assert np.array_equal(found.starts, expected.starts)
    few.pop()
    with pytest.raises(UserError, match="another source .its texts changed"):
        prepare_shards(shards, text_origin(source), tokenizer, 0.5)


def test_tokens_of_several_files_are_one_array() -> None:
    whole = np.arange(10, dtype=np.uint16)
    tokens = ShardedTokens([whole[:3], whole[3:4], whole[4:]])
    assert len(tokens) == 10
    for start in range(11):
        for stop in range(12):
            assert np.array_equal(tokens[start:stop], whole[start:stop])
    assert np.array_equal(np.asarray(tokens), whole)
    assert np.shares_memory(tokens[5:9], whole)
    with pytest.raises(ValueError, match="step 1"):
        tokens[::2]


@pytest.fixture
def made(texts: Path, tmp_path: Path) -> Iterator[tuple[DataConfig, Path]]:
    """A config and the folder of its shards; opening what a test made of them changes nothing."""
    config = DataConfig(
        sources=[{"type": "text", "files": [str(texts)]}],
        validation_fraction=0.2,
        shards=str(tmp_path / "shards"),
    )
    folder = next(iter(_open(config) and (tmp_path / "shards").iterdir()))
    yield config, folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with contextlib.suppress(UserError):
        _open(config)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def _open(config: DataConfig) -> PackedDataset:
    return PackedDataset(config, ByteTokenizer(), "train", 16)


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 30, -1, -100])
def test_a_flipped_bit(place: int, made: tuple[DataConfig, Path]) -> None:
    _flip(made[1] / "train-000002.safetensors", place)
    with pytest.raises(UserError, match=r"train-000002.*altered.*tokenise anew"):
        _open(made[0])


def test_processes_of_one_launcher_share_the_checking(
    made: tuple[DataConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _flip(made[1] / "train-000003.safetensors", -1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    _open(made[0])
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"train-000003.*altered"):
        _open(made[0])
    monkeypatch.undo()


def test_a_truncated_file(made: tuple[DataConfig, Path]) -> None:
    os.truncate(made[1] / "train-000001.safetensors", 50)
    with pytest.raises(UserError, match=r"train-000001.*50 bytes long instead of"):
        _open(made[0])


def test_a_missing_file(made: tuple[DataConfig, Path]) -> None:
    (made[1] / "train-000001.safetensors").unlink()
    with pytest.raises(UserError, match=r"train-000001.*missing"):
        _open(made[0])


def test_a_damaged_manifest(made: tuple[DataConfig, Path]) -> None:
    path = made[1] / MANIFEST_FILE
    whole = path.read_text()
    for text, message in (
        (whole[:100], "damaged, or no manifest"),
        ("", "damaged"),
        ("[1]", "not a manifest of shards"),
        (whole.replace('"documents": ', '"documents": 1'), "SHA-256 differs"),
        (whole.replace('"version": 1', '"version": 7'), "of version 7.*reads version 1"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            _open(made[0])


def test_another_tokenizer(made: tuple[DataConfig, Path], tokenizers: dict) -> None:
    with pytest.raises(UserError, match=r"another tokenizer \(ByteTokenizer of 259 tokens, not"):
        PackedDataset(made[0], tokenizers["bpe"], "train", 16)


def test_another_source(made: tuple[DataConfig, Path], texts: Path) -> None:
    file = texts / "03.txt"
    before = file.read_bytes()
    file.touch()
    _open(made[0])
    # The same size and an older time: only the contents, or the inode's change, tell.
    status = file.stat()
    file.write_bytes(before[:-1] + b"#")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns - 10**12))
    with pytest.raises(UserError, match=r"another source \(file '.*03.txt' changed\); choose"):
        _open(made[0])
    file.write_bytes(before)
    _open(made[0])
    (texts / "new.txt").write_text("new")
    with pytest.raises(UserError, match="new.txt' is new"):
        _open(made[0])
    (texts / "new.txt").unlink()
    file.unlink()
    with pytest.raises(UserError, match="03.txt' is gone"):
        _open(made[0])


def test_another_fraction(made: tuple[DataConfig, Path]) -> None:
    made[0].validation_fraction = 0.4
    with pytest.raises(UserError, match=r"validation_fraction 0.2, not 0.4"):
        _open(made[0])


def test_the_hash_of_a_tokenizer(tokenizers: dict, tmp_path: Path) -> None:
    hashes = {kind: tokenizer_hash(tokenizer) for kind, tokenizer in tokenizers.items()}
    assert len(set(hashes.values())) == 3
    for kind, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / kind)
        assert tokenizer_hash(load_tokenizer(str(tmp_path / kind))) == hashes[kind]
    # What a call leaves in the tokenizer is not the tokenizer.
    bpe = load_tokenizer(str(tmp_path / "bpe"))
    bpe("a b c d e f", truncation=True, max_length=2)
    assert tokenizer_hash(bpe) == hashes["bpe"]
    bpe.add_tokens(["lake"])
    assert tokenizer_hash(bpe) != hashes["bpe"]


def test_both_splits_are_opened_once(
    made: tuple[DataConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, calls = made[0], []

    def counted(*arguments: object) -> Path:
        calls.append(arguments)
        return prepare_shards(*arguments)

    monkeypatch.setattr("memlm.data.store.prepare_shards", counted)
    training = _open(config)
    held_out = PackedDataset(config, ByteTokenizer(), "validation", 8, store=training.store)
    assert torch.equal(
        held_out.row(3)["input_ids"],
        PackedDataset(config, ByteTokenizer(), "validation", 8).row(3)["input_ids"],
    )
    assert len(calls) == 2


def test_the_command_line(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "shards"
    arguments = ["--text", str(texts), "--out", str(out), "--validation-fraction", "0.2"]
    assert main(arguments) == 0
    assert "documents of" in capsys.readouterr().out
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{sources: [{{type: text, files: [{texts}]}}, {{type: mqar}}], "
        f"validation_fraction: 0.2, shards: {out}}}\n"
    )
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert main(["--config", str(config)]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    capsys.readouterr()
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    for wrong, message in (
        (arguments[:2], "--out"),
        (["--text", str(texts / "none.txt"), "--out", str(out)], "does not exist"),
        ([*arguments, "--tokenizer", "nowhere/at-all"], "could not be loaded"),
        ([*arguments, "--processes", "0"], "tokenize_processes must be at least 1"),
        ([*arguments[:-1], "0.3"], "validation_fraction 0.2, not 0.3"),
        (["--config", str(config), "--data.shardz", "x"], "did you mean 'shards'"),
        (["--config", str(config), "--data.sources", "[{type: mqar}]"], "no source has texts"),
        ([*arguments[:2], "--out", str(blocked)], "cannot be written"),
        ([*arguments, "--unknown", "1"], "unknown arguments without --config: --unknown 1"),
        ([*arguments, "--preset", "tiny"], "--preset goes with --config"),
        (["--config", "a.yaml", "--validation-fraction", "0"], "goes with --text"),
    ):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
