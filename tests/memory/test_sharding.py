import pytest
import torch

from benchmarks.scaling import scaling_table
from memlm.cuda import gathered_dot
from memlm.errors import UserError
from memlm.memory.scaling import SharedTable
from memlm.memory.sharding import shard_values
from tests.memory import sharding_worker as worker
from tests.memory.processes import run_processes

COUNT = 40  # tokens per process where bytes are counted
WAYS = ("columns", "rows")


def single(processes, name):
    """The same reads by one process with the whole table."""
    table = worker.table()
    data = [worker.tokens(rank) for rank in range(processes)]
    data = {key: torch.cat([part[key] for part in data]) for key in data[0]}
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


@pytest.mark.slow
def test_four_processes(tmp_path):
    """The same with four, of which one has no tokens; checkpoints 1 -> 2 -> 4 -> 1."""
    saved = worker.save(f"{tmp_path}/one", None)
    results = run_processes(4, worker.everything, str(tmp_path), COUNT)
    for by in WAYS:
        assert_reads_and_learns_like_the_whole_table([result[by] for result in results], by)
        for result in results:
            assert_equal(result[f"{by} loaded"], saved)
    run_processes(2, worker.reload, str(tmp_path), ["one"])
    for found in run_processes(4, worker.reload, str(tmp_path), ["columns_2", "rows_4"]):
        for state in found:
            assert_equal(state, saved)
    for found in run_processes(2, worker.reload, str(tmp_path), ["columns_4"]):
        for state in found:
            assert_equal(state, saved)
    assert_equal(worker.load(f"{tmp_path}/columns_4", None), saved)


def test_the_document_has_the_table_of_the_formulas():
    import memlm

    root = memlm.__path__[0]
    with open(f"{root}/../docs/scaling.md", encoding="utf-8") as file:
        assert scaling_table() in file.read()


def test_random_reads_touch_as_many_rows_as_the_formula_says():
    table = SharedTable(5000, 8, 1, "rows", bag=16)
    for tokens in (10, 300, 2000):
        generator = torch.Generator().manual_seed(tokens)
        read = torch.randint(5000, (tokens, 16), generator=generator).unique()
        assert len(read) == pytest.approx(table.distinct_rows(tokens), rel=0.03)


def test_what_cannot_be_sharded():
    mesh = type("Mesh", (), {"mesh_dim_names": ("data",)})()
    with pytest.raises(UserError, match="one of them must be named 'memory'"):
        shard_values(worker.table(), mesh)
    mesh.mesh_dim_names = ("memory",)
    with pytest.raises(UserError, match="by is 'heads', it must be one of"):
        shard_values(worker.table(), mesh, "heads")
    with pytest.raises(UserError, match="the model has no value table"):
        shard_values(torch.nn.Linear(2, 2), mesh)
