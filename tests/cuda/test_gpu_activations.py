"""Saved tensors leave a GPU and come back by streams of their own."""

import gc

import pytest
import torch

from memlm.layers.saved_tensors import SavedOnHost

pytestmark = pytest.mark.gpu


def test_saved_tensors_on_the_host(gpu):
    host = SavedOnHost(smallest=1)
    layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in range(12)).to(gpu)
    x = torch.randn(4096, 1024, device=gpu)

    def block(layer, y):
        return layer(y).sin().exp().cos()

    def step(offload):
        layers.zero_grad()
        before, y = torch.cuda.memory_allocated(), x
        for layer in layers:
            if offload:
                with host.block(gpu, layer.parameters()):
                    y = block(layer, y)
            else:
                y = block(layer, y)
        held = torch.cuda.memory_allocated() - before
        y.square().mean().backward()
        torch.cuda.synchronize()
        return held, [p.grad.clone() for p in layers.parameters()]

    plain, expected = step(False)
    for _ in range(3):  # pinned memory is used again
        held, gradients = step(True)
        assert held < plain / 2
        for mine, theirs in zip(gradients, expected, strict=True):
            assert torch.equal(mine, theirs)
    gc.collect()
    assert host.held_bytes == 0
