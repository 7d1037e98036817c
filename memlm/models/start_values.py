"""Weights before training."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init


@torch.no_grad()
def init_module(module: nn.Module, std: float) -> None:
    """Set the own weights of a module to start values; loaded weights are left alone.

    Args:
        module: any module of a model.
        std: standard deviation of linear and embedding weights.
    """
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, std=std)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=std)
    elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
        if module.weight is not None:
            start = init.zeros_ if getattr(module, "zero_centered", False) else init.ones_
            start(module.weight)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)
    elif hasattr(module, "init_weights") and not isinstance(module, PreTrainedModel):
        module.init_weights()
