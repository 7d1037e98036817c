"""The selection as autograd sees it.

Every implementation is a module with `forward(query, sub_keys, k)`, which returns indices and
weights, and `backward(query, sub_keys, indices, dscores)`, which returns the gradients of query and
sub_keys; indices [T, H, k] are the chosen slots and dscores [T, H, k] the gradient of their scores.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ProductKeySelect(torch.autograd.Function):
    """See `memlm.cuda.product_key_select`."""

    @staticmethod
    def forward(
        ctx, query: Tensor, sub_keys: Tensor, k: int, module: ModuleType
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(query.device.type, enabled=False):
            indices, weights = module.forward(query, sub_keys, k)
        ctx.save_for_backward(query, sub_keys, indices, weights)
        ctx.module = module
        ctx.mark_non_differentiable(indices)
        return indices, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, _: Tensor | None, dweights: Tensor) -> tuple[Tensor | None, ...]:
        query, sub_keys, indices, weights = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
            dquery, dkeys = ctx.module.backward(query, sub_keys, indices, dscores)
        return dquery.to(query.dtype), dkeys.to(sub_keys.dtype), None, None
