"""The short convolution against torch's own, in one call or many."""

import pytest
import torch
from torch.nn import functional as F

from memlm.layers.context import CallContext, SequenceLayout
from memlm.layers.convolution import ConvolutionState, ShortConvolution
from memlm.layers.mlp import SwiGLU


def build(channels, kernel_size=4, activation="silu", bias=False):
    """In float64, with a bias that matters where there is one."""
    layer = ShortConvolution(channels, kernel_size, activation, bias).double()
    if bias:
        torch.nn.init.normal_(layer.bias)
    return layer


def expected(layer, x):
    """One document [T, channels]."""
    padded = F.pad(x.T, (layer.kernel_size - 1, 0))[None]
    y = F.conv1d(padded, layer.weight, layer.bias, groups=len(layer.weight))[0].T
    return F.silu(y) if layer.activation else y


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("bias", [False, True])
def test_pieces_shorter_than_the_kernel(kernel_size, activation, bias):
    layer = build(3, kernel_size, activation, bias)
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    tail = layer.init_tail(2, dtype=torch.float64)
    parts = []
    for start, end in ((0, 1), (1, 3), (3, 9)):
        y, tail = layer(x[:, start:end], tail, CallContext.plain(2, end - start, start).layout)
        parts.append(y)
    for row in range(2):
        torch.testing.assert_close(torch.cat(parts, 1)[row], expected(layer, x[row]))
    assert tail.untyped_storage().nbytes() == tail.nbytes


@pytest.mark.parametrize("bias", [False, True])
def test_packed_documents(bias):
    layer = build(3, bias=bias)
    x = torch.randn(1, 9, 3, dtype=torch.float64)
    starts = torch.zeros(1, 9, dtype=torch.bool)
    starts[0, [2, 7]] = True
    layout = SequenceLayout.build(
        torch.zeros(1, 9, dtype=torch.int64), torch.ones_like(starts), starts
    )
    before = torch.randn(1, 4, 3, dtype=torch.float64)
    carried = ConvolutionState(before[:, 1:])
    y, tails = layer(x, layout.incoming(carried).tail, layout)
    pieces = [
        expected(layer, torch.cat([before[0, 1:], x[0, :2]]))[3:],
        expected(layer, x[0, 2:7]),
        expected(layer, x[0, 7:]),
    ]
    torch.testing.assert_close(y[0], torch.cat(pieces))
    after = layout.outgoing(ConvolutionState(tails), carried).tail
    assert torch.equal(after[0], torch.cat([torch.zeros(1, 3), x[0, 7:]]))


@pytest.mark.parametrize("bias", [False, True])
def test_heads_of_unit_length(bias):
    layer = build(10, bias=bias)
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    tail = torch.randn(2, 3, 10, dtype=torch.float64)
    layout = CallContext.plain(2, 5, 3).layout
    whole, expected_tail = layer(x, tail, layout)
    (keys, values), new_tail = layer(x, tail, layout, ((2, 3, True), (1, 4, False)))
    heads = whole[..., :6].unflatten(-1, (2, 3))
    unit = heads * (heads.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(keys, unit)
    torch.testing.assert_close(values.squeeze(2), whole[..., 6:])
    assert torch.equal(new_tail, expected_tail)


def test_a_bias_in_narrow_numbers_is_rounded_once_behind_the_activation():
    layer = build(8, bias=True).bfloat16()
    x = torch.randn(1, 6, 8, dtype=torch.bfloat16)
    tail = layer.init_tail(1, dtype=x.dtype)
    layout = CallContext.plain(1, 6).layout
    y, new_tail = layer(x, tail, layout)
    assert y.dtype == new_tail.dtype == x.dtype
    torch.testing.assert_close(
        y[0].float(), expected(layer.float(), x[0].float()), rtol=0.02, atol=0.02
    )


def test_reset_of_rows():
    state = ConvolutionState(torch.ones(2, 3, 1))
    assert state.reset(torch.tensor([False, True])).tail.sum((1, 2)).tolist() == [3, 0]
    assert state.reset().tail.sum() == 0 and state.tail.sum() == 6


def test_swiglu_is_its_formula():
    layer = SwiGLU(4, 6).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    gate, up, down = layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight
    torch.testing.assert_close(layer(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    assert layer.flops(10) == 10 * 2 * 3 * 4 * 6
