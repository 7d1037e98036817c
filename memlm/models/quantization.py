"""What of a model can be quantized: the linear layers outside its memories."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from memlm.errors import UserError
from memlm.memory import MemoryModule
from memlm.memory.output_memory import OutputMemory
from memlm.models.offloading import SHARED

# How the methods of transformers call the modules that they leave alone.
_SKIPPED = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules")


def refuse_quantized_memories(
    model_class: type[PreTrainedModel], config: Any, quantization: Any
) -> None:
    """Refuse to quantize linear layers of memories, before anything is loaded.

    Kernels of memories read weights as numbers, and their states have the dtype of the weights.

    Args:
        model_class: what would be loaded.
        config: its config.
        quantization: the quantization_config, an object or a mapping.

    Raises:
        UserError: naming the modules that have to be left out.
    """
    values = quantization if isinstance(quantization, dict) else vars(quantization)
    skipped = [pattern for name in _SKIPPED for pattern in values.get(name) or ()]
    with torch.device("meta"):
        model = model_class(config)
    sites = [
        name
        for name in _memories(model)
        if any(
            isinstance(module, nn.Linear) and should_convert_module(f"{name}.{inner}", skipped)
            for inner, module in model.get_submodule(name).named_modules()
        )
    ]
    if sites:
        method = values.get("quant_method", "quantization")
        raise UserError(
            f"{getattr(method, 'value', method)}: memories cannot be quantized; name them in "
            "modules_to_not_convert (bitsandbytes: llm_int8_skip_modules), beside lm_head: "
            f"{sites}; or load with dtype=torch.bfloat16 instead"
        )


def _memories(model: PreTrainedModel) -> list[str]:
    """The names of the outermost modules that are memories, or are shared by them."""
    found: list[str] = []
    for name, module in model.named_modules():
        is_memory = isinstance(module, MemoryModule | OutputMemory) or SHARED.match(f"{name}.")
        if is_memory and not name.startswith(tuple(f"{outer}." for outer in found)):
            found.append(name)
    return found
