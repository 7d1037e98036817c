"""Qwen3-Next: every tensor in its place, both ways."""

import pytest
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM, UserError
from memlm.models.interop import ARCHITECTURES
from tests.models.interop.hybrid_tools import (
    EXPERTS,
    QWEN_HEADS,
    SIZES,
    WIDTH,
    assert_same_weights,
    check_generation,
    check_logits,
    check_round_trip,
    config_of,
    count_parameters,
    pair,
    with_weights,
    written_back,
)
from tests.models.interop.tools import read_tensors

QWEN3_NEXT = ARCHITECTURES["qwen3_next"]
OURS = {
    "type": "gated_delta",
    "num_heads": 2,
    "num_v_heads": 4,
    "head_dim": 8,
    "expand_v": 1.5,
    "conv_size": 4,
}
STRETCHED = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.5,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
VALUES = {**SIZES, **WIDTH, **QWEN_HEADS, **EXPERTS, "mlp_only_layers": [1]}


def build(**options):
    return Qwen3NextForCausalLM(Qwen3NextConfig(**VALUES | options))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return pair(build(), tmp_path_factory.mktemp("qwen3_next"))


def test_logits(both):
    check_logits(both)


def test_generation(both):
    check_generation(both)


def test_round_trip(both, tmp_path):
    again = written_back(both, "qwen3_next", tmp_path)
    check_round_trip(both, again, Qwen3NextForCausalLM)
    assert config_of(again)["mlp_only_layers"] == [1]


def test_layers_are_those_of_the_config(both):
    delta, _, attention = (plan.mixer for plan in both.ours.config.plan())
    assert [entry[0] for entry in (delta, attention)] == ["gated_delta", "attention"]
    assert delta[1].sizes(32) == (2, 4, 8, 12)
    assert (attention[1].rope_fraction, attention[1].rope_theta) == (0.5, 500.0)
    assert [plan.ffn[0] for plan in both.ours.config.plan()] == ["moe", "swiglu", "moe"]


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "norm_topk_prob": False, "tie_word_embeddings": True},
        {"decoder_sparse_step": 2, "mlp_only_layers": [], "rms_norm_eps": 1e-3},
        {"num_experts": 0},
        {"rope_parameters": STRETCHED},
    ],
    ids=str,
)
def test_other_options(options, tmp_path):
    both = pair(build(**options), tmp_path / "original")
    check_logits(both)
    again = written_back(both, "qwen3_next", tmp_path)
    check_round_trip(both, again, Qwen3NextForCausalLM)


def test_what_predicts_further_tokens_is_left_out(both, tmp_path):
    more = read_tensors(both.folder) | {"mtp.layers.0.mlp.gate.weight": torch.ones(3)}
    folder = with_weights(both.folder, more, tmp_path / "more")
    assert_same_weights(MemLMForCausalLM.from_pretrained(folder), both.ours)


def test_experts_in_one_tensor(both, tmp_path):
    inside = both.theirs.state_dict()  # in memory transformers has them in one
    names = [name for name in inside if "experts." in name]
    kept = {n: t for n, t in read_tensors(both.folder).items() if ".experts." not in n}
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    changed = kept | {name: inside[name] for name in names if ".mlp.experts." in name}
    folder = with_weights(both.folder, changed, tmp_path / "fused")
    assert_same_weights(MemLMForCausalLM.from_pretrained(folder), both.ours)


def published():
    """The config.json of the published 80B models, in its spelling."""
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


def test_the_published_config():
    config = MemLMConfig.from_mapping(QWEN3_NEXT.read_config(published()))
    plans = config.plan()
    assert [plan.mixer[0] for plan in plans[:4]] == ["gated_delta"] * 3 + ["attention"]
    assert len(plans) == 48 and all(plan.ffn[0] == "moe" for plan in plans)
    # Three equal layers are one pattern.
    assert [pattern["repeat"] for pattern in config.layers] == [3, 1] * 12
    attention = plans[3].mixer[1]
    assert (attention.rope_theta, attention.rope_fraction) == (1e7, 0.25)
    assert config.zero_centered_norm and not config.tie_word_embeddings
    expected = count_parameters(Qwen3NextForCausalLM, Qwen3NextConfig.from_dict(published()))
    assert count_parameters(MemLMForCausalLM, config) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"linear_decay": "vector"}, "linear_decay 'vector'"),
        ({"num_experts_per_tok": 513}, "experts_per_token 513"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused_by_name(options, message):
    with pytest.raises(UserError, match=message) as error:
        MemLMConfig.from_mapping(QWEN3_NEXT.read_config(published() | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("site", "options", "message"),
    [
        ("mixer", "sliding_attention", "layer 1.mixer: 'sliding_attention'"),
        ("mixer", {**OURS, "beta_bias": 1.0}, "layer 1.mixer: beta_bias 1.0 beside None"),
        ("mixer", {**OURS, "head_dim": 16}, "layer 1.mixer: head_dim 16 beside 8"),
        ("memory", "gated_delta", "layer 1.memory: 'gated_delta'"),
        ("norm", "post", "layer 1.norm: 'post'"),
        ("ffn", {"type": "moe"}, "layer 1.ffn: moe with other options than in layer 0"),
        ("ffn", None, "layer 1.ffn: None"),
    ],
    ids=str,
)
def test_what_has_no_place_there_is_refused_by_name(both, site, options, message):
    layers = [dict(pattern) for pattern in both.ours.config.layers]
    layers[1][site] = options
    config = MemLMConfig(hidden_size=32, zero_centered_norm=True, layers=layers)
    with pytest.raises(UserError, match=message):
        QWEN3_NEXT.write_config(config)


def test_a_plain_transformer_has_other_attention_and_norms():
    layers = [{"mixer": {"type": "attention", "num_heads": 2}, "ffn": "swiglu"}]
    with pytest.raises(UserError, match="zero_centered_norm: False has no place"):
        QWEN3_NEXT.write_config(MemLMConfig(layers=layers))
    with pytest.raises(UserError, match="layer 0.mixer: qk_norm False has no place"):
        QWEN3_NEXT.write_config(MemLMConfig(layers=layers, zero_centered_norm=True))
