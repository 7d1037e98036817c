"""Normalisation of the queries of a product-key memory."""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init


class QueryBatchNorm(nn.Module):
    """Batch normalisation of queries, in float32 (float64 for float64).

    In training every channel is normalised over the tokens of the call, which are given without
    padding; a call of a single token, and evaluation, use running statistics. In training a token
    thus depends on later ones. Running statistics move once per token: not when gradient
    checkpointing recomputes a call.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))
        self.init_weights()

    def init_weights(self) -> None:
        init.ones_(self.weight)
        init.zeros_(self.bias)
        init.zeros_(self.running_mean)
        init.ones_(self.running_var)

    def forward(self, query: Tensor) -> Tensor:
        """Queries [T, H, 2, D / 2] of tokens that are no padding, in the dtype of the weight."""
        x = query.flatten(1)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        over_batch = self.training and len(x) > 1
        if over_batch:
            _warn_of_later_tokens()
            if not _recomputing():
                self._move(x.detach())
            var, mean = torch.var_mean(x, 0, correction=0)
        scale = self.weight.to(x.dtype) * (var + self.eps).rsqrt()
        x = torch.addcmul(self.bias.to(x.dtype), x - mean, scale)
        return x.to(self.weight.dtype).view_as(query)

    @torch.no_grad()
    def _move(self, x: Tensor) -> None:
        var, mean = torch.var_mean(x, 0)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)


@torch.no_grad()
def average_running_statistics(model: nn.Module, average: Callable[[Tensor], Tensor]) -> None:
    """Give all processes the same running statistics: those of the tokens of all.

    Args:
        model: its batch normalisations are changed in place.
        average: the mean of a tensor over the processes; a collective.
    """
    for module in model.modules():
        if isinstance(module, QueryBatchNorm):
            mean = average(module.running_mean)
            apart = (module.running_mean - mean).square()
            module.running_var.copy_(average(module.running_var + apart))
            module.running_mean.copy_(mean)


def _recomputing() -> bool:
    """Whether a backward pass is under way: gradient checkpointing runs its calls again there."""
    return torch._C._current_graph_task_id() != -1


@functools.cache
def _warn_of_later_tokens() -> None:
    warnings.warn(
        "product_key: query_norm 'batch' normalises over all tokens of a call, so in training "
        "every token sees later ones and the loss is slightly too low; evaluation uses running "
        "statistics and is causal",
        stacklevel=3,
    )
