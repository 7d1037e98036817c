"""The weighted bag's kernels on a real card, against the readable formulas in float64.

Run by `python -m benchmarks.gpu_check`, or `pytest -m gpu tests/cuda`; skipped without a GPU.
"""

import pytest
import torch

from memlm.cuda import (
    LazyAdam,
    Reads,
    RowwiseAdagrad,
    gathered_dot,
    nvcc_library,
    row_gradients,
    update_rows,
    weighted_bag,
)
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.weighted_bag import eager
from tests.cuda.harness import TOLERANCE, assert_deterministic, assert_near, poisoned
from tests.cuda.weighted_bag_cases import formula, outcome, problem

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Tokens, length of a bag, rows, width: narrow and wide, few tokens and many.
CASES = [
    (70, 5, 11, 48),
    (33, 130, 60, 100),
    (3, 128, 4000, 1024),
    (2000, 32, 4000, 1024),
    (300, 17, 64, 384),
    (40, 64, 500, 1100),
    (9, 6, 30, 4096),
    (1, 1, 1, 1),
    (0, 4, 9, 5),
    (6, 0, 4, 7),
]


@pytest.fixture(params=["triton", "cuda"])
def implementation(request, gpu, monkeypatch):
    if request.param == "cuda" and nvcc_library.nvcc() is None:
        pytest.skip("nvcc is not installed")
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def on_gpu(*tensors):
    return tuple(tensor.cuda() for tensor in tensors)


def doubles(*tensors):
    return tuple(None if tensor is None else tensor.double() for tensor in tensors)


def exactly(reads):
    return [Reads(part.indices, part.weights.double(), part.grad.double()) for part in reads]


def hot_reads(dtype=FP32, width=320, rows=500):
    """Reads of `rows` rows, of which one has half of all and another a tenth."""
    indices, weights, _, _, grad = problem(4000, 16, rows, width, dtype)
    indices.view(-1)[::2] = 7
    indices.view(-1)[1::10] = rows - 1
    return [Reads(*on_gpu(indices, weights, grad))]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", CASES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_bag_and_its_gradients(implementation, dtype, sizes, gated):
    indices, weights, values, gate, dout = on_gpu(*problem(*sizes, dtype=dtype))
    gate = gate if gated else None
    expected = outcome(formula, indices, *doubles(weights, values, gate, dout))
    with poisoned():
        found = outcome(weighted_bag, indices, weights, values, gate, dout)
    assert found["out"].dtype == dtype
    assert_near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_table_that_begins_anywhere(implementation, dtype):
    indices, weights, values, gate, _ = on_gpu(*problem(50, 40, 30, 256, dtype))
    shifted = torch.empty(values.numel() + 1, dtype=dtype, device="cuda")[1:].view_as(values)
    shifted.copy_(values)
    found = weighted_bag(indices, weights, shifted, gate)
    expected = formula(indices, *doubles(weights, values, gate))
    assert_near({"out": found}, {"out": expected}, TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", CASES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_gathered_dot_and_its_gradients(implementation, dtype, sizes):
    indices, dout, values, x, _ = on_gpu(*problem(*sizes, dtype=dtype))

    def dot(indices, x, values):
        return (values[indices.long()] * x[:, None]).sum(-1)

    expected = outcome(dot, indices, *doubles(x, values, None, dout))
    with poisoned():
        found = outcome(gathered_dot, indices, x, values, None, dout)
    assert_near(found, expected, TOLERANCE[dtype])


def test_rows_with_thousands_of_reads(gpu):
    reads = hot_reads()
    with poisoned():
        rows, gradient = row_gradients(reads, 500)
    expected_rows, expected = eager.row_gradients(exactly(reads), 500)
    assert torch.equal(rows, expected_rows)
    for one in (7, 8, -1):
        assert_near({"g": gradient[one]}, {"g": expected[one]}, TOLERANCE[FP32])
    assert_near({"g": gradient}, {"g": expected}, TOLERANCE[FP32])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("rule", [LazyAdam, RowwiseAdagrad])
def test_updates(gpu, rule, dtype):
    reads = hot_reads(dtype)
    values = problem(1, 1, 1000, 320, dtype)[2].cuda()
    found, state = values.clone(), rule.init_state(values)
    exact, exact_state = values.double(), rule.init_state(values.double())
    options = {"learning_rate": 0.1, "eps": 1e-4, "weight_decay": 0.2, "scale": 0.5}
    for step in (1, 2):
        if rule is LazyAdam:
            options |= {"betas": (0.9, 0.99), "step": step}
        with poisoned():
            update_rows(reads, found, state, rule(**options))
        eager.update_rows(exactly(reads), exact, exact_state, rule(**options))
    assert torch.equal(found[500:], values[500:])
    assert_near({"values": found}, {"values": exact}, TOLERANCE[dtype])
    assert_near(state, exact_state, 2 * TOLERANCE[FP32])


def test_two_runs_give_the_same_bits(implementation):
    given = on_gpu(*problem(4000, 16, 50, 320, BF16))
    assert_deterministic(lambda: outcome(weighted_bag, *given))
    reads = hot_reads(BF16)

    def update():
        values = problem(1, 1, 500, 320, BF16)[2].cuda()
        state = LazyAdam.init_state(values)
        update_rows(reads, values, state, LazyAdam(0.1, (0.9, 0.99), 1e-8, 1))
        return {"values": values, **state}

    assert_deterministic(update)


def test_updates_do_not_wait_for_the_device(gpu):
    reads, values = hot_reads(), torch.randn(500, 320, device="cuda")
    state, rule = RowwiseAdagrad.init_state(values), RowwiseAdagrad(0.1, 1e-8)
    update_rows(reads, values, state, rule)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        update_rows(reads, values, state, rule)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_32_bits(implementation):
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of free GPU memory, there are {free >> 30}")
    rows, width = 1 << 20, 4096
    values = torch.zeros(rows, width, dtype=BF16, device="cuda")
    assert values.numel() > 2**31
    last = torch.arange(rows - 60, rows, dtype=torch.int32, device="cuda").view(20, 3)
    values[rows - 60 :] = torch.randn(60, width, device="cuda").to(BF16)
    weights, grad = torch.rand(20, 3, device="cuda"), torch.randn(20, width, device="cuda")
    near = last - (rows - 60)
    found = weighted_bag(last, weights, values)
    assert torch.equal(found, weighted_bag(near, weights, values[rows - 60 :]))
    dots = gathered_dot(last, grad, values)
    assert torch.equal(dots, gathered_dot(near, grad, values[rows - 60 :]))
    rule = RowwiseAdagrad(0.1, 1e-8)
    small, state = values[rows - 60 :].clone(), RowwiseAdagrad.init_state(values)
    small_state = RowwiseAdagrad.init_state(small)
    update_rows([Reads(last, weights, grad)], values, state, rule)
    update_rows([Reads(near, weights, grad)], small, small_state, rule)
    assert torch.equal(values[rows - 60 :], small)
    assert not values[: rows - 60].any()
