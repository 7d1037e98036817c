"""Fast torch: every sum over gathered rows is an embedding bag, the table's gradient included."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.weighted_bag.reads import Reads, plan_rows
from memlm.cuda.weighted_bag.rules import LazyAdam, Rule

CHUNK = 1 << 22  # gathered numbers of `dot` that exist at a time


def bag(
    indices: Tensor, weights: Tensor, values: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.weighted_bag`; also the sums without the gate."""
    if indices.shape[1] == 0:
        sums = values.new_zeros(indices.shape[0], values.shape[1])
    else:
        sums = _sum(indices, weights, values).to(values.dtype)
    return sums if gate is None else (sums * F.silu(gate.to(sums.dtype))), sums


def dot(indices: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """See `memlm.cuda.gathered_dot`; some tokens at a time."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)
    tokens, length = indices.shape
    step = max(1, CHUNK // max(1, length * values.shape[1]))
    out = torch.empty(tokens, length, dtype=dtype, device=x.device)
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        rows = values[indices[part].long()].to(dtype)  # [step, bag, V]
        out[part] = torch.bmm(rows, x[part].to(dtype)[..., None]).squeeze(-1)
    return out


def row_gradients(reads: Sequence[Reads], num_rows: int) -> tuple[Tensor, Tensor]:
    """See `memlm.cuda.weighted_bag.row_gradients`: a bag of each row's reads."""
    plan = plan_rows(reads)
    dtype = torch.promote_types(plan.grads.dtype, torch.float32)
    if not len(plan.rows):
        return plan.rows, plan.grads.new_zeros(0, plan.grads.shape[1], dtype=dtype)
    gradient = _sum(plan.sources, plan.weights, plan.grads.to(dtype), plan.starts[:-1])
    return plan.rows, gradient


def dense_gradient(reads: Sequence[Reads], num_rows: int) -> Tensor:
    """The gradient [num_rows, V] of the whole table."""
    rows, gradient = row_gradients(reads, num_rows)
    return gradient.new_zeros(num_rows, gradient.shape[1]).index_copy_(0, rows, gradient)


def update_rows(
    reads: Sequence[Reads], values: Tensor, state: dict[str, Tensor], rule: Rule
) -> None:
    """See `memlm.cuda.weighted_bag.update_rows`; the operations of torch.optim.AdamW in order."""
    rows, g = row_gradients(reads, len(values))
    if rule.scale != 1:
        g *= rule.scale
    w = values[rows].to(g.dtype)
    if rule.weight_decay:
        w *= 1 - rule.learning_rate * rule.weight_decay
    if isinstance(rule, LazyAdam):
        m = state["exp_avg"][rows].lerp_(g, 1 - rule.betas[0])
        v = state["exp_avg_sq"][rows].mul_(rule.betas[1])
        v.addcmul_(g, g, value=1 - rule.betas[1])
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = m, v
        w.addcdiv_(m, v.sqrt_().div_(rule.second_bias).add_(rule.eps), value=-rule.step_size)
    else:
        total = state["square_sum"][rows] + g.square().mean(-1)
        state["square_sum"][rows] = total
        w.addcdiv_(g, total.sqrt_().add_(rule.eps)[:, None], value=-rule.learning_rate)
    values[rows] = w.to(values.dtype)


def _sum(indices: Tensor, weights: Tensor, values: Tensor, offsets: Tensor | None = None) -> Tensor:
    """embedding_bag with weights: sums in float32 of tables in low precision too."""
    if values.is_cuda and values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()  # it adds in the table's precision there
    weights = weights.to(values.dtype)
    return F.embedding_bag(indices, values, offsets, per_sample_weights=weights, mode="sum")
