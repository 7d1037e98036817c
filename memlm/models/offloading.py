"""Weights of memories in the place that a device map gives them."""

import re

from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import PrefixedDataset
from torch import nn
from transformers import PreTrainedModel

from memlm.errors import UserError
from memlm.memory import MemoryModule
from memlm.memory.output_memory import OutputMemory

SHARED = re.compile(r"^(model\.)?shared\.")


def place_memories(model: PreTrainedModel) -> None:
    """Let all weights of an offloaded memory come when it is called, and go afterwards.

    accelerate brings the weights of a part when the part is called, but memories read weights of
    parts that they do not call.

    Raises:
        UserError: when what memories share would not be there for them.
    """
    if getattr(model, "hf_device_map", None) is None:
        return
    shared = sorted(n for n, p in model.named_parameters() if SHARED.search(n) and p.is_meta)
    if shared:
        where = shared[0][: SHARED.search(shared[0]).end() - 1]
        raise UserError(
            f"what memories share cannot be offloaded ({shared[0]}): give {where!r} a device in "
            "device_map"
        )
    for name, module in model.named_modules():
        if isinstance(module, MemoryModule | OutputMemory):
            _place(name, module)


def _place(name: str, memory: nn.Module) -> None:
    hooks = [getattr(part, "_hf_hook", None) for part in memory.modules()]
    offloaded = [h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload]
    if not offloaded:
        return
    first = offloaded[0]
    remove_hook_from_module(memory, recurse=True)
    hook = AlignDevicesHook(
        execution_device=first.execution_device,
        offload=True,
        io_same_device=False,
        weights_map=PrefixedDataset(first.weights_map.dataset, f"{name}."),
        offload_buffers=first.offload_buffers,
        place_submodules=True,
    )
    add_hook_to_module(memory, hook)
