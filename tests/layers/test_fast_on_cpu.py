"""Layers with a backward pass of their own give torch's results."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from memlm.layers import short_attention
from memlm.layers.norm import RMSNorm
from memlm.layers.rotary import Rotary, rotate
from memlm.layers.short_attention import short_causal_attention, suits


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def same(found, expected, tensors):
    """Equal outputs and, for one random gradient, equal gradients."""
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, tensors, gradient),
        torch.autograd.grad(expected, tensors, gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(3, 7, 12), (5, 12), (2, 3, 4, 12), (12,), (0, 12)])
def test_norm(shape):
    (x,) = leaves(shape)
    norm = RMSNorm(12, eps=1e-2).double()
    torch.nn.init.normal_(norm.weight)
    expected = F.rms_norm(x, (12,), norm.weight, 1e-2)
    assert torch.equal(norm(x), expected)
    same(norm(x), expected, (x, norm.weight))


def test_norm_of_rows_that_are_not_side_by_side():
    (x,) = leaves((3, 7, 12))
    norm = RMSNorm(12, eps=1e-2).double()
    turned = x.transpose(0, 1)
    same(norm(turned), F.rms_norm(turned, (12,), norm.weight, 1e-2), (x, norm.weight))


def test_norm_leaves_other_precisions_to_torch():
    x = torch.randn(4, 12, dtype=torch.bfloat16)
    norm = RMSNorm(12, eps=1e-6)
    assert torch.equal(norm(x), F.rms_norm(x, (12,), norm.weight, 1e-6))


def test_rotation():
    (x,) = leaves((2, 5, 3, 8))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 0, 1, 2]])
    cos, sin = Rotary(8, 10000.0).angles(positions, x.dtype)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    same(rotate(x, cos, sin), expected, (x,))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("length", [1, 32, 75])
def test_attention(heads, length):
    query, key, value = leaves(*((2, length, count, 8) for count in (*heads, heads[1])))
    wide = [part.repeat_interleave(heads[0] // heads[1], 2) for part in (key, value)]
    rows = [part.transpose(1, 2) for part in (query, *wide)]
    expected = F.scaled_dot_product_attention(*rows, is_causal=True, scale=0.3).transpose(1, 2)
    found = short_causal_attention(query, key, value, 0.3)
    same(found, expected, (query, key, value))


def test_attention_takes_the_short_way_only_where_it_is_quicker(monkeypatch):
    query = torch.zeros(1, 128, 1, 2, requires_grad=True)
    assert suits(query)
    assert not suits(query[:, :64]) and not suits(query.detach()) and not suits(query.bfloat16())
    monkeypatch.setattr(short_attention, "LONGEST", 127)
    assert not suits(query)
    with torch.autocast("cpu", torch.bfloat16):
        monkeypatch.undo()
        assert not suits(query)
