import dataclasses
import hashlib
import itertools
import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from memlm.errors import UserError
from memlm.fingerprint import fingerprint
from memlm.memory.segment_store import SegmentStore
from memlm.retrieval import manifest
from memlm.retrieval.corpus_store import CorpusStore
from memlm.retrieval.store_files import load_store, save_store
from memlm.retrieval.vector_store import ValueSpec, VectorStore
from tests.memory.processes import run_processes
from tests.retrieval.killed import killed_after, killed_at

PROJECTION = "0123456789abcdef" * 4
OTHER = "f" * 64


def make_store(
    seed: int, batch_size: int = 3, capacity: int = 11, written: int = 17, **options
) -> VectorStore:
    """A store whose rows wrote different numbers of entries, some of them round the ring."""
    generator = torch.Generator().manual_seed(seed)
    values = (ValueSpec((2, 3), torch.float32), ValueSpec((), torch.int32))
    store = VectorStore.empty(batch_size, capacity, 4, values=values, **options)
    positions = torch.arange(written).expand(batch_size, -1)
    lengths = torch.randint(1, written + 1, (batch_size,), generator=generator)
    return store.write(
        torch.randn(batch_size, written, 4, generator=generator),
        positions,
        valid=positions < lengths[:, None],
        values=(
            torch.randn(batch_size, written, 2, 3, generator=generator),
            torch.randint(9, (batch_size, written), generator=generator, dtype=torch.int32),
        ),
    )


def same(one: VectorStore, other: VectorStore) -> bool:
    return fingerprint(one.tensors()) == fingerprint(other.tensors())


def save(store: VectorStore, folder: Path, **options) -> None:
    save_store(store, folder, metric="dot", projection=PROJECTION, **options)


def load(folder: Path) -> VectorStore:
    return load_store(folder, projection=PROJECTION, metric="dot")


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*"))


def named_files(folder: Path) -> list[str]:
    content = json.loads((folder / manifest.MANIFEST_FILE).read_text())
    return sorted(shard["file"] for shard in content["shards"])


