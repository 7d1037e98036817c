from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

from benchmarks.scaling import scaling_table
from memlm.cuda import gathered_dot
from memlm.errors import UserError
from memlm.memory.scaling import SharedTable
from memlm.memory.sharding import shard_values, tables_apart
from memlm.training.row_optimizer import RowOptimizer
from tests.memory import sharding_worker as worker
from tests.memory.processes import run_processes

COUNT = 40  # tokens per process where bytes are counted
WAYS = ("columns", "rows")


@pytest.fixture
def alone(tmp_path):
    """This process as the only one of its group."""
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def all_tokens(processes):
    data = [worker.tokens(rank) for rank in range(processes)]
    return {key: torch.cat([part[key] for part in data]) for key in data[0]}


def single(processes, name):
    """The same reads by one process with the whole table."""
    table, data = worker.table(), all_tokens(processes)
    if name == "products":
        x = data["x"].requires_grad_()
        out = gathered_dot(data["indices"], x, table.weight)
        out.backward(data["dscores"])
        found = {"out": out.detach(), "grad_x": x.grad}
    else:
        found = worker.read(table, data, name == "gated")
    return found | {"table": table.weight.grad}


def assert_reads_and_learns_like_the_whole_table(results, by):
    for name in ("sums", "gated", "products"):
        expected = single(len(results), name)
        table = expected.pop("table")
        for result in results:
            torch.testing.assert_close(result[name]["table"], table, rtol=0, atol=1e-6)
        parts = [result[f"{name}_pending"]["table"] for result in results]
        whole = torch.cat(parts, 1 if by == "columns" else 0)
        torch.testing.assert_close(whole, table, rtol=0, atol=1e-6)
        for key, value in expected.items():
            for kind in (name, f"{name}_pending"):
                found = torch.cat([result[kind][key] for result in results])
                exact = key == "out" and not (name == "products" and by == "columns")
                assert found.shape == value.shape
                torch.testing.assert_close(found, value, rtol=0, atol=0 if exact else 1e-6)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def assert_parts_count_steps_together(results):
    for result in results:
        assert_equal(result["first part"], results[0]["first part"])
        assert result["first part"]["step"] == 1


def assert_reads_are_gathered(results):
    parts = [part for rank in range(len(results)) for part in worker.reads_of(rank)]
    for result in results:
        assert len(result["reads"]) == len(parts)
        for (indices, weights, grad), part in zip(result["reads"], parts, strict=True):
            assert torch.equal(indices.long(), part.indices.long())
            assert torch.equal(weights, part.weights)
            assert torch.equal(grad, part.grad.float())


def assert_copies_learn_like_one_table(results, by):
    """Two groups of two processes, and the bytes that copies exchange."""
    table, data = worker.table(), all_tokens(4)
    worker.read(table, data, gated=True)
    whole = worker.table()
    optimizer = RowOptimizer([whole], processes=4)
    worker.read(whole, data, gated=True)
    norm = optimizer.squared_norm()
    optimizer.step()
    formula = SharedTable(worker.SLOTS, worker.WIDTH, 2, by, worker.BAG)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["grad"], table.weight.grad, rtol=0, atol=1e-6)
        assert result["norm"] == pytest.approx(norm, rel=1e-6)
        torch.testing.assert_close(result["weight"], whole.weight.detach(), rtol=0, atol=1e-6)
        assert torch.equal(result["weight"], results[0]["weight"])
        mine, copy = (results[r]["waiting"] for r in (rank, (rank + 2) % 4))
        rows = max(mine[1], copy[1])  # the shorter one is padded
        slack = 0 if by == "rows" else 2 * COUNT * 4 / 2  # the width is odd
        for nbytes, number in (mine, copy):
            assert nbytes == pytest.approx(formula.pending_bytes(COUNT, number), abs=slack)
        expected = formula.copies_bytes(COUNT, 2, rows)
        assert result["bytes"] == pytest.approx(expected, abs=slack)


def test_one_process_alone(alone, tmp_path):
    """A group of one: everything as it was, and nothing travels."""
    saved = worker.save(f"{tmp_path}/one", None)
    result = worker.everything(str(tmp_path), COUNT)
    for by in WAYS:
        assert_reads_and_learns_like_the_whole_table([result[by]], by)
        formula = SharedTable(worker.SLOTS, worker.WIDTH, 1, by, worker.BAG)
        assert result[f"{by} bytes"]["forward"] == formula.forward_bytes(COUNT) == 0
        assert result[f"{by} bytes"]["backward"] == formula.backward_bytes(COUNT) == 0
        assert_equal(result[f"{by} loaded"], saved)
    assert_reads_are_gathered([result])


