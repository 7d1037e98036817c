import pytest
import torch

from memlm.cuda import PendingReads, gathered_dot
from tests.memory import sharding_worker as worker
from tests.memory.processes import run_processes


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


@pytest.mark.parametrize("by", ["columns", "rows"])
@pytest.mark.parametrize("processes", [2, 4])
def test_shards_read_and_learn_like_the_whole_table(processes, by):
    results = run_processes(processes, worker.compare, by)
    for name in ("sums", "gated", "products"):
        expected = single(processes, name)
        for table in (expected.pop("table"),):
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
