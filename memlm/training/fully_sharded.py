"""FSDP2: weights, gradients and moments in shards, and one process that builds the weights.

Every block is a unit of torch's `fully_shard`: its weights are gathered when it is called, in the
forward and in the backward pass, and freed behind it. What lies outside of the blocks (embedding,
head, what memories share) is gathered by the root for the whole of both passes.

Only the main process builds a model with weights. The others have it on the meta device, shard it
there and are sent their shards, so that a machine holds one whole model while a run starts, and not
one per process.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from memlm.memory import ValueTable
from memlm.memory.sharding import PIECE, tables_apart
from memlm.models.attached import AttachedMixin
from memlm.training.loss import RowLoss
from memlm.training.together import on_main


def main_has_weights(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether the main process's model has weights, so that it can send them; collective."""
    return on_main(accelerator, lambda: not any(map(_is_meta, model.parameters())))


def prepare_sharded(
    accelerator: Accelerator, row_loss: RowLoss, optimizers: Iterable[torch.optim.Optimizer]
) -> None:
    """Shard a loss module as the accelerator's plugin for FSDP2 says; in place and collective.

    Afterwards every process has its shards of the main process's weights, and the optimizers hold
    these shards. Tables that are updated by rows are no part of it.

    Args:
        accelerator: of the run.
        row_loss: its model has weights on every process, or on the main process alone, or on none;
            then there is room for them afterwards.
        optimizers: of its parameters, without a state yet.
    """
    plugin, device, model = accelerator.state.fsdp_plugin, accelerator.device, row_loss.model
    sends = not isinstance(model, AttachedMixin) and main_has_weights(accelerator, model)
    names = {parameter: name for name, parameter in row_loss.named_parameters()}
    whole = _tensors(row_loss) if sends and accelerator.is_main_process else {}
    with tables_apart(row_loss, device):
        shard_by_blocks(
            row_loss,
            blocks_of(model),
            mesh=init_device_mesh(device.type, (accelerator.num_processes,)),
            mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
            reshard_after_forward=plugin.reshard_after_forward,
            offload_policy=plugin.cpu_offload,
        )
        if any(map(_is_meta, row_loss.parameters())):
            offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
            row_loss.to_empty(device="cpu" if offloaded else device)
    register_fsdp_forward_method(row_loss, "call_model")
    parameters = dict(row_loss.named_parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [parameters[names[parameter]] for parameter in group["params"]]
    if sends:
        send_from_main(_tensors(row_loss), whole, device)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, or the layers of a pretrained model with an attached memory."""
    if isinstance(model, AttachedMixin):
        return [model.get_submodule(layer.name) for layer in model.attachment.layers]
    return list(model.model.layers)


def _is_meta(tensor: Tensor) -> bool:
    return tensor.is_meta


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, but for tables that several processes hold together."""
    shared = {
        id(table.weight)
        for table in module.modules()
        if isinstance(table, ValueTable) and table.sharding is not None
    }
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach() for name, tensor in tensors.items() if id(tensor) not in shared}


def shard_by_blocks(root: nn.Module, blocks: Iterable[nn.Module], **options: Any) -> None:
    """Shard a module over all processes, with a unit for every block; in place.

    Args:
        root: what is called. Parts of it outside of the blocks have weights only while it runs.
        blocks: modules inside of it; none inside another.
        options: of torch's `fully_shard`. `reshard_after_forward` is that of the blocks: the root
            keeps its weights for the backward pass, which begins with them.
    """
    for block in blocks:
        fully_shard(block, **options)
    outside = {name: value for name, value in options.items() if name != "reshard_after_forward"}
    fully_shard(root, **outside)
    if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):  # torch 2.13
        # The rows of one process may never reach a memory that those of another do.
        root.set_reduce_scatter_unused_params(True)


def send_from_main(
    targets: Mapping[str, Tensor], whole: Mapping[str, Tensor], device: torch.device
) -> None:
    """Give every process its part of the main process's tensors; collective.

    They travel in pieces of 64 MiB, so that no device needs room for a whole tensor.

    Args:
        targets: the tensors to fill, the same names in the same order on every process, sharded
            over any dimension or whole.
        whole: what they are filled with, by name, on the main process; not looked at elsewhere.
        device: whose process group is asked.
    """
    main = dist.get_rank() == 0
    for name, target in targets.items():
        starts = _starts(target)
        local = (target.to_local() if isinstance(target, DTensor) else target).detach()
        shape = target.shape or (1,)  # a scalar is sent as a row of one
        local = local.reshape(1) if target.ndim == 0 else local
        row_bytes = torch.Size(shape[1:]).numel() * target.element_size()
        step = max(1, PIECE // max(1, row_bytes))
        for first in range(0, shape[0], step):
            last = min(first + step, shape[0])
            if main:
                piece = whole[name].reshape(shape)[first:last].to(device).contiguous()
            else:
                piece = torch.empty(last - first, *shape[1:], dtype=target.dtype, device=device)
            dist.broadcast(piece, src=0)
            begin, end = max(first, starts[0]), min(last, starts[0] + len(local))
            if begin < end:
                part = piece[begin - first : end - first]
                for dimension, start in enumerate(starts[1:], 1):
                    part = part.narrow(dimension, start, local.shape[dimension])
                local[begin - starts[0] : end - starts[0]].copy_(part)


def _starts(tensor: Tensor) -> list[int]:
    """Where this process's part of a tensor begins in each of its dimensions."""
    starts = [0] * max(1, tensor.ndim)
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for number, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                size = tensor.shape[placement.dim]
                part = -(-size // mesh.size(number))  # as torch.chunk divides
                starts[placement.dim] = min(part * mesh.get_local_rank(number), size)
    return starts
