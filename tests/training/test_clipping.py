import math

import pytest
import torch

from memlm.memory import ValueTable
from memlm.training.clipping import clip_gradients
from memlm.training.row_optimizer import RowOptimizer


def problem(by_rows):
    """A table and a matrix behind it with their gradients."""
    torch.manual_seed(0)
    table, linear = ValueTable(9, 4), torch.nn.Linear(4, 3)
    optimizers = [RowOptimizer([table])] if by_rows else []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        indices = torch.randint(0, 9, (7, 3), generator=generator, dtype=torch.int32)
        weights = torch.rand(7, 3, generator=generator)
        linear(table(indices, weights)).square().sum().backward()
    return table, linear, optimizers


@pytest.mark.parametrize("limit", [0.5, 1e9, float("inf")])
def test_the_reads_of_rows_count_in_the_norm(limit):
    table, linear, _ = problem(False)
    expected = torch.nn.utils.clip_grad_norm_([table.weight, *linear.parameters()], limit)
    rows_table, rows_linear, optimizers = problem(True)
    parameters = [rows_table.weight, *rows_linear.parameters()]
    norm = clip_gradients(parameters, optimizers, limit)
    assert norm == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(rows_linear.weight.grad, linear.weight.grad)
    (optimizer,) = optimizers
    optimizer.step()
    moments = optimizer.state[rows_table.weight]["exp_avg"]
    torch.testing.assert_close(moments, 0.1 * table.weight.grad)


def test_a_norm_that_is_not_a_number_scales_nothing():
    _, linear, _ = problem(False)
    linear.weight.grad[0, 0] = torch.nan
    before = linear.bias.grad.clone()
    assert math.isnan(clip_gradients(linear.parameters(), [], 0.1))
    assert torch.equal(linear.bias.grad, before)
