"""Value tables that several processes hold together, by columns or by rows."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import get_args

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from memlm.errors import UserError
from memlm.memory.exchange import all_rows
from memlm.memory.sharded_reads import By, Sharding
from memlm.memory.value_table import ValueTable

MEMORY = "memory"  # the dimension of a mesh whose processes hold a table together
PIECE = 64 << 20  # bytes of a part that `whole_table` gathers at a time


def shard_values(model: nn.Module, mesh: DeviceMesh, by: By = "columns") -> None:
    """Keep only this process's part of every value table of `model`, on the mesh's device.

    The weights become DTensors, sharded over the mesh's dimension "memory" and replicated over
    all others, so that `full_tensor` and torch.distributed.checkpoint know them. What backward
    passes leave on a process is the gradient of its part, summed over the tokens of the processes
    that hold the table together; over the other dimensions it is still to be summed.

    Every process of the mesh must come here with equal tables, or with tables on the meta device,
    and has to call the model as often as the others that hold the table with it.

    Args:
        model: has at least one `ValueTable`.
        mesh: with a dimension "memory".
        by: "columns" divides the channels of every value, "rows" the slots.

    Raises:
        UserError: for another mesh, a model without tables, or tables too small to be divided.
    """
    if MEMORY not in (mesh.mesh_dim_names or ()):
        raise UserError(
            f"shard_values: the mesh has the dimensions {mesh.mesh_dim_names}, one of them must be "
            f"named {MEMORY!r}"
        )
    if by not in get_args(By):
        raise UserError(f"shard_values: by is {by!r}, it must be one of {[*get_args(By)]}")
    tables = [module for module in model.modules() if isinstance(module, ValueTable)]
    if not tables:
        raise UserError("shard_values: the model has no value table; use a product_key memory")
    dimension = 0 if by == "rows" else 1
    for table in tables:
        bounds = _bounds(table.weight.shape[dimension], mesh[MEMORY].size(), by)
        placements = [
            Shard(dimension) if name == MEMORY else Replicate() for name in mesh.mesh_dim_names
        ]
        table.weight = nn.Parameter(
            local_part(table.weight.detach(), mesh, placements), table.weight.requires_grad
        )
        table.sharding = Sharding(by, mesh.get_group(MEMORY), bounds)


def local_part(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A DTensor of the whole `tensor`, which every process has.

    As `distribute_tensor`, but nothing travels and only the part comes to the device. Of a tensor
    on the meta device there is room for the part, whatever is in it.
    """
    part = tensor
    for dimension, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = part.chunk(mesh.size(dimension), placement.dim)
            part = parts[mesh.get_local_rank(dimension)]
    if part.is_meta:
        part = torch.empty(part.shape, dtype=part.dtype, device=mesh.device_type)
    else:
        part = part.to(mesh.device_type, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole_table(tensor: DTensor) -> Tensor:
    """The whole tensor on the CPU, of a table that `shard_values` divided or of its moments.

    As `full_tensor`, but a piece at a time, so that the whole need not fit on the device. Every
    process of the mesh has to call it.
    """
    mesh = tensor.device_mesh
    memory = mesh.mesh_dim_names.index(MEMORY)
    dimension = tensor.placements[memory].dim
    group, local = mesh.get_group(memory), tensor.to_local().detach()
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    parts = whole.chunk(mesh.size(memory), dimension)
    longest = max(map(len, parts))
    size = max(1, PIECE // (local.element_size() * max(part[:1].numel() for part in parts)))
    for first in range(0, longest, size):
        pieces = [part[first : first + size] for part in parts]
        numbers = [piece.numel() for piece in pieces]
        gathered = all_rows(local[first : first + size].flatten(), numbers, group)
        for piece, values in zip(pieces, gathered.split(numbers), strict=True):
            piece.copy_(values.view(piece.shape))
    return whole


@contextlib.contextmanager
def tables_apart(model: nn.Module, device: torch.device) -> Iterator[None]:
    """While active, the tables that learn on their own are no parameters of `model`.

    For the moment in which data parallelism wraps a model: neither DDP nor FSDP2 then synchronises
    or shards them. These are the sharded tables and those whose gradient waits in `pending`.

    Args:
        device: where the tables are afterwards; those on the meta device get room there.
    """
    apart = {
        module: module.weight
        for module in model.modules()
        if isinstance(module, ValueTable)
        and (module.sharding is not None or module.pending is not None)
    }
    for table in apart:
        del table.weight
    try:
        yield
    finally:
        for table, weight in apart.items():
            table.weight = weight
            if weight.is_meta:
                table.to_empty(device=device)
            elif table.sharding is None:  # sharded ones are there since they were sharded
                table.to(device)


def _bounds(size: int, processes: int, by: By) -> tuple[int, ...]:
    """Where the parts begin and end that DTensor gives to each process."""
    part = -(-size // processes)
    if (processes - 1) * part >= size:
        raise UserError(
            f"shard_values: {size} {by} cannot be shared by {processes} processes, one would have "
            f"none; use {-(-size // part)} processes"
        )
    return tuple(min(rank * part, size) for rank in range(processes + 1))
