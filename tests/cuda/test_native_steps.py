"""One token in C++, as in decoding, against the same in plain torch."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from memlm.cuda import NeuralMemoryState, neural_memory, short_convolution
from memlm.cuda.dispatch import VARIABLE
from memlm.cuda.neural_memory import native as memory
from memlm.cuda.rms_norm import native as rms_norm
from memlm.cuda.short_convolution import native as convolution
from memlm.layers.gated_norm import GatedRMSNorm
from memlm.layers.norm import RMSNorm

pytestmark = pytest.mark.native(memory.SOURCE, convolution.SOURCE)


def both(monkeypatch, call):
    """What plain torch and C++ return."""
    found = []
    for implementation in ("eager", "native"):
        monkeypatch.setenv(VARIABLE, implementation)
        with torch.no_grad():
            found.append(call())
    return found


@pytest.mark.parametrize("read", ["inclusive", "chunk_start"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(("depth", "D"), [(1, 8), (1, 20), (2, 8), (2, 36), (3, 5), (4, 16)])
def test_memory(depth, D, clip, read, monkeypatch):
    generator = torch.Generator().manual_seed(depth)
    N, H, widths = 3, 2, [D] + [3 * D] * (depth - 1) + [D]

    def layers(scale):
        return tuple(
            scale * torch.randn(N, H, i, o, generator=generator) * i**-0.5
            for i, o in itertools.pairwise(widths)
        )

    # The last row takes its anchor anew.
    state = NeuralMemoryState(layers(1), layers(1), layers(0.1), torch.tensor([0, 1, 3]))
    q, k, v = (F.normalize(torch.randn(N, 1, H, D, generator=generator), dim=-1) for _ in range(3))
    gates = torch.rand(3, N, 1, H, generator=generator)
    (o, after, counted), (o_native, after_native, counted_native) = both(
        monkeypatch,
        lambda: neural_memory(q, k, v, *gates, state, 4, read, clip=clip, return_statistics=True),
    )
    torch.testing.assert_close(o_native, o, rtol=1e-4, atol=1e-4)
    assert torch.equal(after_native.offset, after.offset) and after.offset.tolist() == [1, 2, 0]
    for part in ("anchor", "weights", "momentum"):
        pairs = zip(getattr(after_native, part), getattr(after, part), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(counted_native, counted, rtol=1e-4, atol=1e-5)


def test_exact_memory(monkeypatch):
    weights, momentum = torch.randn(2, 2, 3, 8, 8).unbind(0)
    state = NeuralMemoryState((), (weights,), (momentum,), torch.tensor([2, 5]))
    q, k, v = (F.normalize(torch.randn(2, 1, 3, 8), dim=-1) for _ in range(3))
    gates = torch.rand(3, 2, 1, 3)
    (o, after), (o_native, after_native) = both(
        monkeypatch, lambda: neural_memory(q, k, v, *gates, state, 4, exact=True)
    )
    torch.testing.assert_close(o_native, o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after_native.weights[0], after.weights[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(after_native.offset, state.offset)


@pytest.mark.parametrize("split", [None, ((2, 8, True), (2, 8, True), (3, 8, False))])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("W", [1, 2, 4])
def test_convolution(W, activation, split, monkeypatch):
    generator = torch.Generator().manual_seed(W)
    x = torch.randn(3, 1, 100, generator=generator)[..., :56]  # a view of a wider projection
    weight = torch.randn(56, 1, W, generator=generator)
    tail = torch.randn(3, W - 1, 56, generator=generator)
    before = tail.clone()
    (y, new_tail), (y_native, new_tail_native) = both(
        monkeypatch, lambda: short_convolution(x, weight, tail, None, activation, split)
    )
    torch.testing.assert_close(y_native, y)
    assert torch.equal(new_tail_native, new_tail) and torch.equal(tail, before)


@pytest.mark.parametrize("channels", [1, 5, 16, 100])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_norm(channels, activation, monkeypatch):
    monkeypatch.setenv(VARIABLE, "auto")
    x, gate = torch.randn(2, 3, channels), torch.randn(2, 3 * channels)
    norm, gated = RMSNorm(channels, 1e-6), GatedRMSNorm(channels, 1e-6, activation)
    for module in (norm, gated):
        torch.nn.init.normal_(module.weight)
    expected = norm(x).detach(), gated(x, gate).detach(), gated(x).detach()
    with torch.no_grad():
        assert rms_norm.refusal(x, norm.weight) is None
        for y, wanted in zip((norm(x), gated(x, gate), gated(x)), expected, strict=True):
            torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(norm(x.transpose(0, 1)), expected[0].transpose(0, 1))
        assert rms_norm.refusal(x.double(), norm.weight) is not None
        monkeypatch.setenv(VARIABLE, "eager")
        assert rms_norm.refusal(x, norm.weight) == "another implementation is forced"