@pytest.mark.parametrize("eviction", ["fifo", "lru"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_comes_back_bit_by_bit(tmp_path, eviction, dtype):
    store = make_store(0, dtype=dtype, eviction=eviction)
    save(store, tmp_path / "store")
    loaded = load(tmp_path / "store")
    assert type(loaded) is VectorStore
    assert same(loaded, store)


@pytest.mark.parametrize("shard_bytes", [1, 50, 300, 1000])
def test_shards_are_bounded(tmp_path, shard_bytes):
    store = make_store(1)
    save(store, tmp_path, shard_bytes=shard_bytes)
    shards = manifest.shards_of(json.loads((tmp_path / manifest.MANIFEST_FILE).read_text()))
    assert len(shards) >= store.nbytes // max(shard_bytes, 24)
    for shard in shards:
        tensors = manifest.read_shard(tmp_path, shard, verify=True)
        # The largest row is a value of 24 bytes: no file can be smaller.
        assert sum(tensor.nbytes for tensor in tensors.values()) <= max(shard_bytes, 24)
    assert same(load(tmp_path), store)


def test_manifest_tells_what_the_store_is(tmp_path):
    store = make_store(2)
    save(store, tmp_path)
    content = json.loads((tmp_path / manifest.MANIFEST_FILE).read_text())
    assert content["class"] == "VectorStore"
    assert content["metric"] == "dot"
    assert content["projection"] == PROJECTION
    assert (content["batch_size"], content["capacity"], content["key_size"]) == (3, 11, 4)
    assert content["ring_head"] == store.start.tolist()
    assert content["written"] == store.written.tolist()
    assert content["tensors"]["keys"] == {"dtype": "float32", "shape": [3, 11, 4]}
    for shard in content["shards"]:
        data = (tmp_path / shard["file"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_store_of_segments(tmp_path):
    store = SegmentStore.empty_segments(2, 8, 4, 3, values=(ValueSpec((), torch.int32),))
    store = dataclasses.replace(store, pending=torch.randn(2, 4, 3))
    save(store, tmp_path, shard_bytes=100)
    loaded = load_store(tmp_path, projection=PROJECTION, store_class=SegmentStore)
    assert type(loaded) is SegmentStore and same(loaded, store)
    with pytest.raises(UserError, match="holds a SegmentStore, not a VectorStore"):
        load(tmp_path)


def test_empty_stores(tmp_path):
    for name, store in {
        "unwritten": VectorStore.empty(2, 3, 4),
        "no slots": VectorStore.empty(2, 0, 4),
        "no rows": VectorStore.empty(0, 3, 4),
    }.items():
        save(store, tmp_path / name)
        assert same(load(tmp_path / name), store)


def test_goes_on_like_the_store_that_was_saved(tmp_path):
    store = make_store(3)
    save(store, tmp_path)
    more = {
        "keys": torch.randn(3, 9, 4),
        "positions": torch.arange(17, 26).expand(3, -1),
        "values": (torch.randn(3, 9, 2, 3), torch.ones(3, 9, dtype=torch.int32)),
    }
    assert same(load(tmp_path).write(**more), store.write(**more))


def search_stored(folder, queries):
    """The fingerprint of what a search of the store in a folder finds."""
    scores, slots = load_store(folder, projection=PROJECTION).search(queries, 8, "l2")
    return fingerprint({"scores": scores, "slots": slots})


def test_searches_are_the_same_bits_in_a_new_process(tmp_path):
    store = make_store(4, capacity=300, written=500)
    queries = torch.randn(3, 40, 4)
    save(store, tmp_path / "store", shard_bytes=4000)
    scores, slots = store.search(queries, 8, "l2")
    expected = fingerprint({"scores": scores, "slots": slots})
    assert run_processes(1, search_stored, tmp_path / "store", queries) == [expected]


def test_replacing_leaves_only_the_new_files(tmp_path):
    save(make_store(0), tmp_path, shard_bytes=100)
    (tmp_path / "notes.txt").write_text("kept")
    first = shard_files(tmp_path)
    save(make_store(1), tmp_path)
    assert [path.name for path in shard_files(tmp_path)] == named_files(tmp_path)
    assert not set(first) & set(shard_files(tmp_path))
    assert (tmp_path / "notes.txt").exists()
    assert same(load(tmp_path), make_store(1))


@pytest.fixture
def saved(tmp_path) -> Path:
    save(make_store(5), tmp_path / "store", shard_bytes=600)
    assert len(shard_files(tmp_path / "store")) >= 3
    return tmp_path / "store"


def test_refuses_another_projection(saved):
    with pytest.raises(UserError, match=r"^\S+: its keys were made by other weights \(projection"):
        load_store(saved, projection=OTHER)
    load_store(saved, projection=None)


def test_refuses_another_metric(saved):
    with pytest.raises(UserError, match="made for the metric 'dot', not for 'l2'"):
        load_store(saved, projection=PROJECTION, metric="l2")
    with pytest.raises(UserError, match="metric 'cosin' is not one of .*did you mean 'cosine'"):
        save_store(make_store(0), saved, metric="cosin", projection=PROJECTION)


def test_refuses_another_class(saved, tmp_path):
    with pytest.raises(UserError, match="holds a VectorStore, not a CorpusStore"):
        CorpusStore.open(saved)
    CorpusStore.create(
        tmp_path / "corpus", key_size=4, metric="dot", projection=PROJECTION, values={}
    ).close()
    with pytest.raises(UserError, match="holds a CorpusStore, not a VectorStore"):
        load(tmp_path / "corpus")
    with pytest.raises(UserError, match="holds a CorpusStore, not a VectorStore"):
        save(make_store(0), tmp_path / "corpus")


def test_refuses_a_missing_shard(saved):
    shard_files(saved)[1].unlink()
    with pytest.raises(UserError, match="shard-000001.safetensors: missing, though"):
        load(saved)


@pytest.mark.parametrize("cut", [1, 100])
def test_refuses_a_truncated_shard(saved, cut):
    path = shard_files(saved)[1]
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="shard-000001.safetensors: .* bytes long instead of"):
        load(saved)


def test_refuses_every_flipped_byte_of_a_shard(saved):
    path = shard_files(saved)[0]
    data = path.read_bytes()
    for index in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        with pytest.raises(UserError, match="altered since it was written"):
            load(saved)
    path.write_bytes(data)
    load(saved)


def test_refuses_every_flipped_byte_of_the_manifest(saved):
    path = saved / manifest.MANIFEST_FILE
    data = path.read_bytes()
    for index in range(0, len(data), 11):
        changed = data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]
        path.write_bytes(changed)
        try:
            meaning = json.loads(changed)
        except ValueError:
            meaning = None
        if meaning == json.loads(data):  # another kind of white space
            continue
        with pytest.raises(UserError) as refused:
            load(saved)
        assert "\n" not in str(refused.value)


def test_refuses_what_is_no_store(saved, tmp_path):
    with pytest.raises(UserError, match="nowhere: there is no such store"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"not a store \(it has no manifest.json\)"):
        load(tmp_path / "empty")
    for text in ("{", "[1]", '{"format": "recipes"}', "\xff"):
        (tmp_path / "empty" / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="not the manifest of a store"):
            load(tmp_path / "empty")
        # A file of something else is not overwritten.
        with pytest.raises(UserError, match="not the manifest of a store"):
            save(make_store(0), tmp_path / "empty")


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"(file|below): cannot be written \("):
            save(make_store(0), place)
        with pytest.raises(UserError, match="there is no such store"):
            load(place)
    assert (tmp_path / "file").read_text() == "mine"


def test_refuses_an_unknown_schema(saved, monkeypatch):
    monkeypatch.setattr(manifest, "SCHEMA", 7)
    save(make_store(0), saved.with_name("newer"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="written with schema 7; this version of memlm reads sch"):
        load(saved.with_name("newer"))
    with pytest.raises(UserError, match="written with schema 7"):
        save(make_store(0), saved.with_name("newer"))


def test_refuses_two_writers(saved):
    lock = manifest.lock_for_writing(saved)
    with pytest.raises(UserError, match="another writer has this store open"):
        save(make_store(0), saved)
    load(saved)
    lock.release()
    save(make_store(0), saved)


def test_a_reader_is_not_disturbed_by_a_writer(saved, monkeypatch):
    """A writer replaces the store between a reader's manifest and its shards."""
    read = manifest.read_manifest
    raced = []

    def racing(folder, kind):
        content = read(folder, kind)
        if not raced:
            raced.append(True)
            save(make_store(6), saved)
        return content

    monkeypatch.setattr(manifest, "read_manifest", racing)
    assert same(load(saved), make_store(6))
    assert raced


def save_old_or_new(folder: Path, seed: int) -> None:
    save(make_store(seed), folder, shard_bytes=500)


def test_killed_at_every_step_of_a_save(tmp_path):
    old, new = make_store(10), make_store(11)
    save_old_or_new(tmp_path / "old", 10)
    found = []
    for moment in itertools.count():
        folder = tmp_path / f"{moment}"
        shutil.copytree(tmp_path / "old", folder)
        killed = killed_at(moment, folder, save_old_or_new, folder, 11)
        store = load(folder)
        found.append("new" if same(store, new) else "old" if same(store, old) else "neither")
        if not killed:
            break
        save_old_or_new(folder, 11)
        assert same(load(folder), new)
        assert [path.name for path in shard_files(folder)] == named_files(folder)
        assert not list(folder.glob("*.partial"))
    assert len(found) > 15
    assert set(found) == {"old", "new"}
    assert found == sorted(found, reverse=True)  # old, ..., old, new, ..., new


def test_killed_before_the_first_save_is_complete(tmp_path):
    """Nothing but a complete store is ever taken for one."""
    for moment in itertools.count():
        folder = tmp_path / f"{moment}"
        killed = killed_at(moment, folder, save_old_or_new, folder, 11)
        if not killed:
            break
        if folder.exists() and (folder / manifest.MANIFEST_FILE).exists():
            assert same(load(folder), make_store(11))
        else:
            with pytest.raises(UserError, match="not a store|no such store"):
                load(folder)
    assert moment > 15
    assert same(load(folder), make_store(11))


def save_forever(folder: Path, ready: Path) -> None:
    stores = [make_store(seed, capacity=3000, written=3100) for seed in (20, 21)]
    for number in itertools.count():
        save(stores[number % 2], folder, shard_bytes=50_000)
        if number == 1:
            ready.touch()


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    stores = [make_store(seed, capacity=3000, written=3100) for seed in (20, 21)]
    random.seed(0)
    found = set()
    start = time.monotonic()
    for store in stores:
        save(store, tmp_path / "store", shard_bytes=50_000)
    four_saves = 2 * (time.monotonic() - start)
    for number in range(16):
        ready = tmp_path / f"ready {number}"
        killed_after(random.uniform(0, four_saves), ready, save_forever, tmp_path / "store", ready)
        store = load(tmp_path / "store")
        (seed,) = (index for index in (0, 1) if same(store, stores[index]))
        found.add(seed)
    assert found == {0, 1}
