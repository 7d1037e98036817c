"""Fast torch: every sum over gathered rows is an embedding bag, the table's gradient included."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.weighted_bag.reads import Reads, plan_rows
from memlm.cuda.weighted_bag.rules import LazyAdam, Rule

# Numbers of gathered and of updated rows that exist at a time. Those of a CPU stay in its cache.
GATHERED, UPDATED = 1 << 26, 1 << 26
GATHERED_ON_CPU, UPDATED_ON_CPU = 1 << 15, 1 << 18


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
    most = GATHERED_ON_CPU if x.device.type == "cpu" else GATHERED
    step = max(1, most // max(1, length * values.shape[1]))
    out = torch.empty(tokens, length, dtype=dtype, device=x.device)
    x = x.to(dtype)
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        rows = values.index_select(0, indices[part].flatten()).to(dtype)
        rows = rows.view(len(x[part]), length, values.shape[1])
        if step == 1:  # a product of a matrix and a vector is faster than a batch of one
            torch.mv(rows[0], x[first], out=out[first])
        else:
            out[part] = torch.bmm(rows, x[part, :, None]).squeeze(-1)
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
    """The gradient [num_rows, V] of the whole table: bags of all rows, most of them empty."""
    plan = plan_rows(reads)
    dtype = torch.promote_types(plan.grads.dtype, torch.float32)
    if not len(plan.rows):
        return plan.grads.new_zeros(num_rows, plan.grads.shape[1], dtype=dtype)
    counts = plan.starts.new_zeros(num_rows + 1)
    counts[plan.rows + 1] = plan.starts.diff()
    starts = counts.cumsum(0)[:-1]
    return _sum(plan.sources, plan.weights, plan.grads.to(dtype), starts)


def update_rows(
    reads: Sequence[Reads], values: Tensor, state: dict[str, Tensor], rule: Rule
) -> None:
    """See `memlm.cuda.weighted_bag.update_rows`; some rows at a time."""
    plan = plan_rows(reads)
    dtype = torch.promote_types(plan.grads.dtype, torch.float32)
    grads = plan.grads.to(dtype)
    most = UPDATED_ON_CPU if values.device.type == "cpu" else UPDATED
    step = max(1, most // values.shape[1])
    for first in range(0, len(plan.rows), step):
        rows, starts = plan.rows[first : first + step], plan.starts[first : first + step + 1]
        hits = slice(int(starts[0]), int(starts[-1]))
        gradient = _sum(plan.sources[hits], plan.weights[hits], grads, starts[:-1] - starts[0])
        _update(rows, gradient.to(dtype), values, state, rule)


def _update(rows: Tensor, g: Tensor, values: Tensor, state: dict[str, Tensor], rule: Rule) -> None:
    """Update different rows by their gradients; the operations of torch.optim.AdamW in order."""
    if rule.scale != 1:
        g *= rule.scale
    w = values.index_select(0, rows).to(g.dtype)
    if rule.weight_decay:
        w *= 1 - rule.learning_rate * rule.weight_decay
    if isinstance(rule, LazyAdam):
        m = state["exp_avg"].index_select(0, rows).lerp_(g, 1 - rule.betas[0])
        v = state["exp_avg_sq"].index_select(0, rows).mul_(rule.betas[1])
        v.addcmul_(g, g, value=1 - rule.betas[1])
        state["exp_avg"].index_copy_(0, rows, m)
        state["exp_avg_sq"].index_copy_(0, rows, v)
        w.addcdiv_(m, v.sqrt_().div_(rule.second_bias).add_(rule.eps), value=-rule.step_size)
    else:
        total = state["square_sum"].index_select(0, rows).add_(g.square().mean(-1))
        state["square_sum"].index_copy_(0, rows, total)
        w.addcdiv_(g, total.sqrt_().add_(rule.eps)[:, None], value=-rule.learning_rate)
    values.index_copy_(0, rows, w.to(values.dtype))


def _sum(indices: Tensor, weights: Tensor, values: Tensor, offsets: Tensor | None = None) -> Tensor:
    """embedding_bag with weights: sums in float32 of tables in low precision too."""
    if values.is_cuda and values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()  # it adds in the table's precision there
    weights = weights.to(values.dtype)
    return F.embedding_bag(indices, values, offsets, per_sample_weights=weights, mode="sum")
