"""Real books through the `text` source; they lie in the folder that MEMLM_DATA names, if any."""

import os
from pathlib import Path

import pytest

from memlm.data import DataConfig, PackedDataset, load_tokenizer


@pytest.fixture
def novels() -> list[Path]:
    folder = os.environ.get("MEMLM_DATA")
    if not folder:
        pytest.skip("MEMLM_DATA is unset: no text corpora here")
    names = ("moby_dick_pg2701.txt", "pride_and_prejudice_pg1342.txt")
    return [Path(folder) / "gutenberg" / name for name in names]


def test_novels_fill_rows(novels):
    tokenizer = load_tokenizer("bytes")
    config = DataConfig(sources=[{"type": "text", "files": [str(path) for path in novels]}])
    row = PackedDataset(config, tokenizer, "train", length=4096).row(3)
    text = bytes(row["input_ids"].tolist())
    assert any(text in path.read_bytes() for path in novels)
