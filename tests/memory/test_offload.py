import os
import sys
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.errors import UserError
from memlm.memory import ValueTable, offload, zeroed_values
from memlm.memory.offload import OffloadedTable, offload_values

ROWS = 36  # of a table: 6^2


def model(**options):
    torch.manual_seed(0)
    ffn = {"type": "product_key", "num_keys": 6, "num_heads": 2, "top_k": 3, **options}
    layers = [{"repeat": 2, "mixer": "attention", "ffn": ffn}]
    return MemLMForCausalLM(MemLMConfig(vocab_size=20, hidden_size=16, layers=layers)).eval()


def ids(length=9):
    return torch.randint(20, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(some_model, length=9):
    return some_model(ids(length)).logits


def table(rows=10, width=5, hot_rows=3, dtype=torch.float32):
    """A resident table and an offloaded one with its values."""
    resident = ValueTable(rows, width).to(dtype).requires_grad_(False)
    holder = nn.ModuleDict({"table": ValueTable(rows, width).to(dtype)})
    holder.load_state_dict({"table.weight": resident.weight})
    return resident, offload_values(holder, hot_rows=hot_rows)["table"]


def read(offloaded, *bags):
    """Read bags of equally many rows with weights of 1; returns the sums."""
    indices = torch.tensor(bags, dtype=torch.int32)
    return offloaded(indices, torch.ones(indices.shape))


def hot(offloaded):
    """The rows on the device, by both maps, each with the values of its row."""
    rows = offloaded.row_at_place
    for place, row in enumerate(rows.tolist()):
        if row >= 0:
            assert offloaded.place_of_row[row] == place
            assert torch.equal(offloaded.hot[place], offloaded.weight[row].to(offloaded.hot.dtype))
    found = set(rows[rows >= 0].tolist())
    assert set((offloaded.place_of_row >= 0).nonzero()[:, 0].tolist()) == found
    return found


# --- the same outputs ---


@pytest.mark.parametrize("hot_rows", [1, 7, 1000])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share": "table"},
        {"variant": "plain", "value_size": 10},
        {"variant": "peer", "gated": True},
        {"variant": "peer", "share": "table"},
    ],
)
def test_logits_and_generation_are_the_same_to_the_last_bit(hot_rows, on_disk, options, tmp_path):
    resident, offloaded = model(**options), model(**options)
    tables = offload_values(offloaded, tmp_path / "v.safetensors" if on_disk else None, hot_rows)
    per_memory = 2 if options.get("variant") == "peer" else 1
    assert len(tables) == per_memory * (1 if "share" in options else 2)
    assert not any(type(module) is ValueTable for module in offloaded.modules())
    for length in (1, 9, 4):
        assert torch.equal(logits(offloaded, length), logits(resident, length))
    assert all(part.misses for part in tables.values())
    settings = {"max_new_tokens": 8, "do_sample": False, "output_scores": True}
    settings |= {"return_dict_in_generate": True}
    expected, found = (m.generate(ids(4), **settings) for m in (resident, offloaded))
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.scores), torch.stack(expected.scores))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    resident, offloaded = table(hot_rows=4, dtype=dtype)
    for _ in range(5):
        indices = torch.randint(10, (6, 3), dtype=torch.int32)
        weights, gate = torch.rand(6, 3), torch.randn(6, 5, dtype=dtype)
        expected = resident(indices, weights, gate)
        assert expected.dtype == dtype
        assert torch.equal(offloaded(indices, weights, gate), expected)


def test_a_model_that_changes_its_precision_afterwards():
    resident, offloaded = model().bfloat16(), model()
    offload_values(offloaded, hot_rows=7)
    logits(offloaded)
    assert torch.equal(logits(offloaded.bfloat16()), logits(resident))


def test_empty_calls():
    resident, offloaded = table()
    for tokens, bag in ((0, 4), (3, 0)):
        indices, weights = torch.zeros(tokens, bag, dtype=torch.int32), torch.zeros(tokens, bag)
        assert torch.equal(offloaded(indices, weights), resident(indices, weights))
    assert offloaded.misses == 0 and hot(offloaded) == set()


