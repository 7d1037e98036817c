"""What every retrieval engine keeps to, and the exact one: entries come, go, are saved, found."""

import json
import logging

import pytest
import torch

from memlm.cuda import topk_search
from memlm.errors import UserError
from memlm.retrieval import choice, exact_engine
from memlm.retrieval.choice import (
    ENGINES,
    build_engine,
    choose_engine,
    create_engine,
    load_engine,
    measure_recall,
    recall_of,
)
from memlm.retrieval.exact_engine import ExactEngine
from tests.memory.processes import run_processes

METRICS = ("dot", "l2", "cosine")
REMOVING = [name for name in ENGINES if name != "faiss_hnsw"]


def vectors(count, dim=8, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def some_engine(name, metric="dot", dim=8):
    """An engine that reads all of a small store, so that approximate ones find the best too."""
    options = {"faiss_ivf": {"nprobe": 1000}, "faiss_hnsw": {"ef_search": 400}}
    return create_engine(name, dim, metric, **options.get(name, {}))


def expected(queries, keys, ids, k, metric):
    scores, places = topk_search(queries[None], keys[None], k, metric)
    return scores[0], ids[places[0]]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ENGINES)
def test_finds_the_best_with_scores_on_one_scale(name, metric):
    engine = some_engine(name, metric)
    keys, queries = vectors(300) * torch.linspace(0.5, 2, 300)[:, None], vectors(7, seed=1)
    ids = torch.arange(300) * 3 + 5
    assert engine.add(keys[:200], ids[:200]).equal(ids[:200])
    engine.add(keys[200:], ids[200:])
    scores, found = engine.search(queries, 6)
    best, best_ids = expected(queries, keys, ids, 6, metric)
    assert len(engine) == 300 and engine.ids.equal(ids)
    assert scores.dtype == torch.float32 and found.dtype == torch.int64
    torch.testing.assert_close(scores, best, rtol=1e-4, atol=1e-4)
    assert found.equal(best_ids)
    assert engine.nbytes >= 300 * (8 * 4 + 8)


@pytest.mark.parametrize("name", ENGINES)
def test_fewer_entries_than_asked_for_are_padded(name):
    engine = some_engine(name)
    for _ in range(2):
        scores, ids = engine.search(vectors(3), 60)
        count = len(engine)
        assert (ids[:, count:] == -1).all() and (scores[:, count:] == -torch.inf).all()
        assert ids[:, :count].sort(1).values.equal(torch.arange(count).expand(3, count))
        assert scores[:, :count].isfinite().all() and (scores[:, :count].diff(dim=1) <= 0).all()
        engine.add(vectors(45) if not count else vectors(0))
    scores, ids = engine.search(vectors(0), 4)
    assert scores.shape == ids.shape == (0, 4)


@pytest.mark.parametrize("name", REMOVING)
def test_what_is_removed_is_never_found_and_ids_stay(name):
    engine = some_engine(name)
    keys, queries = vectors(400), vectors(9, seed=1)
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(2))[:400]
    engine.add(keys, ids)
    gone = ids[::3]
    engine.remove(gone)
    kept = torch.isin(ids, gone, invert=True)
    assert len(engine) == int(kept.sum())
    scores, found = engine.search(queries, 5)
    best, best_ids = expected(queries, keys[kept], ids[kept], 5, "dot")
    torch.testing.assert_close(scores, best)
    assert found.equal(best_ids)
    # All of them are asked for: none of the removed ones is among them.
    assert not torch.isin(engine.search(queries, 400)[1], gone).any()

    with pytest.raises(UserError, match="no entry has the id"):
        engine.remove(torch.tensor([int(ids[1]), int(gone[0])]))
    assert len(engine) == int(kept.sum())
    engine.add(keys[:1], gone[:1])
    assert (engine.search(keys[:1], 400)[1] == gone[0]).any()


@pytest.mark.parametrize("name", ENGINES)
def test_ids_follow_the_highest_ever_stored(name, tmp_path):
    engine = some_engine(name)
    engine.add(vectors(50), torch.arange(50) + 100)
    assert engine.add(vectors(2)).tolist() == [150, 151]
    if name in REMOVING:
        engine.remove(torch.tensor([151]))
    engine.save(tmp_path)
    assert load_engine(tmp_path).add(vectors(1)).tolist() == [152]


