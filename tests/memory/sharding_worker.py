"""What every process does in test_sharding.py."""

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from memlm.cuda import PendingReads, row_gradients
from memlm.memory import ValueTable
from memlm.memory.sharding import shard_values

SLOTS, WIDTH, BAG = 30, 13, 5


def tokens(rank: int) -> dict[str, Tensor]:
    """What a process reads: other numbers of tokens on each, rows that repeat, ties."""
    generator = torch.Generator().manual_seed(rank)
    count = (7, 4, 0, 9)[rank]
    return {
        "indices": torch.randint(SLOTS, (count, BAG), generator=generator, dtype=torch.int32),
        "weights": torch.rand(count, BAG, generator=generator),
        "gate": torch.randn(count, WIDTH, generator=generator),
        "x": torch.randn(count, WIDTH, generator=generator),
        "dout": torch.randn(count, WIDTH, generator=generator),
        "dscores": torch.randn(count, BAG, generator=generator),
    }


def table() -> ValueTable:
    torch.manual_seed(0)
    return ValueTable(SLOTS, WIDTH)


def mesh(replicas: int = 1) -> DeviceMesh:
    processes = dist.get_world_size() // replicas
    return init_device_mesh("cpu", (replicas, processes), mesh_dim_names=("replicate", "memory"))


def read(model: ValueTable, data: dict[str, Tensor], gated: bool) -> dict[str, Tensor]:
    """Sums of rows and their gradients."""
    weights, gate = (data[name].clone().requires_grad_() for name in ("weights", "gate"))
    out = model(data["indices"], weights, gate if gated else None)
    wanted = [weights, gate] if gated else [weights]
    out.backward(data["dout"])
    return {"out": out.detach()} | {f"grad_{i}": tensor.grad for i, tensor in enumerate(wanted)}


def dot(model: ValueTable, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Products with rows and their gradients."""
    x = data["x"].clone().requires_grad_()
    out = model.sharding.dot(model, data["indices"], x)
    out.backward(data["dscores"])
    return {"out": out.detach(), "grad_x": x.grad}


def compare(by: str) -> dict[str, dict[str, Tensor]]:
    """Everything that the sharded table of all processes gives on this one."""
    data, results = tokens(dist.get_rank()), {}
    for name in ("sums", "gated", "products"):
        for pending in (False, True):
            model = table()
            shard_values(model, mesh(), by)
            local = model.weight.to_local()
            if pending:
                model.pending = PendingReads(len(local))
            found = dot(model, data) if name == "products" else read(model, data, name == "gated")
            if pending:
                assert model.weight.grad is None
                dense = torch.zeros_like(local)
                rows, gradient = row_gradients(model.pending.take(), len(local))
                dense[rows] = gradient
                found["table"] = dense
                results[f"{name}_pending"] = found
            else:
                found["table"] = model.weight.grad.full_tensor()
                results[name] = found
    return results
