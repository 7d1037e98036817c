"""Attention with its options against the layers of transformers that have them."""

import pytest
import torch
from transformers import Olmo3Config, Qwen3NextConfig
from transformers.models.olmo3 import modeling_olmo3 as olmo3
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from memlm import MemLMConfig
from memlm.layers.attention import Attention
from memlm.layers.attention_config import AttentionConfig
from memlm.layers.context import CallContext

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 24, 4, 2, 8, 13
SIZES = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-4,
    "attention_bias": True,
    "layer_types": ["full_attention"],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


def gated_partial():
    """Qwen3-Next: a gate inside q_proj, a quarter of the channels turned, zero-centred norms."""
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
    config = Qwen3NextConfig(**SIZES, rope_parameters=rope)
    options = {"rope_fraction": 0.25, "qk_norm": True, "output_gate": True}
    return qwen3_next.Qwen3NextAttention(config, 0), _turned(qwen3_next, config), options


def normed_over_all_heads():
    """OLMo 3: one norm over all heads, and frequencies stretched by YaRN."""
    rope = {**YARN, "rope_theta": 5000.0}
    config = Olmo3Config(
        **SIZES, rope_parameters={"full_attention": rope}, max_position_embeddings=32
    )
    options = {"rope_scaling": YARN, "qk_norm": "all_heads"}
    return olmo3.Olmo3Attention(config, 0), _turned(olmo3, config, "full_attention"), options


def _turned(module, config, *layer_type):
    name = type(config).__name__.removesuffix("Config")
    embedding = getattr(module, f"{name}RotaryEmbedding")(config)
    return embedding(torch.zeros(1), torch.arange(LENGTH)[None], *layer_type)


def our_weights(weights):
    """The gate stands behind the queries of every head in theirs."""
    if len(weights["q_proj.weight"]) == HEADS * HEAD_DIM:
        return weights
    weights = dict(weights)
    for kind in ("weight", "bias"):
        pairs = weights.pop(f"q_proj.{kind}").unflatten(0, (HEADS, 2, HEAD_DIM))
        for i, name in enumerate("qg"):
            weights[f"{name}_proj.{kind}"] = pairs[:, i].flatten(0, 1)
    return weights


@pytest.mark.parametrize("theirs", [gated_partial, normed_over_all_heads])
def test_is_the_layer_of_transformers(theirs):
    layer, angles, options = theirs()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / HIDDEN**0.5)
    config = MemLMConfig(hidden_size=HIDDEN)
    layer.config._attn_implementation = config._attn_implementation = "sdpa"
    spec = AttentionConfig(
        num_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rope_theta=5000.0,
        qkv_bias=True,
        output_bias=True,
        **options,
    )
    ours = Attention(spec, config, 1e-4, zero_centered_norm=theirs is gated_partial)
    ours.load_state_dict(our_weights(layer.state_dict()))

    x = torch.randn(2, LENGTH, HIDDEN, requires_grad=True)
    output, _ = ours(x, ours.init_state(2), CallContext.plain(2, LENGTH))
    expected, _ = layer(x, position_embeddings=angles, attention_mask=None)
    target = torch.randn_like(output)
    found, wanted = [], []
    for module, y, gradients in ((ours, output, found), (layer, expected, wanted)):
        names, parameters = zip(*module.named_parameters(), strict=True)
        to_x, *others = torch.autograd.grad(y, (x, *parameters), target)
        named = dict(zip(names, others, strict=True))
        named = named if module is ours else our_weights(named)
        gradients += [y.detach(), to_x, *(named[name] for name in sorted(named))]
    for one, other in zip(found, wanted, strict=True):
        assert ((one - other).norm() / other.norm()).item() < 2e-6
