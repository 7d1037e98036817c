"""What every process does in test_sharding.py."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from memlm.cuda import PendingReads, Reads, row_gradients
from memlm.memory import ValueTable
from memlm.memory.exchange import all_gather_reads
from memlm.memory.sharding import shard_values, whole_table
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


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the bytes that this process gets from others, in "bytes"."""
    received = {"bytes": 0}
    gather, exchange = dist.all_gather, dist.all_to_all_single

    def counted_gather(parts, mine, group=None):
        own = dist.get_rank(group)
        received["bytes"] += sum(part.nbytes for r, part in enumerate(parts) if r != own)
        return gather(parts, mine, group=group)

    def counted_exchange(out, given, sizes, sent, group=None):
        own, each = dist.get_rank(group), out[:1].nbytes
        received["bytes"] += sum(size * each for r, size in enumerate(sizes) if r != own)
        return exchange(out, given, sizes, sent, group=group)

    dist.all_gather, dist.all_to_all_single = counted_gather, counted_exchange
    try:
        yield received
    finally:
        dist.all_gather, dist.all_to_all_single = gather, exchange


def equal_reads(count: int) -> tuple[Tensor, Tensor]:
    """Indices and weights of `count` tokens of this process."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    indices = torch.randint(SLOTS, (count, BAG), generator=generator, dtype=torch.int32)
    return indices, torch.rand(count, BAG, generator=generator).requires_grad_()


def count_bytes(by: str, count: int) -> dict[str, int]:
    """Bytes that this process gets from others in a forward and a backward pass of `count`
    tokens, and the rows of others that it reads."""
    model = table()
    shard_values(model, mesh(), by)
    model.pending = PendingReads(len(model.weight.to_local()))
    indices, weights = equal_reads(count)
    with counted() as received:
        out = model(indices, weights)
        forward = received["bytes"]
        out.sum().backward()
    rank = dist.get_rank()
    start, end = model.sharding.bounds[rank : rank + 2]
    foreign = indices.unique()
    foreign = int(((foreign < start) | (foreign >= end)).sum())
    return {"forward": forward, "backward": received["bytes"] - forward, "foreign": foreign}


def two_copies(by: str, count: int) -> dict[str, Any]:
    """A step of four processes, of which two have the same part each."""
    places = mesh(replicas=2)
    gather = functools.partial(all_gather_reads, group=places.get_group("replicate"))
    dense, model, data = table(), table(), tokens(dist.get_rank())
    for one in (dense, model):
        shard_values(one, places, by)
    optimizer = RowOptimizer([model], exchange=gather, processes=4)
    read(dense, data, gated=True)
    read(model, data, gated=True)
    norm = optimizer.squared_norm()
    optimizer.step()
    found = {"grad": dense.weight.grad.full_tensor(), "norm": norm}
    found["weight"] = whole_table(model.weight)
    assert torch.equal(found["weight"], model.weight.full_tensor())

    indices, weights = equal_reads(count)
    model(indices, weights).sum().backward()
    found["waiting"] = [model.pending.nbytes, sum(p.indices.numel() for p in model.pending.reads)]
    with counted() as received:
        gather(model.pending.take())
    return found | {"bytes": received["bytes"]}


def read_first_part() -> dict[str, Tensor]:
    """A step in which only rows of the first process are read."""
    model = table()
    shard_values(model, mesh(), "rows")
    optimizer = RowOptimizer([model])
    model(torch.zeros(2, BAG, dtype=torch.int32), torch.ones(2, BAG)).sum().backward()
    optimizer.step()
    return {k: whole_table(v) if v.ndim else v for k, v in optimizer.state[model.weight].items()}


def reads_of(rank: int) -> list[Reads]:
    """Reads as they may differ from process to process: numbers, lengths, precision."""
    torch.manual_seed(rank)
    if rank == 1:
        return [Reads(torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, 1), torch.zeros(0, 3))]
    few = Reads(torch.randint(9, (4, 2), dtype=torch.int32), torch.rand(4, 2), torch.randn(4, 3))
    if rank == 0:
        return [Reads(few.indices, few.weights, few.grad.bfloat16())]
    return [few, Reads.of_rows(torch.arange(5), torch.randn(5, 3))]


def gather_reads() -> list[tuple[Tensor, Tensor, Tensor]]:
    found = all_gather_reads(reads_of(dist.get_rank()), dist.group.WORLD)
    return [(part.indices, part.weights, part.grad) for part in found]


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


def everything(folder: str, count: int) -> dict[str, Any]:
    """All that processes can be asked, in one start of them."""
    results = {by: compare(by) for by in ("columns", "rows")}
    for by in ("columns", "rows"):
        results[f"{by} bytes"] = count_bytes(by, count)
        results[f"{by} loaded"] = load(f"{folder}/one", by)
        save(f"{folder}/{by}_{dist.get_world_size()}", by)
        if dist.get_world_size() == 4:
            results[f"{by} copies"] = two_copies(by, count)
    results["first part"] = read_first_part()
    results["reads"] = gather_reads()
    return results


def reload(folder: str, names: list[str]) -> list[dict[str, Tensor]]:
    """Checkpoints of others through both shardings; saves what came of them."""
    found = []
    for name in names:
        for by in ("columns", "rows"):
            found.append(load(f"{folder}/{name}", by))
    save(f"{folder}/columns_{dist.get_world_size()}", "columns")
    return found
