import json
import re
import shutil

import pytest
import torch

from memlm.cuda.topk_search import quantize_keys, topk_search
from memlm.errors import UserError
from memlm.retrieval import choice, corpus_store, manifest
from memlm.retrieval.corpus_search import search_parts
from memlm.retrieval.corpus_store import CorpusStore
from tests.retrieval.corpus_tools import (
    PROJECTION,
    SIZE,
    contents,
    create,
    entries,
    files_of,
    fill,
    named_files,
    slices,
)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(corpus_store, "SHARD_BYTES", 1000)


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("key_type", ["float32", "float16", "int8"])
def test_searches_base_and_tail_as_one_store(tmp_path, metric, key_type):
    store = create(tmp_path, metric, key_type=key_type)
    fill(store, 200, (70, 71, 150))
    assert len(store) == 200 and len(files_of(tmp_path)) == 3
    keys, values = entries(200)
    queries = torch.randn(30, SIZE, generator=torch.Generator().manual_seed(1))
    scales = None
    if key_type == "int8":
        keys, scales = (part[None] for part in quantize_keys(keys))
    else:
        keys = keys.to(getattr(torch, key_type))[None]
    expected = topk_search(queries[None], keys, 9, metric, scales=scales)
    scores, ids = store.search(queries, 9)
    assert torch.equal(scores, expected[0][0])
    assert torch.equal(ids, expected[1][0])
    assert torch.equal(store.take("next_token", ids).long(), ids)
    assert torch.equal(store.take("pair", ids), values["pair"][ids])
    assert store.take("next_token", ids[0, 0]).item() == ids[0, 0]
    assert torch.equal(store.values["pair"], values["pair"])


def test_fewer_entries_than_asked_for(tmp_path):
    store = create(tmp_path)
    scores, ids = store.search(torch.zeros(2, SIZE), 3)
    assert (scores == -torch.inf).all() and (ids == -1).all() and scores.shape == (2, 3)
    assert store.values["pair"].shape == (0, 2)
    fill(store, 2, (1,))
    scores, ids = store.search(torch.zeros(2, SIZE), 3)
    assert (ids >= 0).tolist() == [[True, True, False]] * 2
    assert store.take("next_token", ids)[0, 2] == 0
    assert store.search(torch.zeros(0, SIZE), 3)[1].shape == (0, 3)


def test_comes_back(tmp_path):
    with create(tmp_path, source={"text": "a"}) as store:
        fill(store, 90, (40,))
        store.commit({"documents": 3}, {"state": torch.tensor([1.5])})
        expected = contents(store)
    loaded = CorpusStore.open(tmp_path, projection=PROJECTION, metric="l2", verify=True)
    assert contents(loaded) == expected
    assert loaded.progress == {"documents": 3}
    assert loaded.progress_tensors["state"].tolist() == [1.5]
    assert loaded.layout.source == {"text": "a"}
    with CorpusStore.open(tmp_path, read_only=False) as again:
        assert contents(again) == expected
        again.commit()
        assert again.progress == {"documents": 3} and again.progress_tensors == {}
    assert files_of(tmp_path) == named_files(tmp_path)


def test_a_note_comes_back_as_json_has_it(tmp_path):
    store = create(tmp_path)
    store.commit({"sizes": {2: (1, 2), 10: None}})
    for verify in (False, True):
        again = CorpusStore.open(tmp_path, verify=verify)
        assert again.progress == {"sizes": {"2": [1, 2], "10": None}}


def test_what_was_not_committed_is_not_written(tmp_path):
    with create(tmp_path) as store:
        fill(store, 90, (40,))
    assert len(store) == 90
    assert len(CorpusStore.open(tmp_path)) == 40


def test_a_key_that_was_added_is_found_at_once(tmp_path):
    store = create(tmp_path)
    for number in range(20):
        (added,) = store.add(
            torch.full((1, SIZE), float(number)), slices(entries(20)[1], slice(number, number + 1))
        )
        assert store.search(torch.full((1, SIZE), float(number)), 1)[1].item() == added == number
        if number % 7 == 3:
            store.commit()


