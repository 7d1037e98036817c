"""Modules that are added to a model whose weights are there already."""

import torch
from torch import nn

from memlm.models.modeling import MemLMPreTrainedModel
from memlm.models.start_values import init_module

_NARROW = (torch.float16, torch.bfloat16)


def start(
    module: nn.Module,
    std: float,
    device: torch.device,
    dtype: torch.dtype,
    training: bool = False,
) -> None:
    """Give new modules start values and what the model has: its device, dtype and mode.

    Parameters that need float32 (decay rates, start values of inner weights) keep it in a model of
    16 bits, as when such a model is loaded.

    Args:
        module: all of its parameters are new.
        std: standard deviation of linear and embedding weights.
        device, dtype: of the model.
        training: whether the model is in training mode.
    """
    module.apply(lambda part: init_module(part, std))
    strict = set(MemLMPreTrainedModel._keep_in_fp32_modules_strict) if dtype in _NARROW else set()
    wide = {n: p.data for n, p in module.named_parameters() if strict.intersection(n.split("."))}
    module.to(device=device, dtype=dtype)
    for name, data in wide.items():
        module.get_parameter(name).data = data.to(device)
    module.train(training)
