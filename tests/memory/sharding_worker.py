"""What every process does in test_sharding.py."""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from memlm.cuda import PendingReads, Reads, row_gradients
from memlm.memory import ValueTable
from memlm.memory.sharding import shard_values
from memlm.training.row_optimizer import RowOptimizer

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


def count_bytes(by: str, count: int) -> dict[str, int]:
    """Bytes that this process gets from others in a forward and a backward pass of `count`
    tokens, and the rows of others that it reads."""
    received = {"now": 0}
    gather, exchange = dist.all_gather, dist.all_to_all_single
    rank = dist.get_rank()

    def counted_gather(parts, mine, group=None):
        received["now"] += sum(part.nbytes for r, part in enumerate(parts) if r != rank)
        return gather(parts, mine, group=group)

    def counted_exchange(out, given, sizes, sent, group=None):
        each = out[:1].nbytes if len(out) else 0
        received["now"] += sum(size * each for r, size in enumerate(sizes) if r != rank)
        return exchange(out, given, sizes, sent, group=group)

    model = table()
    shard_values(model, mesh(), by)
    model.pending = PendingReads(len(model.weight.to_local()))
    generator = torch.Generator().manual_seed(rank)
    indices = torch.randint(SLOTS, (count, BAG), generator=generator, dtype=torch.int32)
    weights = torch.rand(count, BAG, generator=generator).requires_grad_()
    dist.all_gather, dist.all_to_all_single = counted_gather, counted_exchange
    try:
        out = model(indices, weights)
        forward = received["now"]
        out.sum().backward()
    finally:
        dist.all_gather, dist.all_to_all_single = gather, exchange
    start, end = model.sharding.bounds[rank : rank + 2]
    foreign = indices.unique()
    foreign = int(((foreign < start) | (foreign >= end)).sum())
    return {"forward": forward, "backward": received["now"] - forward, "foreign": foreign}


def trained(by: str | None) -> tuple[ValueTable, dict[str, Tensor]]:
    """A table, sharded unless `by` is None, with the state that an optimizer of rows would have."""
    model = table()
    if by is not None:
        shard_values(model, mesh(), by)
    optimizer = RowOptimizer([model])
    local = model.weight.to_local() if by is not None else model.weight.detach()
    rows = torch.arange(len(local), dtype=torch.int32)[:, None]
    model.pending.add(Reads(rows, torch.ones_like(rows, dtype=torch.float32), torch.cos(local)))
    optimizer.step()
    state = optimizer.state[model.weight]
    return model, {
        "weight": model.weight.detach(),
        **{k: state[k] for k in ("exp_avg", "exp_avg_sq")},
    }


def save(folder: str, by: str | None) -> dict[str, Tensor]:
    """Write the table and its moments; returns them whole."""
    _, state = trained(by)
    checkpoint.save(state, checkpoint_id=folder, no_dist=by is None)
    return whole(state)


def load(folder: str, by: str | None) -> dict[str, Tensor]:
    """What a checkpoint of other processes or another sharding holds, through this sharding."""
    _, state = trained(by)
    for tensor in state.values():
        (tensor.to_local() if by is not None else tensor).zero_()
    checkpoint.load(state, checkpoint_id=folder, no_dist=by is None)
    return whole(state)


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.full_tensor() if isinstance(t, DTensor) else t.clone() for k, t in state.items()}


def everything(folder: str, count: int) -> dict[str, dict]:
    """All that processes can be asked, in one start of them."""
    results = {by: compare(by) for by in ("columns", "rows")}
    for by in ("columns", "rows"):
        results[f"{by} bytes"] = count_bytes(by, count)
        results[f"{by} loaded"] = load(f"{folder}/one", by)
        save(f"{folder}/{by}_{dist.get_world_size()}", by)
    return results


def reload(folder: str, names: list[str]) -> list[dict[str, Tensor]]:
    """Checkpoints of others through both shardings; saves what came of them."""
    found = []
    for name in names:
        for by in ("columns", "rows"):
            found.append(load(f"{folder}/{name}", by))
    save(f"{folder}/columns_{dist.get_world_size()}", "columns")
    return found