def test_copies_in_parts(monkeypatch):
    monkeypatch.setattr(offload, "STAGED", 2 * 5 * 4)  # two rows
    for hot_rows in (3, 10):
        resident, offloaded = table(hot_rows=hot_rows)
        bags = [[1, 2, 3], [7, 8, 9], [1, 8, 0]]
        assert torch.equal(read(offloaded, *bags), read(resident, *bags))
        assert offloaded.bytes_moved == 7 * 5 * 4
        hot(offloaded)


# --- which rows stay ---


def test_rows_read_longest_ago_make_place():
    _, offloaded = table()
    for row in (0, 1, 2, 0):
        read(offloaded, [row])
    assert hot(offloaded) == {0, 1, 2}
    read(offloaded, [3])
    assert hot(offloaded) == {0, 2, 3}
    read(offloaded, [4], [5])
    assert hot(offloaded) == {3, 4, 5}  # 2 was read before 0, but two had to go
    read(offloaded, [4, 5], [3, 3])
    read(offloaded, [6])
    assert hot(offloaded) - {6} < {3, 4, 5} and 3 in hot(offloaded)  # the last token read row 3
    assert (offloaded.hits, offloaded.misses) == (1 + 3, 3 + 1 + 2 + 1)
    assert offloaded.bytes_moved == 7 * 5 * 4


def test_a_call_with_too_many_rows_leaves_the_latest():
    resident, offloaded = table()
    read(offloaded, [9], [0])
    bags = [[1], [2], [9], [3], [4], [1]]
    assert torch.equal(read(offloaded, *bags), read(resident, *bags))
    assert hot(offloaded) == {3, 4, 1}
    assert (offloaded.hits, offloaded.misses) == (1, 2 + 4)
    read(offloaded, [5])
    assert hot(offloaded) == {4, 1, 5}


@pytest.mark.parametrize("most", [1, 8])
def test_single_reads_follow_a_plain_queue(most):
    resident, offloaded = table(rows=30, hot_rows=6)
    queue, hits, generator = OrderedDict(), 0, torch.Generator().manual_seed(0)
    for _ in range(150):
        count = int(torch.randint(1, most + 1, (1,), generator=generator))
        bags = torch.randint(30, (count, 1), generator=generator).tolist()
        before = set(queue)
        for (row,) in bags:
            queue[row] = True
            queue.move_to_end(row)
        hits += len(before & {row for (row,) in bags})
        while len(queue) > 6:
            queue.popitem(last=False)
        assert torch.equal(read(offloaded, *bags), read(resident, *bags))
        assert hot(offloaded) == set(queue)
    assert offloaded.hits == hits > 0


# --- files ---


def test_file_is_written_once_and_only_read(tmp_path):
    resident, path = model(), tmp_path / "folder" / "values.safetensors"
    offloaded = model()
    offload_values(offloaded, path, hot_rows=7)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.chmod(0o444)
    before = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino
    again = model()
    found = offload_values(again, str(path), hot_rows=7)
    for some_model in (offloaded, again):
        assert torch.equal(logits(some_model), logits(resident))
    next(iter(found.values())).weight.zero_()  # of this process's view alone
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before
    if sys.platform == "linux":
        with open("/proc/self/maps") as maps:
            assert str(path) in maps.read()
    os.replace(path, path.with_name("moved"))  # mapped files may be renamed
    assert torch.equal(logits(offloaded), logits(resident))


def test_a_checkpoint_is_such_a_file(tmp_path):
    trained = model()
    trained.save_pretrained(tmp_path)
    loaded = MemLMForCausalLM.from_pretrained(tmp_path).eval()
    offload_values(loaded, tmp_path / "model.safetensors", hot_rows=7)
    assert torch.equal(logits(loaded), logits(trained))
    loaded.save_pretrained(tmp_path)  # over the mapped file
    assert torch.equal(logits(loaded), logits(trained))
    assert torch.equal(logits(MemLMForCausalLM.from_pretrained(tmp_path).eval()), logits(trained))