def test_no_id_exceeds_an_int64():
    engine = ExactEngine(8)
    engine.add(vectors(1), torch.tensor([(1 << 63) - 1]))
    with pytest.raises(UserError, match="no ids are left after 9223372036854775807"):
        engine.add(vectors(1))
    engine.add(vectors(1), torch.tensor([7]))
    assert engine.ids.tolist() == [7, (1 << 63) - 1]


@pytest.mark.parametrize("wrong", [torch.ones(20).bool(), torch.tensor([1.5])])
def test_ids_to_remove_are_whole_numbers(wrong):
    engine = ExactEngine(8)
    engine.add(vectors(20))
    with pytest.raises(UserError, match=f"exact: ids to remove must be int64, not {wrong.dtype}"):
        engine.remove(wrong)
    assert len(engine) == 20


@pytest.mark.parametrize("name", ENGINES)
def test_built_over_nothing(name, caplog):
    with caplog.at_level(logging.INFO):
        engine = build_engine(name, vectors(0))
    assert engine.search(vectors(2), 3)[1].eq(-1).all()
    assert ("exact" if engine.exact else "recall not measured") in caplog.text


@pytest.mark.parametrize("name", ENGINES)
def test_entries_that_cannot_be_stored(name):
    engine = some_engine(name)
    engine.add(vectors(60))
    broken = vectors(2)
    broken[1, 3] = torch.nan
    for keys, ids, message in (
        (vectors(2), torch.tensor([60, 59]), "id 59 is there already"),
        (vectors(2), torch.tensor([70, 70]), "id 70 is there already"),
        (vectors(2), torch.tensor([-1, 70]), "id -1 is negative"),
        (vectors(2), torch.tensor([1]), r"ids must be int64 \[2\]"),
        (vectors(2), torch.tensor([70.0, 71.0]), "ids must be int64"),
        (vectors(2, 5), None, r"keys must be floating point \[\*, 8\]"),
        (broken, None, "NaN or infinity"),
    ):
        with pytest.raises(UserError, match=f"{name}: .*{message}"):
            engine.add(keys, ids)
    assert len(engine) == 60 and engine.add(vectors(1)).tolist() == [60]
    with pytest.raises(UserError, match="queries must be"):
        engine.search(vectors(2, 5), 1)
    with pytest.raises(UserError, match="k = 0"):
        engine.search(vectors(2), 0)


def find(folder):
    """What each engine in a folder finds, as lines."""
    queries, lines = vectors(9, seed=1), []
    for saved in sorted(folder.iterdir()):
        for mapped in (False, True):
            found = load_engine(saved, memory_map=mapped).search(queries, 5)
            bits = [part.view(torch.int32).tolist() for part in found]
            lines.append(f"{saved.name} {mapped} {bits}")
    return lines


def test_saved_and_loaded_in_another_process_finds_bit_for_bit_the_same(tmp_path):
    expected_lines = []
    for name in ENGINES:
        for metric in METRICS:
            folder = tmp_path / f"{name}-{metric}"
            engine = some_engine(name, metric)
            engine.add(vectors(300), torch.arange(300).flip(0) * 7)
            engine.save(folder)
            engine.save(folder)  # in the place of the first
            assert len(list(folder.glob("shard-*"))) == 1
            found = engine.search(vectors(9, seed=1), 5)
            bits = [part.view(torch.int32).tolist() for part in found]
            expected_lines += [f"{folder.name} {mapped} {bits}" for mapped in (False, True)]
    (lines,) = run_processes(1, find, tmp_path)
    assert lines == sorted(expected_lines, key=lambda line: line.split()[:2])


def write(folder):
    """How each memory-mapped engine of a folder refuses changes, and what it still finds."""
    lines = []
    for saved in folder.iterdir():
        engine = load_engine(saved, memory_map=True)
        for change, given in ((engine.add, torch.ones(1, 8)), (engine.remove, engine.ids[:1])):
            try:
                change(given)
            except UserError as error:
                lines.append(str(error))
        found = engine.search(torch.ones(1, 8), 100)[1]
        lines.append(f"{len(engine)} {int((found >= 0).sum())}")
    return lines


