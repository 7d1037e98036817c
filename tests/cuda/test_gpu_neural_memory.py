"""The Triton kernels of the neural memory on a real card, against the tile problem in float64.

Run by `python -m benchmarks.gpu_check`, or `pytest -m gpu tests/cuda`; skipped without a GPU.
"""

from unittest import mock

import pytest
import torch

from memlm.cuda.neural_memory.gates import TileGates
from tests.cuda import neural_memory_tiles as tiles
from tests.cuda import test_neural_memory_triton_linear as linear
from tests.cuda.harness import assert_deterministic, assert_near

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
# In float16 the interpreter is off by 1.1e-3 at most; bfloat16 has three bits less.
TOLERANCE = {FP16: 5e-3, BF16: 2e-2}
EVERY_RULE = [(0, False), (1, False), (2, False), (1, True)]  # refresh_every, exact


def linear_problem(lengths, C, D, dtype, gpu):
    return linear.rounded(tiles.make(lengths, C, D, device=gpu), dtype)


def assert_linear_right(problem, refresh_every, exact, dtype):
    expected, cotangents = linear.expected_results(problem, refresh_every, exact)
    cotangents["o"] = cotangents["o"].to(dtype)
    found = linear.kernel_results(problem, cotangents, refresh_every, exact, dtype)
    assert_near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("refresh_every", "exact"), EVERY_RULE)
@pytest.mark.parametrize("lengths", [(300, 300, 300), (300, 3, 64, 129)], ids=["equal", "ragged"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_linear(gpu, dtype, lengths, refresh_every, exact):
    problem = linear_problem(lengths, 64, 64, dtype, gpu)
    assert_linear_right(problem, refresh_every, exact, dtype)


@pytest.mark.parametrize(("refresh_every", "exact"), EVERY_RULE)
@pytest.mark.parametrize("D", [16, 32, 100, 128, 256])
@pytest.mark.parametrize("C", [8, 16, 32, 64])
def test_linear_sizes(gpu, C, D, refresh_every, exact):
    problem = linear_problem((150, 100, 70, 33), C, D, FP16, gpu)
    assert_linear_right(problem, refresh_every, exact, FP16)


@pytest.mark.parametrize(("refresh_every", "exact"), EVERY_RULE)
def test_linear_in_segments(gpu, refresh_every, exact):
    problem = linear_problem((600, 100, 300), 16, 64, FP16, gpu)
    with mock.patch.multiple(linear.triton_linear, SEGMENT_BYTES=1):
        assert len(linear.triton_linear.segments_of(problem[3], 64, refresh_every)) > 2
        assert_linear_right(problem, refresh_every, exact, FP16)


@pytest.mark.parametrize("exact", [False, True])
def test_linear_runs_are_bit_equal(gpu, exact):
    problem = linear_problem((300, 300, 70), 64, 128, BF16, gpu)
    cotangents = linear.expected_results(problem, 1, exact)[1]
    assert_deterministic(lambda: linear.kernel_results(problem, cotangents, 1, exact, BF16))


def test_linear_beyond_32_bits(gpu):
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of free GPU memory, there are {free >> 30}")
    rows, steps, C, D = 66, 2000, 64, 256
    counts, M = [rows] * steps, rows * steps
    q, k, v = (torch.randn(M, C, D, device=gpu, dtype=BF16).div_(D**0.5) for _ in range(3))
    assert q.numel() > 2**31
    gates = TileGates(
        torch.rand(M, C, C, device=gpu).tril_().mul_(0.1),
        *(torch.rand(M, C, device=gpu) for _ in range(2)),
        *(torch.rand(M, C, device=gpu).mul_(0.1) for _ in range(2)),
        *(torch.rand(M, device=gpu).mul_(0.5) for _ in range(3)),
    )
    states = torch.randn(rows, D, D, device=gpu) / D**0.5
    with torch.no_grad():
        together = linear.triton_linear.forward(
            q, k, v, gates, states, states, states, counts, 1, False, False
        )[0]
        alone = linear.triton_linear.forward(
            *(x[rows - 1 :: rows].contiguous() for x in (q, k, v)),
            TileGates(*(x[rows - 1 :: rows].contiguous() for x in gates)),
            states[-1:],
            states[-1:],
            states[-1:],
            [1] * steps,
            1,
            False,
            False,
        )[0]
    assert alone.isfinite().all()
    assert torch.equal(together[rows - 1 :: rows], alone)
