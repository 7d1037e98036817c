"""The formulas as they are written: gather, multiply, add, one row of the table after another."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.weighted_bag.reads import Reads, plan_rows
from memlm.cuda.weighted_bag.rules import LazyAdam, Rule


def bag(
    indices: Tensor, weights: Tensor, values: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.weighted_bag`; also the sums without the gate."""
    dtype = _accumulated_in(weights, values)
    rows = values.to(dtype)[indices.long()]  # [T, bag, V]
    sums = (weights.to(dtype)[..., None] * rows).sum(1)
    gated = sums if gate is None else sums * F.silu(gate.to(dtype))
    return gated.to(values.dtype), sums.to(values.dtype)


def dot(indices: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """See `memlm.cuda.gathered_dot`."""
    dtype = _accumulated_in(x, values)
    return (values.to(dtype)[indices.long()] * x.to(dtype)[:, None]).sum(-1)


def row_gradients(reads: Sequence[Reads], num_rows: int) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.weighted_bag.row_gradients`."""
    plan = plan_rows(reads)
    dtype = _accumulated_in(plan.weights, plan.grads)
    gradient = plan.grads.new_zeros(len(plan.rows), plan.grads.shape[1], dtype=dtype)
    for u in range(len(plan.rows)):
        for r in range(int(plan.starts[u]), int(plan.starts[u + 1])):
            gradient[u] += plan.weights[r].to(dtype) * plan.grads[plan.sources[r]].to(dtype)
    return plan.rows, gradient


def dense_gradient(reads: Sequence[Reads], num_rows: int) -> Tensor:
    """The gradient [num_rows, V] of the whole table."""
    rows, gradient = row_gradients(reads, num_rows)
    return gradient.new_zeros(num_rows, gradient.shape[1]).index_copy_(0, rows, gradient)


def update_rows(
    reads: Sequence[Reads], values: Tensor, state: dict[str, Tensor], rule: Rule
) -> None:
    """See `memlm.cuda.weighted_bag.update_rows`."""
    rows, gradient = row_gradients(reads, len(values))
    for row, found in zip(rows.tolist(), gradient, strict=True):
        g = found * rule.scale
        w = values[row].to(g.dtype) * (1 - rule.learning_rate * rule.weight_decay)
        if isinstance(rule, LazyAdam):
            m, v = state["exp_avg"][row], state["exp_avg_sq"][row]
            m.copy_(rule.betas[0] * m + (1 - rule.betas[0]) * g)
            v.copy_(rule.betas[1] * v + (1 - rule.betas[1]) * g * g)
            w -= rule.step_size * m / (v.sqrt() / rule.second_bias + rule.eps)
        else:
            state["square_sum"][row] += g.square().mean()
            w -= rule.learning_rate * g / (state["square_sum"][row].sqrt() + rule.eps)
        values[row] = w.to(values.dtype)


def _accumulated_in(one: Tensor, other: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
