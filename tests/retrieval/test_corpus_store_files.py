"""What lies on the disk: damage, mapping, writers that are killed, and many readers."""

import itertools
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from memlm.cuda.topk_search import topk_search
from memlm.errors import UserError
from memlm.fingerprint import fingerprint
from memlm.retrieval import corpus_store
from memlm.retrieval.corpus_store import CorpusStore
from memlm.retrieval.vector_store import ValueSpec
from tests.retrieval.corpus_tools import (
    PROJECTION,
    SIZE,
    contents,
    create,
    entries,
    files_of,
    fill,
    named_files,
)
from tests.retrieval.killed import killed_after, killed_at, server_context


@pytest.fixture
def saved(tmp_path) -> Path:
    with create(tmp_path / "store") as store:
        fill(store, 90, (30, 60))
        store.remove(torch.tensor([3]))
        store.commit()
    return tmp_path / "store"


def test_refuses_another_projection_and_metric(saved):
    with pytest.raises(UserError, match="its keys were made by other weights"):
        CorpusStore.open(saved, projection="f" * 64)
    with pytest.raises(UserError, match="made for the metric 'l2', not for 'dot'"):
        CorpusStore.open(saved, metric="dot")
    with pytest.raises(UserError, match="there is no such store"):
        CorpusStore.open(saved / "nothing", read_only=False)
    # A refused writer leaves no lock behind.
    with pytest.raises(UserError, match="its keys were made by other weights"):
        CorpusStore.open(saved, projection="f" * 64, read_only=False)
    CorpusStore.open(saved, read_only=False).close()


def test_refuses_missing_and_truncated_files(saved):
    for name in files_of(saved):
        data = (saved / name).read_bytes()
        (saved / name).write_bytes(data[:-1])
        with pytest.raises(UserError, match=f"{name}: .* bytes long instead of"):
            CorpusStore.open(saved)
        (saved / name).unlink()
        with pytest.raises(UserError, match=f"{name}: missing, though the manifest names it"):
            CorpusStore.open(saved)
        (saved / name).write_bytes(data)
    CorpusStore.open(saved)


def test_refuses_flipped_bytes(saved):
    for name in files_of(saved):
        data = (saved / name).read_bytes()
        for index in [*range(0, len(data), 61), len(data) - 1]:
            (saved / name).write_bytes(data[:index] + bytes([data[index] ^ 4]) + data[index + 1 :])
            with pytest.raises(UserError, match=f"{name}: altered since it was written"):
                CorpusStore.open(saved, verify=True)
        (saved / name).write_bytes(data)


def test_compaction_refuses_flipped_bytes(saved):
    store = CorpusStore.open(saved, read_only=False)
    path = saved / files_of(saved)[1]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    with pytest.raises(UserError, match=f"{path.name}: altered since it was written"):
        store.compact()
    path.write_bytes(data)
    store.compact()


def test_refuses_a_header_of_other_types_unverified(saved):
    """A header that is well-formed, but not what was written."""
    path = saved / files_of(saved)[0]
    data = path.read_bytes()
    for old, new in ((b'"F32"', b'"I32"'), (b"next_token", b"next_tokem"), (b"[30,6]", b"[6,30]")):
        assert old in data
        path.write_bytes(data.replace(old, new))
        with pytest.raises(UserError, match="altered since it was written"):
            CorpusStore.open(saved)