def test_memory_mapped_engines_are_read_only(tmp_path):
    for name in ENGINES:
        engine = some_engine(name)
        engine.add(vectors(100))
        engine.save(tmp_path / name)
    # In another process: were faiss to see what is asked here, the process would abort.
    (lines,) = run_processes(1, write, tmp_path)
    reason = "a memory-mapped engine; load it with memory_map=False"
    for name in ENGINES:
        assert f"{name}: cannot add entries to {reason}" in lines
        if name in REMOVING:
            assert f"{name}: cannot remove entries from {reason}" in lines
    assert lines.count("100 100") == len(ENGINES)


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("name", ENGINES)
def test_damaged_files_are_refused(name, memory_map, tmp_path):
    engine = some_engine(name)
    engine.add(vectors(100))
    engine.save(tmp_path)
    (path,) = tmp_path.glob("shard-*")
    intact = path.read_bytes()
    flipped = bytearray(intact)
    flipped[len(flipped) // 2] ^= 1
    for data, message in ((flipped, "altered"), (intact[:-4], "truncated or altered")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            load_engine(tmp_path, memory_map=memory_map)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        load_engine(tmp_path, memory_map=memory_map)
    path.write_bytes(intact)
    assert len(load_engine(tmp_path, memory_map=memory_map)) == 100


def test_another_engines_folder_is_refused(tmp_path):
    engine = some_engine("exact")
    engine.add(vectors(10))
    engine.save(tmp_path)
    with pytest.raises(UserError, match="holds the engine exact, not faiss_flat"):
        ENGINES["faiss_flat"].load(tmp_path)
    with pytest.raises(UserError, match="no such store"):
        load_engine(tmp_path / "nothing")
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "another"}))
    with pytest.raises(UserError, match="not the manifest of a store"):
        load_engine(tmp_path)
    with pytest.raises(UserError, match="not the manifest of a store"):
        engine.save(tmp_path)


# --- exact ---


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(exact_engine, "BLOCK", 16)


def test_ties_go_to_the_lowest_id_in_whatever_order_entries_came(small_blocks):
    engine = ExactEngine(4)
    ids = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    for part in ids.split(7):
        engine.add(torch.ones(len(part), 4), part)
    scores, found = engine.search(torch.ones(2, 4), 40)
    assert found.equal(torch.arange(40).expand(2, 40)) and (scores == 4).all()
    engine.remove(torch.arange(0, 100, 2))
    assert engine.search(torch.ones(1, 4), 40)[1].tolist() == [list(range(1, 81, 2))]


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 2e-3), ("int8", 2e-2)])
@pytest.mark.parametrize("metric", METRICS)
def test_smaller_keys_are_searched_as_they_were_rounded(
    small_blocks, metric, dtype, largest, tmp_path
):
    engine = ExactEngine(8, metric, dtype)
    keys, queries = vectors(50), vectors(5, seed=1)
    keys[3] = 0
    engine.add(keys[:30])
    engine.add(keys[30:])
    scores, ids = engine.search(queries, 50)
    exact = topk_search(queries[None], keys[None], 50, metric)
    by_id = torch.empty_like(scores).scatter(1, ids, scores)
    wanted = torch.empty_like(scores).scatter(1, exact[1][0], exact[0][0])
    error = (by_id - wanted).abs().max() / wanted.abs().max()
    assert 0 < error < largest
    assert engine.nbytes < ExactEngine.nbytes.fget(_full(keys))
    engine.save(tmp_path)
    for mapped in (False, True):
        again = load_engine(tmp_path, memory_map=mapped).search(queries, 50)
        assert again[0].equal(scores) and again[1].equal(ids)


def _full(keys):
    engine = ExactEngine(8)
    engine.add(keys)
    return engine


