"""Offloaded value tables on a real card; run by `pytest -m gpu tests/cuda`."""

import pytest
import torch
from torch import nn

from memlm.memory import ValueTable
from memlm.memory.offload import offload_values

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hot_rows", [50, 1000])
@pytest.mark.parametrize("on_disk", [False, True])
@torch.no_grad()
def test_bags_are_the_same_to_the_last_bit(gpu, dtype, hot_rows, on_disk, tmp_path):
    holder = nn.ModuleDict({"table": ValueTable(4096, 96)}).to(gpu, dtype)
    resident = holder["table"]
    path = tmp_path / "values.safetensors" if on_disk else None
    offloaded = offload_values(holder, path, hot_rows)["table"]
    assert offloaded.weight.device.type == "cpu" and offloaded.hot.is_cuda
    for tokens in (1, 40, 3, 1, 5):
        indices = torch.randint(4096, (tokens, 32), dtype=torch.int32, device=gpu)
        weights = torch.rand(tokens, 32, device=gpu)
        gate = torch.randn(tokens, 96, dtype=dtype, device=gpu)
        for _ in range(2):
            assert torch.equal(offloaded(indices, weights, gate), resident(indices, weights, gate))
    assert offloaded.hits and offloaded.misses
    assert offloaded.bytes_moved == offloaded.misses * 96 * dtype.itemsize