def test_read_only_refuses_to_write(tmp_path):
    with create(tmp_path) as store:
        fill(store, 10, (10,))
    reader = CorpusStore.open(tmp_path)
    before = files_of(tmp_path)
    keys, values = entries(1)
    for action, name in (
        (lambda: reader.add(keys, values), "add"),
        (lambda: reader.remove(torch.tensor([0])), "remove"),
        (reader.commit, "commit"),
        (reader.compact, "compact"),
        (reader.build_index, "build an index"),
    ):
        with pytest.raises(UserError, match=f"opened read-only, so it cannot {name}$"):
            action()
    assert files_of(tmp_path) == before and len(reader) == 10


def test_one_writer_at_a_time(tmp_path):
    store = create(tmp_path)
    with pytest.raises(UserError, match="another writer has this store open"):
        CorpusStore.open(tmp_path, read_only=False)
    CorpusStore.open(tmp_path)
    store.close()
    CorpusStore.open(tmp_path, read_only=False).close()
    with pytest.raises(UserError, match="there is a manifest.json already"):
        create(tmp_path)
    CorpusStore.open(tmp_path, read_only=False).close()  # the refusals left no lock behind


@pytest.mark.parametrize("key_type, entry", [("float32", 36), ("float16", 24), ("int8", 22)])
def test_budget(tmp_path, key_type, entry):
    store = create(tmp_path, key_type=key_type, max_bytes=10 * entry + entry - 1)
    assert store.layout.bytes_per_entry == entry
    fill(store, 9, (5,))
    keys, values = entries(2)
    with pytest.raises(UserError, match=f"11 entries of {entry} bytes exceed max_bytes = .* 10$"):
        store.add(keys, values)
    assert len(store) == 9
    store.add(keys[:1], slices(values, slice(1)))
    store.commit()
    shards = manifest.shards_of(json.loads((tmp_path / manifest.MANIFEST_FILE).read_text()))
    data = [manifest.read_shard(tmp_path, shard, verify=True) for shard in shards]
    assert sum(column.nbytes for part in data for column in part.values()) == 10 * entry
    # Removed entries count until their room is given back.
    store.remove(torch.arange(5))
    with pytest.raises(UserError, match="exceed max_bytes"):
        store.add(keys, values)
    store.compact()
    store.add(keys, values)
    store.close()
    with CorpusStore.open(tmp_path, read_only=False) as store, pytest.raises(UserError, match="10"):
        store.add(*entries(9))