def test_tables_that_learn_on_their_own_are_apart_while_a_model_is_wrapped(alone):
    model = nn.ModuleDict({name: worker.table() for name in ("plain", "by_rows", "shared")})
    shard_values(model["shared"], worker.mesh())
    optimizer = RowOptimizer([model["by_rows"]])
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="inside"), tables_apart(model, torch.device("cpu")):
        assert [name for name, _ in model.named_parameters()] == ["plain.weight"]
        raise RuntimeError("inside")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert optimizer.param_groups[0]["params"][0] is model["by_rows"].weight


def test_two_processes(tmp_path):
    """Sums bit-equal to one process, bytes as the formulas say, checkpoints 1 -> 2 -> 1."""
    saved = worker.save(f"{tmp_path}/one", None)
    results = run_processes(2, worker.everything, str(tmp_path), COUNT)
    for by in WAYS:
        assert_reads_and_learns_like_the_whole_table([result[by] for result in results], by)
        formula = SharedTable(worker.SLOTS, worker.WIDTH, 2, by, worker.BAG)
        for rank, result in enumerate(results):
            found = result[f"{by} bytes"]
            given = results[1 - rank][f"{by} bytes"]["foreign"]
            if by == "columns":
                # The width is odd: the parts are not the half that the formula takes.
                slack = COUNT * 4 / 2
                assert found["forward"] == pytest.approx(formula.forward_bytes(COUNT), abs=slack)
                assert found["backward"] == pytest.approx(formula.backward_bytes(COUNT), abs=slack)
            else:
                rows = found["foreign"]
                asked = 4 * (given - rows)  # numbers come from who asks, rows to who asked
                assert found["forward"] == formula.forward_bytes(COUNT, rows) + asked
                assert found["backward"] == formula.backward_bytes(COUNT, given)
            assert_equal(result[f"{by} loaded"], saved)
        assert_equal(worker.load(f"{tmp_path}/{by}_2", None), saved)
    assert_parts_count_steps_together(results)
    assert_reads_are_gathered(results)


def test_four_processes(tmp_path):
    """The same with four, of which one has no tokens; checkpoints 1 -> 2 -> 4 -> 2 and 1."""
    saved = worker.save(f"{tmp_path}/one", None)
    results = run_processes(4, worker.everything, str(tmp_path), COUNT)
    for by in WAYS:
        assert_reads_and_learns_like_the_whole_table([result[by] for result in results], by)
        assert_copies_learn_like_one_table([result[f"{by} copies"] for result in results], by)
        for result in results:
            assert_equal(result[f"{by} loaded"], saved)
    assert_parts_count_steps_together(results)
    assert_reads_are_gathered(results)
    run_processes(2, worker.reload, str(tmp_path), ["one"])
    for found in run_processes(4, worker.reload, str(tmp_path), ["columns_2", "rows_4"]):
        for state in found:
            assert_equal(state, saved)
    for found in run_processes(2, worker.reload, str(tmp_path), ["columns_4"]):
        for state in found:
            assert_equal(state, saved)
    assert_equal(worker.load(f"{tmp_path}/columns_4", None), saved)


def test_the_document_has_the_table_of_the_formulas():
    page = Path(__file__).parents[2] / "docs" / "scaling.md"
    assert scaling_table() in page.read_text(encoding="utf-8")


def test_random_reads_touch_as_many_rows_as_the_formula_says():
    table = SharedTable(5000, 8, 1, "rows", bag=16)
    for tokens in (10, 300, 2000):
        generator = torch.Generator().manual_seed(tokens)
        read = torch.randint(5000, (tokens, 16), generator=generator).unique()
        assert len(read) == pytest.approx(table.distinct_rows(tokens), rel=0.03)


class Mesh:
    """What `shard_values` looks at before it divides anything."""

    mesh_dim_names = ("data",)

    def __getitem__(self, name):
        return self

    def size(self):
        return 12


def test_what_cannot_be_sharded():
    mesh = Mesh()
    with pytest.raises(UserError, match="one of them must be named 'memory'"):
        shard_values(worker.table(), mesh)
    mesh.mesh_dim_names = ("memory",)
    with pytest.raises(UserError, match="by is 'heads', it must be one of"):
        shard_values(worker.table(), mesh, "heads")
    with pytest.raises(UserError, match="the model has no value table"):
        shard_values(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(UserError, match="13 columns cannot be shared by 12 .*; use 7 processes"):
        shard_values(worker.table(), mesh)
