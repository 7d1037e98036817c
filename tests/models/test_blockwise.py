"""Attention and feed-forward by blocks of tokens give what they give over whole rows."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memlm.errors import UserError
from memlm.models.activations import set_activations, set_blockwise
from tests.memory.law_tools import VOCABULARY, build_model, run
from tests.models.attach_tools import attached

LENGTH = 48
FULL = {"type": "attention", "num_heads": 4, "num_key_value_heads": 2}
SLIDING = {"type": "sliding_attention", "window": 11, "num_heads": 2, "conv_size": 3}
EXPERTS = {"num_experts": 4, "intermediate_size": 24, "shared_intermediate_size": 16}
MOE = {"type": "moe", **EXPERTS, "balance_loss": 0.1}
TITANS = {"num_heads": 2, "head_dim": 8, "chunk_size": 4, "attention_heads": 2}
LAYERS = {
    "full": {"mixer": FULL, "ffn": "swiglu"},
    "sliding": {"mixer": SLIDING, "ffn": "swiglu"},
    "moe": {"mixer": "min_gru", "ffn": MOE},
    "persistent": {
        "mixer": {
            **{"type": "titans", **TITANS, "variant": "mag"},
            **{"window": 7, "segment": 5, "persistent_tokens": 2},
        },
    },
}


def rows(kind):
    """Arguments of a call: plain rows, packed documents, padding on the left and in between."""
    torch.manual_seed(1)
    given = {"ids": torch.randint(1, VOCABULARY, (2, LENGTH))}
    if kind == "plain":
        return given
    segments, positions = torch.ones(2, LENGTH, dtype=torch.int64), torch.arange(LENGTH)
    positions = positions.repeat(2, 1)
    for row, border in ((0, 13), (0, 30), (1, 17)):
        segments[row, border:] += 1
        positions[row, border:] = torch.arange(LENGTH - border)
    if kind == "padded":
        segments[1, :5] = segments[0, 25:30] = 0
        positions[1, 5:17] -= 5
    return {**given, "segment_ids": segments, "position_ids": positions}


def results(model, kind, tokens, policy="keep"):
    """Logits, gradients and states of two calls, the second of which carries on."""
    model = copy.deepcopy(model).train()
    set_blockwise(model, tokens)
    set_activations(model, policy, smallest=1)
    given = rows(kind)
    ids = given.pop("ids")
    first, states = run(model, ids[:, :19])
    second, states = run(model, ids, states, **given)
    (first.square().mean() + second.square().mean()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    tensors = {(n, key): t for n, state in states.items() for key, t in state.tensors().items()}
    return second, gradients, tensors


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
@pytest.mark.parametrize("layer", LAYERS)
def test_blocks_give_the_same(layer, kind):
    model = build_model([{"repeat": 2, **LAYERS[layer]}])
    logits, gradients, states = results(model, kind, None)
    for tokens in (1, 10) if (layer, kind) == ("sliding", "packed") else (10,):
        found = results(model, kind, tokens)
        torch.testing.assert_close(found[0], logits, rtol=0, atol=1e-11)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-11)
        for name, tensor in states.items():
            torch.testing.assert_close(found[2][name], tensor, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("policy", ["recompute", "offload", "recompute_offload"])
def test_blocks_with_each_policy(policy):
    model = build_model([{"repeat": 2, **LAYERS["full"]}], torch.float32)
    logits, gradients, _ = results(model, "packed", 10)
    found = results(model, "packed", 10, policy)
    assert torch.equal(found[0], logits)
    for name, gradient in gradients.items():
        assert torch.equal(found[1][name], gradient)


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor has, and the most of one that ends in `width`."""

    def __init__(self, width):
        super().__init__()
        self.width, self.numbers, self.wide = width, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter):
                self.numbers = max(self.numbers, tensor.numel())
                if tensor.ndim > 2 and tensor.shape[-1] == self.width:
                    self.wide = max(self.wide, tensor.numel())
        return result


def test_nothing_of_a_whole_row_is_wide():
    model = build_model([{"mixer": FULL, "ffn": {"type": "swiglu", "intermediate_size": 80}}])
    ids = torch.ones(1, 256, dtype=torch.int64)
    segments = torch.ones_like(ids)
    segments[:, 200:] = 2
    found = {}
    for tokens in (None, 8):
        set_blockwise(model, tokens)
        with Largest(80) as largest:
            model(ids, segment_ids=segments).logits.sum().backward()
        found[tokens] = largest
    assert found[None].numbers >= 256 * 256 and found[None].wide == 256 * 80
    assert found[8].numbers <= 256 * VOCABULARY and found[8].wide == 8 * 80


def test_models_of_others_are_refused():
    model = attached("llama", "gated_delta")
    set_blockwise(model, None)
    with pytest.raises(UserError, match="blockwise_tokens"):
        set_blockwise(model, 16)
