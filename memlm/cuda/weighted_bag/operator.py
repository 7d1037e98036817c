"""The operations as autograd sees them.

Every implementation is a module with `bag`, `dot`, `row_gradients`, `dense_gradient` and
`update_rows`, none of which knows autograd: the gradient of a bag is a dot product with the rows it
read (weights) and a bag of the reads of every row (values), that of those dot products is a bag.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm.cuda.weighted_bag.reads import PendingReads, Reads


class WeightedBag(torch.autograd.Function):
    """out[t] = (sum over b of weights[t, b] values[indices[t, b]]) silu(gate[t])."""

    @staticmethod
    def forward(
        ctx,
        indices: Tensor,
        weights: Tensor,
        values: Tensor,
        gate: Tensor | None,
        pending: PendingReads | None,
        module: ModuleType,
    ) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            out, sums = module.bag(indices, weights, values, gate)
        saved = (indices, weights, values, gate, None if gate is None else sums)
        ctx.save_for_backward(*saved)
        ctx.pending, ctx.module = pending, module
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        indices, weights, values, gate, sums = ctx.saved_tensors
        dweights = dvalues = dgate = None
        with torch.autocast(dout.device.type, enabled=False):
            if gate is not None:
                sigmoid = gate.to(dout.dtype).sigmoid()
                silu = gate * sigmoid
                if ctx.needs_input_grad[3]:
                    dgate = dout * sums * (sigmoid + silu * (1 - sigmoid))
                    dgate = dgate.to(gate.dtype)
                dout = dout * silu
            dout = dout.contiguous()
            if ctx.needs_input_grad[1]:
                dweights = ctx.module.dot(indices, dout, values).to(weights.dtype)
            if ctx.needs_input_grad[2]:
                reads = Reads(indices, weights.detach(), dout)
                dvalues = _table_gradient(reads, values, ctx.pending, ctx.module)
        return None, dweights, dvalues, dgate, None, None


class GatheredDot(torch.autograd.Function):
    """out[t, b] = values[indices[t, b]] . x[t]."""

    @staticmethod
    def forward(
        ctx,
        indices: Tensor,
        x: Tensor,
        values: Tensor,
        pending: PendingReads | None,
        module: ModuleType,
    ) -> Tensor:
        ctx.save_for_backward(indices, x, values)
        ctx.pending, ctx.module = pending, module
        with torch.autocast(x.device.type, enabled=False):
            return module.dot(indices, x, values)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        indices, x, values = ctx.saved_tensors
        dx = dvalues = None
        with torch.autocast(dout.device.type, enabled=False):
            dout = dout.contiguous()
            if ctx.needs_input_grad[1]:
                dx = ctx.module.bag(indices, dout, values, None)[0].to(x.dtype)
            if ctx.needs_input_grad[2]:
                reads = Reads(indices, dout, x.detach())
                dvalues = _table_gradient(reads, values, ctx.pending, ctx.module)
        return None, dx, dvalues, None, None


def _table_gradient(
    reads: Reads, values: Tensor, pending: PendingReads | None, module: ModuleType
) -> Tensor | None:
    """The gradient of the whole table, unless `pending` takes the reads."""
    if pending is not None:
        pending.add(reads)
        return None
    return module.dense_gradient([reads], len(values)).to(values.dtype)
