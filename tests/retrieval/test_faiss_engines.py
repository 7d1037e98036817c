"""What is particular to the engines of faiss."""

import sys

import pytest
import torch

from memlm.errors import UserError
from memlm.retrieval.choice import create_engine, load_engine, measure_recall
from memlm.retrieval.faiss_engines import FaissHnswEngine, FaissIvfEngine


def vectors(count, dim=8, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_the_graph_cannot_remove():
    engine = FaissHnswEngine(8)
    engine.add(vectors(10))
    with pytest.raises(UserError, match="faiss_hnsw: cannot remove entries; use exact"):
        engine.remove(torch.tensor([0]))
    assert len(engine) == 10


def test_more_candidates_find_more():
    keys, queries = vectors(3000, 32), vectors(64, 32, seed=1)
    recalls = []
    for ef_search in (1, 32, 1000):
        engine = FaissHnswEngine(32, "l2", links=8, ef_construction=40, ef_search=ef_search)
        engine.add(keys)
        recalls.append(measure_recall(engine, keys, None, queries, 4))
    assert recalls[0] < recalls[1] < recalls[2] and recalls[2] > 0.95


def test_more_lists_find_more_and_all_lists_find_all(tmp_path):
    keys, queries = vectors(3000, 32), vectors(64, 32, seed=1)
    recalls = []
    for nprobe in (1, 8, 40):
        engine = FaissIvfEngine(32, nlist=40, nprobe=nprobe)
        engine.add(keys)
        recalls.append(measure_recall(engine, keys, None, queries, 10))
        engine.save(tmp_path)
        again = load_engine(tmp_path)
        assert measure_recall(again, keys, None, queries, 10) == recalls[-1]
    assert recalls[0] < recalls[1] < recalls[2] == 1


def test_lists_need_enough_training_keys(tmp_path):
    engine = FaissIvfEngine(8, nlist=10)
    with pytest.raises(UserError, match="389 keys are too few to train 10 lists; .* least 390"):
        engine.add(vectors(389))
    with pytest.raises(UserError, match="38 keys are too few to train 1 lists; .* least 39"):
        FaissIvfEngine(8).add(vectors(38))
    with pytest.raises(UserError, match="nothing to save"):
        engine.save(tmp_path / "empty")
    assert len(engine) == 0
    engine.add(vectors(390))
    with pytest.raises(UserError, match="has entries already"):
        engine.train(vectors(390))


def test_training_apart_from_adding():
    keys, queries = vectors(2000), vectors(16, seed=1)
    engine = FaissIvfEngine(8, nprobe=1000)
    engine.train(keys[:500], entries=2000)
    for part in keys.split(300):  # fewer than training needs
        engine.add(part)
    assert len(engine) == 2000
    assert measure_recall(engine, keys, None, queries, 10) == 1


@pytest.mark.parametrize("name", ["faiss_flat", "faiss_ivf", "faiss_hnsw"])
def test_without_faiss_there_is_one_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="needs faiss: pip install faiss-cpu"):
        create_engine(name, 8)


def test_options_are_positive():
    with pytest.raises(UserError, match="faiss_ivf: nprobe is 0"):
        FaissIvfEngine(8, nprobe=0)
    with pytest.raises(UserError, match="faiss_hnsw: links is 0"):
        FaissHnswEngine(8, links=0)


@pytest.mark.parametrize("name", ["faiss_flat", "faiss_ivf", "faiss_hnsw"])
def test_keys_whose_squares_overflow_are_refused(name):
    """faiss would end the process while it places centroids."""
    large = vectors(400).double()
    for size in (1e25, 1e200):
        engine = create_engine(name, 8, "cosine")
        with pytest.raises(UserError, match=f"{name}: keys are too large"):
            engine.add(size * large)
        assert len(engine) == 0
        engine.add(vectors(400))
        assert engine.search(vectors(400)[:1], 1)[1].item() == 0
