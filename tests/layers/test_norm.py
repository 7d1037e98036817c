"""Norms whose weights are offsets from one, and norms with a gate, against transformers' own."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNorm,
    Qwen3NextRMSNormGated,
)

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.layers.gated_norm import GatedRMSNorm
from memlm.layers.norm import RMSNorm


def distance(found, expected):
    """Relative to the size of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", [(3, 7, 16), (16,), (0, 16), (1, 1, 16)])
def test_zero_centered_norm_is_that_of_qwen3_next(shape):
    ours, theirs = RMSNorm(16, 1e-5, zero_centered=True), Qwen3NextRMSNorm(16, 1e-5)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape, requires_grad=True)
    gradient = torch.randn(shape)
    results = []
    for norm in (ours, theirs):
        y = norm(x)
        results.append((y, *torch.autograd.grad(y, (x, norm.weight), gradient)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), results[0][0])


def test_zero_centered_norm_of_narrow_numbers_is_computed_in_float32():
    ours, theirs = RMSNorm(16, 1e-5, True).bfloat16(), Qwen3NextRMSNorm(16, 1e-5).bfloat16()
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(50, 16, dtype=torch.bfloat16)
    found = ours(x)
    assert found.dtype == torch.bfloat16
    # Equal but for the last bit, where float32 sums in another order.
    assert (found == theirs(x)).float().mean() > 0.99


@torch.no_grad()
@pytest.mark.parametrize("norm", [RMSNorm(16, 1e-5), GatedRMSNorm(16, 1e-5)])
def test_rows_of_another_width_are_refused_without_gradients_too(norm):
    with pytest.raises(RuntimeError, match="shape"):
        norm(torch.randn(2, 32))


def test_gradients_of_the_zero_centered_norm():
    norm = RMSNorm(5, 1e-3, True).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, x), (x, weight)
    )


def test_only_the_norms_of_the_backbone_are_zero_centered():
    mixers = [{"type": "attention", "qk_norm": True}, {"type": "gated_delta", "num_heads": 2}]
    layers = [{"mixer": mixer, "ffn": "swiglu", "norm": "sandwich"} for mixer in mixers]
    model = MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=layers, zero_centered_norm=True))
    plain = MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=layers))
    weights = model.state_dict()
    norms = {name for name in weights if "norm" in name}
    own = {name for name in norms if "o_norm" in name}
    assert len(own) == 1 and len(norms) == 1 + 8 + 2 + 1
    for name in norms:
        assert (weights[name] == (1 if name in own else 0)).all(), name
        if name not in own:
            torch.nn.init.normal_(weights[name], std=0.1)
    plain.load_state_dict(
        {name: w + 1 if name in norms - own else w for name, w in weights.items()}
    )
    ids = torch.randint(model.config.vocab_size, (2, 9))
    with torch.no_grad():
        assert distance(model(ids).logits, plain(ids).logits) < 2e-6


def test_gated_norm_is_that_of_qwen3_next():
    ours, theirs = GatedRMSNorm(16, 1e-5), Qwen3NextRMSNormGated(16, 1e-5)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x, gate = (torch.randn(3, 7, 16, requires_grad=True) for _ in range(2))
    results = []
    for norm in (ours, theirs):
        y = norm(x, gate)
        results.append((y, *torch.autograd.grad(y, (x, gate, norm.weight), torch.ones_like(y))))
    for found, expected in zip(*results, strict=True):
        assert distance(found, expected) < 2e-6


def test_gated_norm_with_a_sigmoid():
    norm = GatedRMSNorm(8, 1e-5, "sigmoid")
    torch.nn.init.normal_(norm.weight)
    x, gate = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 32)
    expected = F.rms_norm(x, (8,), norm.weight, 1e-5) * gate.view_as(x).sigmoid()
    torch.testing.assert_close(norm(x, gate), expected)
    assert torch.equal(norm.opening(gate), gate.sigmoid())
