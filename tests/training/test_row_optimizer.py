import copy

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from memlm.errors import UserError
from memlm.memory import ValueTable
from memlm.training.row_optimizer import RowOptimizer


def draw(seed, tokens=12, bag=4, rows=10, width=6):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, rows, (tokens, bag), generator=generator, dtype=torch.int32)
    weights = torch.rand(tokens, bag, generator=generator)
    return indices, weights, torch.randn(tokens, width, generator=generator)


def table(rows=10, width=6):
    torch.manual_seed(0)
    return ValueTable(rows, width)


def loss(memory, indices, weights, target):
    return F.mse_loss(memory(indices, weights), target, reduction="sum")


def all_rows(batch, rows=10):
    batch[0].view(-1)[:rows] = torch.arange(rows, dtype=torch.int32)
    return batch


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_equals_adamw_when_every_row_is_read(dtype, tolerance):
    dense, lazy = table().to(dtype), table().to(dtype)
    reference = torch.optim.AdamW(dense.parameters(), lr=0.05, weight_decay=0.1)
    optimizer = RowOptimizer([lazy], lr=0.05, weight_decay=0.1)
    for seed in range(5):
        indices, weights, target = all_rows(draw(seed))
        batch = indices, weights.to(dtype), target.to(dtype)
        for memory, chosen in ((dense, reference), (lazy, optimizer)):
            chosen.zero_grad()
            loss(memory, *batch).backward()
            chosen.step()
        assert lazy.weight.grad is None
        torch.testing.assert_close(lazy.weight, dense.weight, rtol=tolerance, atol=tolerance)
    for name in ("exp_avg", "exp_avg_sq"):
        one, other = optimizer.state[lazy.weight][name], reference.state[dense.weight][name]
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["lazy_adam", "rowwise_adagrad"])
def test_accumulates_and_clips_as_one_gradient(method):
    whole, parts = table(), table()
    one, several = RowOptimizer([whole], method=method), RowOptimizer([parts], method=method)
    batch = draw(1)
    loss(whole, *batch).backward()
    for first in range(0, 12, 4):
        loss(parts, *(tensor[first : first + 4] for tensor in batch)).backward()
    dense = table()
    loss(dense, *batch).backward()
    norm = dense.weight.grad.square().sum().item()
    assert one.squared_norm() == pytest.approx(norm, rel=1e-5)
    assert several.squared_norm() == pytest.approx(norm, rel=1e-5)
    for optimizer in (one, several):
        optimizer.scale_gradients(0.5)
        optimizer.scale_gradients(0.25)
        optimizer.step()
    torch.testing.assert_close(whole.weight, parts.weight)
    rule = {"lazy_adam": "exp_avg", "rowwise_adagrad": "square_sum"}[method]
    scaled = dense.weight.grad / 8
    expected = 0.1 * scaled if method == "lazy_adam" else scaled.square().mean(-1)
    torch.testing.assert_close(one.state[whole.weight][rule], expected)
    # The factors were for that step only, those of forgotten reads for none.
    loss(whole, *batch).backward()
    one.scale_gradients(0.5)
    one.zero_grad()
    for memory, optimizer in ((whole, one), (parts, several)):
        loss(memory, *batch).backward()
        optimizer.step()
    torch.testing.assert_close(whole.weight, parts.weight)
    # Without its reads a step changes nothing.
    loss(whole, *batch).backward()
    before = whole.weight.detach().clone()
    one.zero_grad()
    one.step()
    assert torch.equal(whole.weight, before)


@pytest.mark.parametrize("method", ["lazy_adam", "rowwise_adagrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_exactly(method, dtype):
    def trained(memory, optimizer, seeds):
        for seed in seeds:
            indices, weights, target = draw(seed)
            loss(memory, indices, weights, target.to(dtype)).backward()
            optimizer.step()

    memory = table().to(dtype)
    optimizer = RowOptimizer([memory], lr=0.1, method=method)
    trained(memory, optimizer, (0, 1))
    again = table().to(dtype)
    again.load_state_dict(memory.state_dict())
    resumed = RowOptimizer([again], lr=0.1, method=method)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    moments = [t for t in resumed.state[again.weight].values() if t.ndim]
    assert moments and all(tensor.dtype == torch.float32 for tensor in moments)
    trained(memory, optimizer, (2, 3))
    trained(again, resumed, (2, 3))
    assert torch.equal(memory.weight, again.weight)
    for name, value in optimizer.state[memory.weight].items():
        assert torch.equal(value, resumed.state[again.weight][name])


def test_works_beside_another_optimizer_under_accelerate():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.scale = table(), torch.nn.Parameter(torch.ones(6))

        def forward(self, indices, weights):
            return self.table(indices, weights) * self.scale

    losses = []
    for prepared in (False, True):
        model = Model()
        optimizers = [RowOptimizer([model.table], lr=0.1), torch.optim.AdamW([model.scale], lr=0.1)]
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        if prepared:
            model, *optimizers = accelerator.prepare(model, *optimizers)
        losses.append([])
        for step in range(8):
            indices, weights, target = draw(step % 2)
            if prepared:
                with accelerator.accumulate(model):
                    error = F.mse_loss(model(indices, weights), target)
                    accelerator.backward(error)
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
            else:
                error = F.mse_loss(model(indices, weights), target)
                (error / 2).backward()
                if step % 2:
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
            losses[-1].append(error.item())
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][1]


def test_several_layers_and_rates():
    memory = table()
    optimizer = RowOptimizer([memory], lr=0.0)
    assert optimizer.param_groups[0]["lr"] == 0.0
    for seed in (1, 2):
        loss(memory, *draw(seed)).backward()
    dense = table()
    for seed in (1, 2):
        loss(dense, *draw(seed)).backward()
    before = memory.weight.detach().clone()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(memory.weight, before)
    torch.testing.assert_close(optimizer.state[memory.weight]["exp_avg"], 0.1 * dense.weight.grad)


def test_unknown_method():
    with pytest.raises(UserError, match="method is 'sgd', it must be one of"):
        RowOptimizer([table()], method="sgd")


def test_state_of_another_method():
    memory = table()
    optimizer = RowOptimizer([memory], method="rowwise_adagrad")
    loss(memory, *draw(0)).backward()
    optimizer.step()
    with pytest.raises(UserError, match="the state has square_sum, step, but lazy_adam has exp_av"):
        RowOptimizer([table()]).load_state_dict(optimizer.state_dict())


def test_state_of_a_table_in_another_precision():
    memory = table().double()
    optimizer = RowOptimizer([memory], lr=0.1)
    indices, weights, target = draw(0)
    loss(memory, indices, weights.double(), target.double()).backward()
    optimizer.step()
    single = table()
    single.load_state_dict(memory.state_dict())
    resumed = RowOptimizer([single], lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    loss(memory, indices, weights.double(), target.double()).backward()
    loss(single, indices, weights, target).backward()
    optimizer.step()
    resumed.step()
    torch.testing.assert_close(single.weight, memory.weight.float(), rtol=1e-4, atol=1e-5)