def test_refuses_entries_that_do_not_fit(tmp_path):
    store = create(tmp_path, key_type="float16")
    keys, values = entries(3)
    for bad_keys, bad_values, message in (
        (keys[:, 1:], values, r"keys must be floating point \[N, 6\], not \[3, 5\]"),
        (keys.long(), values, "not .* of torch.int64"),
        (keys * 1e5, values, "not finite as float16"),
        (keys, {"pair": values["pair"]}, "an entry has the values next_token, pair, not pair"),
        (keys, {**values, "pair": values["pair"][:2]}, r"'pair' must be \[3, 2\]"),
        (keys, {**values, "next_token": values["next_token"].long()}, "of torch.int32, not"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            store.add(bad_keys, bad_values)
        assert str(tmp_path) in str(refused.value)
    assert len(store) == 0
    with pytest.raises(UserError, match=r"queries must be \[N, 6\], not \[3, 5\]"):
        store.search(keys[:, 1:], 1)
    with pytest.raises(UserError, match="no value 'next_tokn'; did you mean 'next_token'"):
        store.take("next_tokn", torch.tensor([0]))
    with pytest.raises(UserError, match="did you mean 'float16'"):
        create(tmp_path / "other", key_type="flat16")
    assert not (tmp_path / "other").exists()


def test_removed_entries_are_never_found(tmp_path):
    store = create(tmp_path)
    fill(store, 60, (20, 45))
    gone = torch.tensor([0, 19, 20, 44, 45, 59, 7, 7])
    store.remove(gone)
    for moment in ("added", "committed", "opened"):
        if moment == "committed":
            store.commit()
        if moment == "opened":
            store.close()
            store = CorpusStore.open(tmp_path, read_only=False)
        found = store.search(torch.eye(SIZE), 60)[1]
        assert set(found[0].tolist()) == set(range(60)) - set(gone.tolist()) | {-1}, moment
    store.add(*entries(3))
    store.remove(torch.tensor([60]))
    store.commit()
    left = set(CorpusStore.open(tmp_path).search(torch.eye(SIZE), 63)[1][0].tolist())
    assert left == set(range(63)) - set(gone.tolist()) - {60} | {-1}
    assert files_of(tmp_path) == named_files(tmp_path)
    with pytest.raises(UserError, match=r"ids to remove must be int64 in 0 .. 62"):
        store.remove(torch.tensor([63]))
    for wrong in (torch.ones(63).bool(), torch.tensor([1.5]), torch.tensor([[1]])):
        with pytest.raises(UserError, match=r"ids to remove must be int64 in 0 .. 62"):
            store.remove(wrong)


def test_compaction(tmp_path, small_shards):
    store = create(tmp_path)
    fill(store, 130, (10, 12, 50, 90))
    keys, values = entries(130)
    gone = torch.arange(0, 130, 3)
    kept = torch.tensor([index for index in range(130) if index % 3])
    store.remove(gone)
    store.commit()
    reader = CorpusStore.open(tmp_path)
    before = contents(reader)
    store.compact()
    assert len(store) == len(kept) == 86
    assert len(files_of(tmp_path)) == 4  # 27 entries of 36 bytes in each
    assert files_of(tmp_path) == named_files(tmp_path)
    assert torch.equal(store.values["pair"], values["pair"][kept])
    expected = topk_search(torch.eye(SIZE)[None], keys[kept][None], 20, "l2")
    for opened in (store, CorpusStore.open(tmp_path, verify=True)):
        scores, ids = opened.search(torch.eye(SIZE), 20)
        assert torch.equal(scores, expected[0][0]) and torch.equal(ids, expected[1][0])
    assert contents(reader) == before  # its files are gone, its pages are not


def test_compaction_of_everything(tmp_path):
    store = create(tmp_path)
    fill(store, 5, (5,))
    store.remove(torch.arange(5))
    store.compact()
    assert len(store) == 0 and files_of(tmp_path) == []
    assert (store.search(torch.eye(SIZE), 2)[1] == -1).all()


def test_what_could_not_be_written_leaves_the_store(tmp_path, monkeypatch):
    store = create(tmp_path)
    fill(store, 50, (50,))
    store.build_index("faiss_flat")
    fill(store, 7, (), seed=1)
    expected = store.search(torch.eye(SIZE), 9)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "save_file", full)
        for action in (store.commit, store.compact, store.build_index):
            with pytest.raises(OSError, match="No space left"):
                action()
            assert store.engine == "faiss_flat" and len(store) == 57
            assert all(map(torch.equal, store.search(torch.eye(SIZE), 9), expected))
            assert len(CorpusStore.open(tmp_path, verify=True, engine="faiss_flat")) == 50
    store.commit()
    again = CorpusStore.open(tmp_path, verify=True, engine="faiss_flat")
    assert all(map(torch.equal, again.search(torch.eye(SIZE), 9), expected))
    assert files_of(tmp_path) == named_files(tmp_path)


def test_large_commits_are_cut_into_shards(tmp_path, small_shards):
    store = create(tmp_path)
    fill(store, 100, (100,))
    assert len(files_of(tmp_path)) == 4
    assert torch.equal(store.values["pair"], entries(100)[1]["pair"])


@pytest.mark.parametrize("engine", ["faiss_flat", "faiss_ivf", "faiss_hnsw"])
@pytest.mark.parametrize(
    "key_type, metric", [("float32", "l2"), ("float16", "dot"), ("int8", "l2")]
)
def test_an_index_and_the_entries_added_after_it(tmp_path, caplog, engine, key_type, metric):
    store = create(tmp_path, metric, key_type=key_type)
    keys, values = torch.randn(500, SIZE), entries(500)[1]
    store.add(keys[:400], slices(values, slice(400)))
    with caplog.at_level("INFO"):
        store.build_index(engine)
    recall = float(re.search(r"retrieval: .*, 400 entries, recall@32 (\S+) of", caplog.text)[1])
    assert recall > 0.9 and store.index["recall"] == pytest.approx(recall, abs=1e-4)
    assert store.engine == engine and len(list(tmp_path.glob("index-*"))) == 1
    store.add(keys[400:450], slices(values, slice(400, 450)))
    store.commit()
    store.add(keys[450:], slices(values, slice(450, 500)))
    queries = torch.randn(64, SIZE)
    exact = CorpusStore.open(tmp_path)
    assert exact.engine == "exact"
    reader = CorpusStore.open(tmp_path, engine="auto", verify=True)
    assert reader.engine == engine and reader.read_only
    for opened in (store, reader):
        truth = search_parts(queries, opened._parts(), 9, metric, None)[1]
        scores, ids = opened.search(queries, 9)
        assert (truth[:, :, None] == ids[:, None]).any(-1).float().mean() > 0.9
        assert (scores[:, :-1] >= scores[:, 1:]).all()
        assert set(range(len(opened))) >= set(ids.flatten().tolist())
        assert ids.max() >= 400
    # Compaction and removal number or hide entries anew: the index is given up.
    store.remove(torch.tensor([5]))
    assert store.engine == "exact"
    store.commit()
    assert not list(tmp_path.glob("index-*"))
    assert CorpusStore.open(tmp_path, engine="auto").engine == "exact"
    assert reader.engine == engine and len(reader.search(queries, 9)[1]) == 64


def test_files_that_were_moved_to_another_disk(tmp_path):
    store = create(tmp_path / "store")
    fill(store, 50, (50,))
    store.build_index("faiss_flat")
    index = tmp_path / "store" / store.index["folder"]
    shutil.move(index, tmp_path / "elsewhere")
    index.symlink_to(tmp_path / "elsewhere")
    expected = CorpusStore.open(tmp_path / "store", engine="faiss_flat").search(torch.eye(SIZE), 9)
    assert all(map(torch.equal, store.search(torch.eye(SIZE), 9), expected))
    store.build_index("faiss_flat")
    assert not index.is_symlink() and list((tmp_path / "elsewhere").iterdir())  # not ours to empty


def test_an_index_over_what_was_not_removed(tmp_path):
    store = create(tmp_path)
    fill(store, 200, (100,))
    store.remove(torch.arange(0, 200, 2))
    store.build_index("faiss_flat")
    found = CorpusStore.open(tmp_path, engine="faiss_flat").search(torch.eye(SIZE), 100)[1]
    assert (found % 2 == 1).all()
    store.build_index("exact")
    assert not list(tmp_path.glob("index-*")) and store.engine == "exact"


def test_auto_is_exact_until_exact_is_slower(tmp_path, monkeypatch):
    store = create(tmp_path)
    fill(store, 300, ())
    store.build_index()
    assert store.engine == "exact" and not list(tmp_path.glob("index-*"))
    monkeypatch.setattr(choice, "EXACT_LIMIT", 299)
    store.build_index()
    assert store.engine == "faiss_ivf"


def test_refuses_an_index_that_there_is_not(tmp_path):
    store = create(tmp_path)
    with pytest.raises(UserError, match="no retrieval engine 'faiss_flt'"):
        store.build_index("faiss_flt")  # of an empty store too
    fill(store, 50, (50,))
    with pytest.raises(UserError, match="has no index, not one of 'faiss_ivf'; make one with"):
        CorpusStore.open(tmp_path, engine="faiss_ivf")
    store.build_index("faiss_flat")
    with pytest.raises(UserError, match="has an index of faiss_flat, not one of 'faiss_hnsw'"):
        CorpusStore.open(tmp_path, engine="faiss_hnsw")
    with pytest.raises(UserError, match="no retrieval engine 'faiss_flt'; did you mean 'faiss_fla"):
        store.build_index("faiss_flt")
    path = next(tmp_path.glob("index-*/shard-*"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    with pytest.raises(UserError, match="altered since it was written"):
        CorpusStore.open(tmp_path, engine="auto", verify=True)
    CorpusStore.open(tmp_path)
