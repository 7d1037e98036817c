"""Packed rows: every token once, targets shifted, pure in the index, mixed by weight."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.data import ByteTokenizer, DataConfig, PackedDataset
from memlm.data.corpus import Corpus, build_corpus, split_documents
from memlm.data.hashing import text_fraction
from memlm.data.text_rows import CorpusRows, PassingDocuments, StreamRows
from memlm.errors import UserError

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_token_id
FIELDS = {"input_ids", "labels", "segment_ids", "position_ids", "loss_groups"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty documents of 1 to 40 letters, each made of one letter pair of its own."""
    for number in range(40):
        pair = chr(65 + number % 26) + chr(97 + number // 26)
        (tmp_path / f"{number:02}.txt").write_text((pair * 20)[: number + 1])
    return tmp_path


def dataset(folder: Path, length: int = 16, split: str = "train", **values) -> PackedDataset:
    lanes = values.pop("lanes", 1)
    values.setdefault("sources", [{"type": "text", "files": [str(folder)]}])
    return PackedDataset(DataConfig(**values), TOKENIZER, split, length, lanes)


def make_corpus(lengths: list[int]) -> Corpus:
    """Documents whose tokens are all different, so that a token names its place."""
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    return Corpus(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def place_of(corpus: Corpus) -> dict[int, tuple[int, int]]:
    """Token to (document, position in it)."""
    return {
        int(corpus.tokens[start + i]): (document, i)
        for document, start in enumerate(corpus.starts[:-1])
        for i in range(corpus.lengths[document])
    }


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=60)
def test_an_epoch_holds_every_token_once_with_its_next_token(
    lengths: list[int], length: int, seed: int
) -> None:
    corpus = make_corpus(lengths)
    rows = CorpusRows(corpus, length, seed, end=9999, carry=False, lanes=1)
    total = sum(lengths)
    seen: list[int] = []
    for step in range(-(-total // length)):
        row = rows.row(0, step)
        for i, token in enumerate(row["input_ids"]):
            if len(seen) == total:
                break
            seen.append(int(token))
            document, position = place_of(corpus)[int(token)]
            last = position + 1 == lengths[document]
            assert row["labels"][i] == (9999 if last else token + 1)
            # A document begins where the row or the document does, and there only.
            new = i == 0 or position == 0
            assert (row["position_ids"][i] == 0) == new
            if i > 0:
                step_up = row["segment_ids"][i] - row["segment_ids"][i - 1]
                assert step_up == int(new)
    assert sorted(seen) == list(range(total))


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(0, 9),
)
@settings(max_examples=60)
def test_carried_lanes_go_on_where_the_row_before_ended(
    lengths: list[int], length: int, lanes: int, seed: int
) -> None:
    corpus = make_corpus(lengths)
    if sum(lengths) < lanes:
        with pytest.raises(UserError, match="too few"):
            CorpusRows(corpus, length, seed, end=None, carry=True, lanes=lanes)
        return
    rows = CorpusRows(corpus, length, seed, end=None, carry=True, lanes=lanes)
    part = sum(lengths) // lanes
    first_parts: list[int] = []
    for lane in range(lanes):
        stream = [rows.row(lane, step) for step in range(-(-part // length))]
        tokens = np.concatenate([row["input_ids"] for row in stream])[:part]
        positions = np.concatenate([row["position_ids"] for row in stream])[:part]
        labels = np.concatenate([row["labels"] for row in stream])[:part]
        first_parts += tokens.tolist()
        for i in range(1, part):
            if positions[i] > 0:
                assert positions[i] == positions[i - 1] + 1
                assert labels[i - 1] == tokens[i] == tokens[i - 1] + 1
            else:
                assert labels[i - 1] == -100
    # The lanes together read the first epoch once (but for what does not divide by them).
    assert len(set(first_parts)) == len(first_parts) == part * lanes


def test_rows_are_pure_functions_of_the_index(folder: Path) -> None:
    one, two = dataset(folder), dataset(folder)
    later = one.row(1000)
    for index in (0, 7, 1000):
        row = one.row(index)
        assert set(row) == FIELDS
        for name, values in two.row(index).items():
            assert values.shape == (16,)
            assert values.dtype == torch.int64
            assert torch.equal(values, row[name])
    assert torch.equal(later["input_ids"], two.row(1000)["input_ids"])
    batch = two.batch([1000, 0])
    assert torch.equal(batch["labels"], torch.stack([later["labels"], one.row(0)["labels"]]))


def test_epochs_are_shuffled_anew(folder: Path) -> None:
    data = dataset(folder)
    count = data.epoch_rows
    first, second = data.batch(range(count)), data.batch(range(count, 2 * count))
    assert not torch.equal(first["input_ids"], second["input_ids"])
    other = dataset(folder, seed=1).batch(range(count))
    assert not torch.equal(first["input_ids"], other["input_ids"])


def test_targets_at_document_ends(folder: Path) -> None:
    batch = dataset(folder).batch(range(30))
    ends = batch["labels"] == EOS
    assert ends.any()
    inside = ~ends[:, :-1]
    following = batch["input_ids"][:, 1:]
    assert torch.equal(batch["labels"][:, :-1][inside], following[inside])
    assert (batch["position_ids"][:, 1:][ends[:, :-1]] == 0).all()


def test_validation_is_apart_and_the_same_for_every_seed(folder: Path) -> None:
    texts = [path.read_text() for path in sorted(folder.iterdir())]
    train = split_documents(texts, "train", 0.3)
    held_out = split_documents(texts, "validation", 0.3)
    assert sorted(train + held_out) == sorted(texts)
    assert 4 <= len(held_out) <= 20
    # Whether a document is held out does not depend on what stands beside it.
    assert set(split_documents(texts[10:], "validation", 0.3)) <= set(held_out)
    rows = [
        dataset(folder, split="validation", seed=seed, validation_fraction=0.3).row(2)
        for seed in (0, 1)
    ]
    assert torch.equal(rows[0]["input_ids"], rows[1]["input_ids"])


def test_small_sources_still_have_both_splits() -> None:
    assert split_documents(["abcdefghij"], "train", 0.2) == ["abcdefgh"]
    assert split_documents(["abcdefghij"], "validation", 0.2) == ["ij"]
    pair = ["first", "second"]
    for fraction in (0.001, 0.999):
        parts = [split_documents(pair, split, fraction) for split in ("train", "validation")]
        assert [len(part) for part in parts] == [1, 1]


def test_splits_that_cannot_be(folder: Path) -> None:
    with pytest.raises(UserError, match="no validation split"):
        dataset(folder, split="validation", validation_fraction=0.0)
    with pytest.raises(UserError, match="'train' or 'validation'"):
        dataset(folder, split="test")
    with pytest.raises(UserError, match="holds no text"):
        build_corpus(["same", "same"], TOKENIZER, "validation", 0.5)


def test_length_changes_share_the_tokens(folder: Path) -> None:
    data = dataset(folder)
    longer = data.with_length(64)
    assert longer.row(0)["input_ids"].shape == (64,)
    assert data.row(0)["input_ids"].shape == (16,)
    first = torch.cat([data.row(i)["input_ids"] for i in range(4)])
    assert torch.equal(longer.row(0)["input_ids"], first)
    assert longer._rows[0].corpus is data._rows[0].corpus


def test_mixture_keeps_its_weights_and_loses_no_text(folder: Path) -> None:
    sources = [
        {"type": "text", "files": [str(folder)], "weight": 3},
        {"type": "mqar", "pairs": 2, "weight": 1},
    ]
    mixed, alone = dataset(folder, sources=sources), dataset(folder)
    batch = mixed.batch(range(4096))
    recall = (batch["loss_groups"] == 1).any(dim=1)
    assert int(recall.sum()) == 1024
    # Interleaved, not one source after the other.
    assert 8 <= int(recall[:64].sum()) <= 24
    # The text rows are those of the text alone, in order.
    text = batch["input_ids"][~recall]
    assert torch.equal(text, alone.batch(range(3072))["input_ids"])
    assert torch.equal(mixed.row(4099)["input_ids"], mixed.batch([4099])["input_ids"][0])


def test_carry_gives_each_lane_one_source(folder: Path) -> None:
    sources = [{"type": "text", "files": [str(folder)]}, {"type": "mqar", "pairs": 2}]
    data = dataset(folder, sources=sources, carry=True, lanes=4)
    batch = data.batch(range(40))
    recall = (batch["loss_groups"] == 1).any(dim=1).reshape(10, 4)
    assert recall.all(dim=0).tolist() == [False, False, True, True]
    assert (~recall).all(dim=0).tolist() == [True, True, False, False]
    # No synthetic row occurs twice.
    rows = batch["input_ids"].reshape(10, 4, -1)[:, 2:].reshape(20, -1)
    assert len(torch.unique(rows, dim=0)) == 20
    lane = data.batch(range(0, 40, 4))
    positions = lane["position_ids"].flatten()
    steps = positions[1:] - positions[:-1]
    assert ((steps == 1) | (positions[1:] == 0)).all()
    assert positions.max() > 16
    with pytest.raises(UserError, match="none of 1 lanes"):
        dataset(folder, sources=sources, carry=True, lanes=1)


def test_impossible_shapes(folder: Path) -> None:
    with pytest.raises(UserError, match="length and lanes"):
        dataset(folder, length=0)
    with pytest.raises(UserError, match="index must be >= 0"):
        dataset(folder).row(-1)
    small = [{"type": "stdlib"}, {"type": "mqar", "pairs": 2, "weight": 1e-6}]
    with pytest.raises(UserError, match="none of 4096 rows"):
        dataset(folder, sources=small)


def stream_rows(lanes: int, carry: bool, opened: list[int]) -> StreamRows:
    corpus = make_corpus([5, 1, 12, 3, 30, 7])

    def open_stream():
        opened.append(1)
        return (corpus.tokens[a:b] for a, b in zip(corpus.starts, corpus.starts[1:], strict=False))

    documents = PassingDocuments(open_stream)
    return StreamRows(documents, length=8, end=9999, carry=carry, lanes=lanes)


def test_streams_keep_their_order_and_wrap() -> None:
    rows = [stream_rows(1, False, []).row(0, step) for step in range(8)]
    tokens = np.concatenate([row["input_ids"] for row in rows])
    assert tokens.tolist() == [*range(58), *range(6)]
    assert rows[0]["segment_ids"].tolist() == [1, 1, 1, 1, 1, 2, 3, 3]
    assert rows[0]["labels"].tolist() == [1, 2, 3, 4, 9999, 9999, 7, 8]
    assert rows[1]["position_ids"].tolist() == [*range(8)]


@pytest.mark.parametrize(("lanes", "carry"), [(1, False), (3, True)])
def test_streams_resume_at_any_row(lanes: int, carry: bool) -> None:
    opened: list[int] = []
    through = stream_rows(lanes, carry, opened)
    rows = {(lane, step): through.row(lane, step) for step in range(9) for lane in range(lanes)}
    for place in [(0, 5), (lanes - 1, 2), (0, 8)]:
        for fresh in (stream_rows(lanes, carry, []), through):
            for name, values in fresh.row(*place).items():
                assert np.array_equal(values, rows[place][name]), (place, name)
    if carry:
        for lane in range(lanes):
            positions = np.concatenate([rows[lane, step]["position_ids"] for step in range(9)])
            assert ((np.diff(positions) == 1) | (positions[1:] == 0)).all()


def test_hub_streams_split_by_document(tmp_path: Path) -> None:
    records = [{"text": f"{i:03}" * 5} for i in range(200)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    sources = [{"type": "hub", "dataset": str(tmp_path)}]
    seen = {}
    for split in ("train", "validation"):
        data = dataset(tmp_path, 15, split, sources=sources, validation_fraction=0.2)
        rows = data.batch(range(20))["input_ids"].tolist()
        seen[split] = [TOKENIZER.decode(row) for row in rows]
        assert seen[split] == sorted(seen[split])
    assert not set(seen["train"]) & set(seen["validation"])
    # Loaded as a whole, the same documents are held out and epochs are shuffled.
    sources[0]["streaming"] = False
    data = dataset(tmp_path, 15, "train", sources=sources, validation_fraction=0.2)
    rows = [TOKENIZER.decode(row) for row in data.batch(range(20))["input_ids"].tolist()]
    assert rows != sorted(rows)
    assert not set(rows) & set(seen["validation"])


def test_streams_without_text_for_the_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one"}')
    sources = [{"type": "hub", "dataset": str(tmp_path)}]
    split = "validation" if text_fraction("one") >= 0.5 else "train"
    with pytest.raises(UserError, match="holds no text"):
        dataset(tmp_path, 15, split, sources=sources, validation_fraction=0.5).row(0)


def test_tokenizers_that_add_bos(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    (tmp_path / "a.txt").write_text("a b b")
    config = DataConfig(
        sources=[{"type": "text", "files": [str(tmp_path)]}], validation_fraction=0.0
    )
    row = PackedDataset(config, tokenizer, "train", 6).row(0)
    assert row["input_ids"].tolist() == [0, 2, 3, 3, 0, 2]
    # Without an eos token the end of a document has no target.
    assert row["labels"].tolist() == [2, 3, 3, -100, 2, 3]


def test_stdlib_rows_decode_to_source_text() -> None:
    data = PackedDataset(DataConfig(), TOKENIZER, "train", 4096)
    batch = data.batch([0, 1, 2])
    text = TOKENIZER.decode(batch["input_ids"].flatten().tolist())
    assert "def " in text
    assert "import " in text
    assert data.epoch_rows > 1000