def test_values_beyond_a_type_are_refused():
    engine = ExactEngine(2, dtype="float16")
    with pytest.raises(UserError, match="too large for float16"):
        engine.add(torch.full((1, 2), 1e5))
    assert len(engine) == 0
    for name in ("float32", "int8"):
        with pytest.raises(UserError, match=f"too large for {name}"):
            ExactEngine(2, dtype=name).add(torch.full((1, 2), 1e300, dtype=torch.float64))
    with pytest.raises(UserError, match="dtype 'float61' .* did you mean 'float16'"):
        ExactEngine(2, dtype="float61")


def test_several_shards(small_blocks, monkeypatch, tmp_path):
    monkeypatch.setattr(exact_engine, "SHARD_BYTES", 1000)
    engine = ExactEngine(8)
    engine.add(vectors(100))
    engine.save(tmp_path)
    assert len(list(tmp_path.glob("shard-*"))) > 2
    found = engine.search(vectors(4, seed=1), 9)
    for mapped in (False, True):
        again = load_engine(tmp_path, memory_map=mapped).search(vectors(4, seed=1), 9)
        assert again[0].equal(found[0]) and again[1].equal(found[1])


# --- choice ---


def test_what_auto_takes():
    assert choose_engine(262_144, static=True) == "exact"
    assert choose_engine(262_145, static=True) == "faiss_ivf"
    assert choose_engine(10_000_000, static=False) == "exact"


def test_auto_logs_the_recall_it_measured(monkeypatch, caplog):
    keys, queries = vectors(2000), vectors(50, seed=1)
    caplog.set_level(logging.INFO, "memlm.retrieval")
    assert build_engine("auto", keys).name == "exact"
    assert "exact, 2000 entries" in caplog.text
    monkeypatch.setattr(choice, "EXACT_LIMIT", 1000)
    ids = torch.arange(2000) + 7
    engine = build_engine("auto", keys, ids, queries=queries, k=10, nprobe=2)
    found = engine.search(queries, 10)[1]
    best = expected(queries, keys, ids, 10, "dot")[1]
    pairs = zip(found, best, strict=True)
    recall = sum(len({*a.tolist()} & {*b.tolist()}) for a, b in pairs) / 500
    assert 0.1 < recall < 0.95  # two lists of many: some are missed
    assert f"faiss_ivf, 2000 entries, recall@10 {recall:.4f} of 50 queries" in caplog.text
    assert measure_recall(build_engine("exact", keys), keys, None, queries, 10) == 1


def test_recall_counts_copies_as_good_as_the_last_of_the_best():
    scores, none = torch.tensor([[5.0, 3.0, 3.0], [2.0, -torch.inf, -torch.inf]]), -torch.inf
    best = scores, torch.tensor([[0, 4, 7], [1, -1, -1]])
    for found_scores, ids, recall in (
        ([[5.0, 3.0, 3.0], [2.0, none, none]], [[0, 7, 4], [1, -1, -1]], 1),
        ([[5.0, 3.0, 2.9999995], [2.0, none, none]], [[0, 8, 9], [1, -1, -1]], 1),
        ([[5.0, 3.0, 2.999], [none, none, none]], [[0, 8, 9], [-1, -1, -1]], 2 / 4),
        ([[3.0, 3.0, none], [1.0, none, none]], [[8, 9, -1], [5, -1, -1]], 2 / 4),
    ):
        found = torch.tensor(found_scores), torch.tensor(ids)
        assert recall_of(best, found) == recall
    copies = vectors(10).repeat(40, 1)
    engine = some_engine("faiss_flat", "l2")
    engine.add(copies)
    assert measure_recall(engine, copies, None, copies[:10], 5) == 1


def test_names_and_options_that_are_not_there():
    with pytest.raises(UserError, match="'faiss_hnws'; did you mean 'faiss_hnsw'"):
        create_engine("faiss_hnws", 8)
    with pytest.raises(UserError, match="'atuo'; did you mean 'auto'"):
        build_engine("atuo", vectors(10))
    with pytest.raises(UserError, match="exact: .*unexpected keyword argument 'nprobe'"):
        build_engine("exact", vectors(10), nprobe=3)
    with pytest.raises(UserError, match="metric 'dott'.* did you mean 'dot'"):
        create_engine("exact", 8, "dott")
    with pytest.raises(UserError, match="dim is 0"):
        create_engine("exact", 0)