def mapping_of(address: int) -> str:
    """The line of /proc/self/maps that holds an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= address < last:
            return line
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_base_is_the_file_itself(saved):
    """No copy: processes that map the same file share its pages."""
    store = CorpusStore.open(saved)
    names = files_of(saved)
    for part, name in zip(store._base, names, strict=False):
        for column in part.columns.values():
            line = mapping_of(column.data_ptr())
            assert line.endswith(str(saved / name)) and "p " in line  # private: never written
    with CorpusStore.open(saved, read_only=False) as store:
        store.compact()
        value = store.values["pair"]
        assert mapping_of(value.data_ptr()).endswith(files_of(saved)[0])


def resident_after_search(folder: Path, results) -> None:
    def anonymous() -> int:
        text = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", text)[1]) << 10

    torch.set_num_threads(1)
    store = CorpusStore.open(folder)
    queries = torch.ones(4, store.layout.key_size)
    topk_search(queries[None], queries[None], 3)
    before = anonymous()
    found = store.search(queries, 3)
    results.put((anonymous() - before, found[1].tolist()))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_searching_takes_no_memory_of_the_size_of_the_store(tmp_path):
    with CorpusStore.create(
        tmp_path, key_size=256, metric="dot", projection=PROJECTION, values={}, key_type="float16"
    ) as store:
        for seed in range(4):
            store.add(torch.randn(40_000, 256, generator=torch.Generator().manual_seed(seed)), {})
            store.commit()
        expected = store.search(torch.ones(4, 256), 3)[1].tolist()
    context = server_context(resident_after_search)
    results = context.Queue()
    process = context.Process(target=resident_after_search, args=(tmp_path, results))
    process.start()
    grown, found = results.get(timeout=120)
    process.join()
    assert found == expected
    assert grown < 20 << 20  # of 82 MB


def change(folder: Path, action: str) -> None:
    with CorpusStore.open(folder, read_only=False) as store:
        if action == "compact":
            corpus_store.SHARD_BYTES = 1000
            store.compact()
        elif action == "index":
            store.build_index("faiss_flat")
        else:
            store.add(*entries(25, seed=5))
            store.remove(torch.tensor([1, 70]))
            store.commit({"step": 2}, {"step": torch.tensor(2)})


@pytest.mark.parametrize(
    ("action", "stride"),
    [
        ("commit", 1),
        ("compact", 3),
        ("index", 3),
        pytest.param("compact", 1, marks=pytest.mark.slow),
        pytest.param("index", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_step(saved, tmp_path, action, stride):
    shutil.copytree(saved, tmp_path / "new")
    if action == "index":
        with CorpusStore.open(saved, read_only=False) as store:
            store.build_index("faiss_hnsw")
    store = CorpusStore.open(saved, engine="auto")
    old = (store.engine, contents(store), fingerprint(store.progress_tensors))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_store, "SHARD_BYTES", corpus_store.SHARD_BYTES)  # `change` sets it
        change(tmp_path / "new", action)
    store = CorpusStore.open(tmp_path / "new", engine="auto")
    new = (store.engine, contents(store), fingerprint(store.progress_tensors))
    assert old != new
    found = []
    for moment in itertools.count(step=stride):
        folder = tmp_path / f"{moment}"
        shutil.copytree(saved, folder)
        killed = killed_at(moment, folder, change, folder, action)
        store = CorpusStore.open(folder, verify=True, engine="auto")
        state = (store.engine, contents(store), fingerprint(store.progress_tensors))
        found.append([old, new].index(state))
        if not killed:
            break
        with CorpusStore.open(folder, read_only=False) as store:
            store.commit()
        assert files_of(folder) == named_files(folder)
        assert len(list(folder.glob("index-*"))) == (action == "index")
        assert not list(folder.glob("*.partial"))
    assert found == sorted(found) and set(found) == {0, 1} and len(found) > 10


def grow_forever(folder: Path, ready: Path) -> None:
    with CorpusStore.open(folder, read_only=False) as store:
        while True:
            count = store.progress.get("entries", 0)
            numbers = torch.arange(count, count + 500)
            store.add(numbers.float()[:, None].expand(-1, SIZE), {"number": numbers})
            store.commit({"entries": count + 500})
            if store.progress["entries"] % 2000 == 0:
                store.compact()
            ready.touch()


def test_killed_at_random_moments(tmp_path):
    folder = tmp_path / "store"
    create(folder, values={"number": ValueSpec((), torch.int64)}).close()
    random.seed(0)
    reached = 0
    for number in range(8):
        ready = tmp_path / f"ready {number}"
        killed_after(random.uniform(0, 0.1), ready, grow_forever, folder, ready)
        store = CorpusStore.open(folder, verify=True)
        assert len(store) == store.progress["entries"] > reached
        reached = len(store)
        assert torch.equal(store.values["number"], torch.arange(reached))
        assert torch.equal(store._base[-1].columns["keys"][-1], torch.full((SIZE,), reached - 1.0))


def open_again_and_again(folder: Path, results) -> None:
    """Open a store that is being written, until it is complete; every view of it must be whole."""
    opened = []
    while not opened or opened[-1] < 6000:
        store = CorpusStore.open(folder)
        assert torch.equal(store.values["number"], torch.arange(len(store)))
        assert len(store) == store.progress.get("entries", 0)
        opened.append(len(store))
    results.put(opened)


def test_many_processes_read_while_one_writes(tmp_path):
    folder = tmp_path / "store"
    store = create(folder, values={"number": ValueSpec((), torch.int64)})
    context = server_context(open_again_and_again)
    results = context.Queue()
    readers = [
        context.Process(target=open_again_and_again, args=(folder, results)) for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    for count in range(100, 6001, 100):
        numbers = torch.arange(count - 100, count)
        store.add(numbers.float()[:, None].expand(-1, SIZE), {"number": numbers})
        store.commit({"entries": count})
        if count % 300 == 0:
            store.compact()
    for reader in readers:
        reader.join(60)
        assert reader.exitcode == 0
    for _ in readers:
        opened = results.get(timeout=10)
        assert opened == sorted(opened) and opened[-1] == 6000