def test_files_with_other_values_are_refused(tmp_path):
    path = tmp_path / "values.safetensors"
    offload_values(model(), path)
    other = model()
    with torch.no_grad():
        other.model.layers[1].ffn.module.values.weight[3, 4] += 1
    with pytest.raises(UserError, match=r"has no model.layers.1.ffn.module.values.weight with the"):
        offload_values(other, path)
    for different in (model(share="table"), model(value_size=10), model().bfloat16()):
        with pytest.raises(UserError, match="give a path that does not exist yet"):
            offload_values(different, path)
        assert logits(different).isfinite().all()  # as it was
    path.write_bytes(b"text")
    with pytest.raises(UserError, match=r"values.safetensors cannot be used"):
        offload_values(model(), path)


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def fails(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(offload, "save_file", fails)
    with pytest.raises(UserError, match=r"values.safetensors cannot be used: no space left"):
        offload_values(model(), tmp_path / "values.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- what the model still is ---


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("options", [{}, {"share": "table"}, {"variant": "peer"}])
def test_a_saved_model_is_complete(on_disk, options, tmp_path):
    resident, offloaded = model(**options), model(**options)
    offload_values(offloaded, tmp_path / "values.safetensors" if on_disk else None, hot_rows=7)
    expected, found = resident.state_dict(), offloaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    offloaded.save_pretrained(tmp_path / "saved")
    resident.save_pretrained(tmp_path / "expected")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert stored.keys() == load_file(tmp_path / "expected" / "model.safetensors").keys()
    loaded = MemLMForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(loaded), logits(resident))


def test_values_are_no_parameters():
    resident, offloaded = model(), model()
    tables = offload_values(offloaded, hot_rows=7)
    assert resident.num_parameters() - offloaded.num_parameters() == 2 * ROWS * 16
    assert all(part.hot.shape == (7, 16) for part in tables.values())
    assert all(isinstance(part, OffloadedTable) and not part.training for part in tables.values())
    with pytest.raises(UserError, match="values.weight: offloaded values cannot be loaded"):
        offloaded.load_state_dict(resident.state_dict())


@pytest.mark.parametrize("variant", ["memory_plus", "peer"])
def test_training_is_refused(variant):
    offloaded = model(variant=variant).train()
    offload_values(offloaded)
    with pytest.raises(UserError, match="offloaded values are for inference alone"):
        offloaded(ids(), labels=ids())
    with pytest.raises(UserError, match="load it anew to train it"):
        offloaded.eval()(ids())
    offloaded.requires_grad_(False)
    assert torch.equal(offloaded(ids()).logits, model(variant=variant)(ids()).logits)
    with torch.inference_mode():
        assert torch.equal(offloaded(ids()).logits, logits(model(variant=variant)))


@pytest.mark.parametrize("options", [{}, {"share": "table"}, {"variant": "peer"}])
def test_zeroed_values(options):
    resident, offloaded = model(**options), model(**options)
    offload_values(offloaded, hot_rows=7)
    with zeroed_values(resident), zeroed_values(offloaded):
        assert torch.equal(logits(offloaded), logits(resident))
        ablated = logits(offloaded)
    assert torch.equal(logits(offloaded), logits(resident))
    assert not torch.allclose(logits(offloaded), ablated)


def test_models_that_cannot_be_offloaded():
    with pytest.raises(UserError, match="hot_rows is 0, it must be at least 1"):
        offload_values(model(), hot_rows=0)
    with pytest.raises(UserError, match="the model has no value table"):
        offload_values(nn.Linear(2, 2))
    offloaded = model()
    offload_values(offloaded)
    with pytest.raises(UserError, match="ffn.module.values is offloaded already"):
        offload_values(offloaded)
    sharded = model()
    sharded.model.layers[0].ffn.module.values.sharding = object()
    with pytest.raises(UserError, match="layers.0.ffn.module.values is sharded already"):
        offload_values(sharded)
