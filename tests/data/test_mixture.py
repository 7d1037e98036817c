"""Mixtures and lanes: shares, epochs, and the same rows however a run is shared out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.data import ByteTokenizer, DataConfig, PackedDataset
from memlm.data.corpus import Corpus
from memlm.data.text_rows import CorpusRows, PassingDocuments, StreamRows
from memlm.training.feed import RowFeed

TOKENIZER = ByteTokenizer()
WEIGHTS = {"a": 0.7, "b": 0.2, "c": 0.1}
LENGTH = 8


@pytest.fixture
def mixture(tmp_path: Path) -> PackedDataset:
    """Three sources of one letter each; the last one holds five rows, in five documents."""
    for letter in WEIGHTS:
        folder = tmp_path / letter
        folder.mkdir()
        for number in range(5 if letter == "c" else 60):
            # The second character tells the document.
            text = letter + chr(65 + number) + letter * (LENGTH - 2)
            (folder / f"{number:02}.txt").write_text(text)
    sources = [
        {"type": "text", "files": [str(tmp_path / letter)], "weight": weight}
        for letter, weight in WEIGHTS.items()
    ]
    config = DataConfig(sources=sources, validation_fraction=0.0)
    return PackedDataset(config, TOKENIZER, "train", LENGTH)


def letters(batch: dict[str, torch.Tensor]) -> np.ndarray:
    return np.asarray([chr(first) for first in batch["input_ids"][:, 0].tolist()])


def test_shares_are_exact_in_blocks_and_close_in_between(mixture: PackedDataset) -> None:
    found = letters(mixture.batch(range(3 * 4096)))
    for letter, weight in WEIGHTS.items():
        counts = np.cumsum(found == letter)
        # To a whole row in each block of 4096, and never far off on the way.
        assert np.diff(counts[4095::4096], prepend=0).tolist() == 3 * [round(weight * 4096)]
        off = np.abs(counts - weight * np.arange(1, len(counts) + 1))
        assert off.max() < 4 * np.sqrt(4096 * weight * (1 - weight)) / 2
    # Sums of the blocks, told by the sources themselves.
    assert (np.asarray([*"abc"])[mixture.sources_of(range(4096))] == found[:4096]).all()


def test_a_source_that_ends_begins_again_in_a_new_order(mixture: PackedDataset) -> None:
    batch = mixture.batch(range(1000))
    rows = batch["input_ids"][torch.from_numpy(letters(batch) == "c")][:, 1].tolist()
    epochs = [tuple(rows[start : start + 5]) for start in range(0, 90, 5)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs)) > 10


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_any_number_of_processes_reads_the_same_rows(
    mixture: PackedDataset, processes: int
) -> None:
    rows, steps = 6, (0, 1, 700)
    alone = RowFeed(mixture, rows)
    # Processes with texts and orders of their own.
    feeds = [
        RowFeed(PackedDataset(mixture.config, TOKENIZER, "train", LENGTH), rows, process, processes)
        for process in range(processes)
    ]
    for step in steps:
        whole, parts = alone.get(step), [feed.get(step) for feed in feeds]
        for name, values in whole.items():
            assert torch.equal(values, torch.cat([part[name] for part in parts]))
    for feed in (alone, *feeds):
        feed.close()


def make_corpus(lengths: list[int]) -> Corpus:
    """Documents whose tokens are all different."""
    tokens = np.arange(sum(lengths), dtype=np.int32)
    return Corpus(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def lane_documents(rows: CorpusRows | StreamRows, lane: int, steps: int) -> list[list[int]]:
    """The tokens of a lane's rows joined, then cut where positions begin again."""
    stream = [rows.row(lane, step) for step in range(steps)]
    tokens, positions, labels = (
        np.concatenate([row[name] for row in stream])
        for name in ("input_ids", "position_ids", "labels")
    )
    starts = np.flatnonzero(positions == 0)
    assert starts[0] == 0
    documents = [part.tolist() for part in np.split(tokens, starts[1:])]
    for begin, document in zip(starts, documents, strict=True):
        assert positions[begin : begin + len(document)].tolist() == [*range(len(document))]
        # Targets never reach into another document.
        assert labels[begin : begin + len(document) - 1].tolist() == document[1:]
    for row in stream:
        changes = np.diff(row["segment_ids"])
        assert (changes == (row["position_ids"][1:] == 0)).all()
    return documents


@given(st.lists(st.integers(1, 40), min_size=4, max_size=15), st.integers(1, 20), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_lanes_joined_give_the_documents_again(lengths: list[int], length: int, lanes: int) -> None:
    corpus = make_corpus(lengths)
    if sum(lengths) < lanes:
        return
    rows = CorpusRows(corpus, length, seed=3, end=None, carry=True, lanes=lanes)
    steps = -(-rows.part // length)
    found: list[int] = []
    for lane in range(lanes):
        pieces = lane_documents(rows, lane, steps)
        found += [token for piece in pieces for token in piece][: rows.part]
    order, _ = rows._epoch(0)
    whole = [t for d in order for t in range(corpus.starts[d], corpus.starts[d + 1])]
    assert found == whole[: rows.part * lanes]


@given(st.lists(st.integers(1, 40), min_size=2, max_size=15), st.integers(1, 20), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_lanes_of_a_stream_hold_whole_documents(
    lengths: list[int], length: int, lanes: int
) -> None:
    corpus = make_corpus(lengths)

    def open_stream():
        return (corpus.tokens[a:b] for a, b in zip(corpus.starts, corpus.starts[1:], strict=False))

    rows = StreamRows(PassingDocuments(open_stream), length, None, carry=True, lanes=lanes)
    steps = -(-2 * sum(lengths) // (length * lanes)) + 1
    whole = [list(range(a, b)) for a, b in zip(corpus.starts, corpus.starts[1:], strict=False)]
    for lane in range(lanes):
        *documents, _ = lane_documents(rows, lane, steps)
        assert all(document in whole for document in documents)
    if lanes == 1:
        documents = lane_documents(rows, 0, steps)[:-1]
        assert documents == [whole[i % len(whole)] for i in range(len(documents))]


def test_lanes_that_are_read_elsewhere_are_not_kept() -> None:
    corpus = make_corpus([7] * 1000)

    def open_stream():
        return (corpus.tokens[a:b] for a, b in zip(corpus.starts, corpus.starts[1:], strict=False))

    documents = PassingDocuments(open_stream)
    rows = StreamRows(documents, 10, None, carry=True, lanes=8)
    for step in range(80):
        rows.row(0, step)
        assert len(documents._kept) <= 3 * 8


@pytest.mark.parametrize("kind", ["text", "hub"])
def test_lanes_are_cut_anew_for_another_number_of_processes(kind: str, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(f"{number:02}" * (5 + number))
    source = {"type": "text", "files": [str(tmp_path)]}
    if kind == "hub":
        source = {"type": "hub", "dataset": str(tmp_path), "column": "text"}
    config = DataConfig(sources=[source], validation_fraction=0.0, carry=True)
    lanes, length = 4, 12
    rows = {}
    for processes in (1, 2, 4):
        shares = []
        for process in range(processes):
            data = PackedDataset(config, TOKENIZER, "train", length, lanes)
            feed = RowFeed(data, lanes, process, processes)
            # One process begins late, as a run that goes on.
            shares.append([feed.get(step) for step in range(3 if process else 0, 6)][-3:])
            feed.close()
        for step in range(3):
            for name in shares[0][0]:
                joined = torch.cat([share[step][name] for share in shares])
                assert torch.equal(rows.setdefault((step, name), joined), joined)
