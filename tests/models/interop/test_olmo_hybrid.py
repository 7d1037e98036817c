"""OLMo Hybrid: every tensor in its place, both ways."""

import pytest
import torch
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM, UserError
from memlm.models.interop import ARCHITECTURES
from tests.models.interop.hybrid_tools import (
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

OLMO_HYBRID = ARCHITECTURES["olmo_hybrid"]
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
UNTURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": None}}


def build(**options):
    values = {"pad_token_id": None, "eos_token_id": None, **SIZES, **WIDTH, **ROTARY, **options}
    return OlmoHybridForCausalLM(OlmoHybridConfig(**values))


def published_names(tensors):
    """Tensors that transformers has written, as they are named and cut where they are published."""
    result = dict(tensors)
    for name in tensors:
        if name.endswith(".self_attn.o_proj.weight"):
            layer = name.removesuffix(".self_attn.o_proj.weight")
            norm = result.pop(f"{layer}.feedforward_layer_norm.weight")
            result[f"{layer}.post_attention_layernorm.weight"] = norm
        if name.endswith(".q_conv1d.weight"):
            parts = [name.replace("q_conv1d", f"{part}_conv1d") for part in "qkv"]
            whole = torch.cat([tensors[part] for part in parts])
            sizes = [len(tensors[p.replace("_conv1d", "_proj")]) for p in parts]
            cut = whole.split(sizes)
            result |= {part: tensor.clone() for part, tensor in zip(parts, cut, strict=True)}
    return result


@pytest.fixture(scope="module", params=[ROTARY, UNTURNED], ids=["rotary", "unturned"])
def both(request, tmp_path_factory):
    return pair(build(**request.param), tmp_path_factory.mktemp("olmo_hybrid"))


def test_logits(both):
    check_logits(both)


def test_generation(both):
    check_generation(both)


def test_round_trip_to_the_published_names(both, tmp_path):
    again = written_back(both, "olmo_hybrid", tmp_path)
    expected = published_names(read_tensors(both.folder))
    assert expected.keys() != read_tensors(both.folder).keys()
    check_round_trip(both, again, OlmoHybridForCausalLM, expected)
    theta = both.theirs.config.rope_parameters["rope_theta"]
    assert config_of(again)["rope_parameters"]["rope_theta"] == theta


def test_the_published_names_are_read(both, tmp_path):
    folder = with_weights(both.folder, published_names(read_tensors(both.folder)), tmp_path / "new")
    assert_same_weights(MemLMForCausalLM.from_pretrained(folder), both.ours)


def test_layers_are_those_of_the_config(both):
    delta, _, attention = both.ours.config.plan()
    assert (delta.norm, attention.norm) == ("pre", "post")
    assert delta.mixer[1].sizes(32) == (2, 4, 8, 12)
    assert delta.mixer[1].allow_neg_eigval and delta.mixer[1].norm_eps == 1e-5
    assert attention.mixer[1].qk_norm == "all_heads"


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "linear_allow_neg_eigval": False},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_other_options(options, tmp_path):
    both = pair(build(**options), tmp_path / "original")
    check_logits(both)
    again = written_back(both, "olmo_hybrid", tmp_path)
    expected = published_names(read_tensors(both.folder))
    check_round_trip(both, again, OlmoHybridForCausalLM, expected)


def test_the_published_config():
    values = {
        "model_type": "olmo_hybrid",
        "hidden_size": 3840,
        "num_attention_heads": 30,
        "num_hidden_layers": 32,
        "linear_use_gate": True,
        "linear_key_head_dim": 96,
        "linear_value_head_dim": 192,
        "rope_parameters": None,
        "rope_theta": None,
        "tie_word_embeddings": False,
    }
    config = MemLMConfig.from_mapping(OLMO_HYBRID.read_config(values))
    assert [pattern["repeat"] for pattern in config.layers] == [3, 1] * 8
    delta, attention = (config.plan()[layer].mixer[1] for layer in (0, 3))
    assert delta.sizes(3840) == (30, 30, 96, 192)
    assert not attention.rope and attention.heads(3840) == (30, 30, 128)
    expected = count_parameters(OlmoHybridForCausalLM, OlmoHybridConfig.from_dict(values))
    assert count_parameters(MemLMForCausalLM, config) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"layer_types": ["linear_attention", "sliding_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "turns all channels of a head"),
        ({"linear_use_gate": False}, "linear_use_gate False"),
        ({"linear_rank": 4}, "linear_rank 4"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused_by_name(options, message):
    values = {"model_type": "olmo_hybrid", "num_hidden_layers": 2}
    with pytest.raises(UserError, match=message):
        OLMO_HYBRID.read_config(values | options)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (0, {"norm": "post"}, "layer 0.norm: 'post' around gated_delta"),
        (1, {"norm": "sandwich"}, "layer 2.norm: 'sandwich' around attention"),
        (1, {"ffn": "moe"}, "layer 2.ffn: 'moe'"),
        (0, {"mixer": {"type": "gated_delta", "num_heads": 2}}, "layer 0.mixer: norm_eps None"),
        (1, {"mixer": {"type": "attention", "num_heads": 2}}, "layer 2.mixer: qk_norm False"),
        (
            1,
            {"mixer": {"type": "attention", "num_heads": 2, "head_dim": 8, "qk_norm": "all_heads"}},
            "layer 2.mixer: head_dim 8 of 2 heads",
        ),
    ],
    ids=str,
)
def test_what_has_no_place_there_is_refused_by_name(both, layer, options, message):
    layers = [dict(pattern) for pattern in both.ours.config.layers]
    layers[layer] |= options
    with pytest.raises(UserError, match=message):
        OLMO_HYBRID.write_config(MemLMConfig(hidden_size=32, layers=layers))


def test_both_kinds_of_layer_are_needed(both):
    for layer, missing in ((0, "attention"), (1, "Gated DeltaNet")):
        config = MemLMConfig(hidden_size=32, layers=[both.ours.config.layers[layer]])
        with pytest.raises(UserError, match=f"a model without {missing} has no place"):
            OLMO_HYBRID.write_config(config)
