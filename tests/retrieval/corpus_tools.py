"""Small corpus stores for tests."""

import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from memlm.fingerprint import fingerprint
from memlm.retrieval import manifest
from memlm.retrieval.corpus_store import CorpusStore
from memlm.retrieval.vector_store import ValueSpec

PROJECTION = "0123456789abcdef" * 4
VALUES = {"next_token": ValueSpec((), torch.int32), "pair": ValueSpec((2,), torch.float32)}
SIZE = 6


def create(folder: Path, metric: str = "l2", **options) -> CorpusStore:
    options = {"values": VALUES, "key_type": "float32", **options}
    return CorpusStore.create(
        folder, key_size=SIZE, metric=metric, projection=PROJECTION, **options
    )


def entries(count: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-3, 4, (count, SIZE), generator=generator).float()  # with many ties
    values = {
        "next_token": torch.arange(count, dtype=torch.int32),
        "pair": torch.randn(count, 2, generator=generator),
    }
    return keys, values


def slices(values: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in values.items()}


def fill(store: CorpusStore, count: int, commits: tuple[int, ...], seed: int = 0) -> None:
    """Add entries, committing after each of `commits`."""
    keys, values = entries(count, seed)
    for start, stop in itertools.pairwise((0, *commits, count)):
        store.add(keys[start:stop], slices(values, slice(start, stop)))
        if stop in commits:
            store.commit()


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard-*"))


def named_files(folder: Path) -> list[str]:
    content = json.loads((folder / manifest.MANIFEST_FILE).read_text())
    return sorted(shard["file"] for shard in content["shards"])


def contents(store: CorpusStore) -> str:
    """A fingerprint of what a store gives back."""
    ids = store.search(torch.eye(SIZE), len(store))[1]
    return fingerprint({"ids": ids, **store.values})
