"""Qwen3.5, dense and with experts: text models both ways, the language part of those that see."""

import pytest
import torch
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)

from memlm import MemLMConfig, MemLMForCausalLM, UserError
from memlm.models.convert import main as convert
from memlm.models.interop import ARCHITECTURES
from tests.models.interop.hybrid_tools import (
    EXPERTS,
    QWEN_HEADS,
    SIZES,
    VISION,
    WIDTH,
    assert_same_weights,
    check_generation,
    check_logits,
    check_round_trip,
    count_parameters,
    pair,
    with_weights,
    written_back,
)
from tests.models.interop.tools import read_tensors

TEXT = {**SIZES, **QWEN_HEADS}
# Positions of pictures: numbers of frequencies that time, height and width turn.
PICTURES = {
    "rope_parameters": {
        **QWEN_HEADS["rope_parameters"],
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
}


def build_text():
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TEXT, **WIDTH))


def build_text_experts():
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**TEXT, **EXPERTS))


def build_seeing(**options):
    text = TEXT | WIDTH | PICTURES | options
    tied = text["tie_word_embeddings"]
    config = Qwen3_5Config(text_config=text, vision_config=VISION, tie_word_embeddings=tied)
    return Qwen3_5ForConditionalGeneration(config)


def build_seeing_experts():
    config = Qwen3_5MoeConfig(text_config=TEXT | EXPERTS | PICTURES, vision_config=VISION)
    return Qwen3_5MoeForConditionalGeneration(config)


BUILDERS = {
    "qwen3_5_text": build_text,
    "qwen3_5_moe_text": build_text_experts,
    "qwen3_5": build_seeing,
    "qwen3_5_moe": build_seeing_experts,
}
CLASSES = {
    "qwen3_5_text": Qwen3_5ForCausalLM,
    "qwen3_5_moe_text": Qwen3_5MoeForCausalLM,
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return {
        name: pair(builder(), tmp_path_factory.mktemp(name)) for name, builder in BUILDERS.items()
    }


@pytest.mark.parametrize("name", BUILDERS)
def test_logits(pairs, name):
    check_logits(pairs[name])


@pytest.mark.parametrize("name", BUILDERS)
def test_generation(pairs, name):
    check_generation(pairs[name])


@pytest.mark.parametrize("name", CLASSES)
def test_round_trip(pairs, name, tmp_path):
    again = written_back(pairs[name], name, tmp_path)
    check_round_trip(pairs[name], again, CLASSES[name])


@pytest.mark.parametrize("name", CLASSES)
def test_what_was_read_of_a_model_that_sees_is_written_as_a_text_model(pairs, name, tmp_path):
    both = pairs[name.removesuffix("_text")]
    again = written_back(both, name, tmp_path)
    text = {
        key.replace("model.language_model.", "model."): tensor
        for key, tensor in read_tensors(both.folder).items()
        if not key.startswith("model.visual.")
    }
    check_round_trip(both, again, CLASSES[name], text, same_class=False)


def test_the_tower_and_what_predicts_further_tokens_are_left_out_and_listed(
    pairs, tmp_path, capsys
):
    both = pairs["qwen3_5"]
    more = read_tensors(both.folder) | {"mtp.norm.weight": torch.ones(3)}
    folder = with_weights(both.folder, more, tmp_path / "more")
    assert_same_weights(MemLMForCausalLM.from_pretrained(folder), both.ours)
    assert convert([str(folder), str(tmp_path / "new"), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "dropped: mtp.norm.weight" in printed
    assert "dropped: model.visual.patch_embed.proj.weight" in printed


def test_experts_in_one_tensor_as_published(pairs, tmp_path):
    both = pairs["qwen3_5_moe"]
    kept = {name: t for name, t in read_tensors(both.folder).items() if ".experts." not in name}
    inside = both.theirs.state_dict()
    stacks = {name: inside[name] for name in inside if ".mlp.experts." in name}
    assert any(name.endswith(".experts.gate_up_proj") for name in stacks)
    folder = with_weights(both.folder, kept | stacks, tmp_path / "fused")
    assert_same_weights(MemLMForCausalLM.from_pretrained(folder), both.ours)


def test_tied_embeddings(tmp_path):
    both = pair(build_seeing(tie_word_embeddings=True), tmp_path / "original")
    assert both.ours.lm_head.weight is both.ours.model.embed_tokens.weight
    check_logits(both)


def published():
    """The config.json of the published dense models, in its spelling."""
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3584,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "output_gate_type": "swish",
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 248320,
    }
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 248057,
        "vision_config": {"model_type": "qwen3_5"},
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    }


def test_the_published_config():
    config = MemLMConfig.from_mapping(ARCHITECTURES["qwen3_5"].read_config(published()))
    assert [pattern["repeat"] for pattern in config.layers] == [3, 1] * 6
    attention = config.plan()[3].mixer[1]
    assert (attention.rope_theta, attention.rope_fraction) == (1e7, 0.25)
    assert attention.rope_scaling is None and attention.output_gate
    assert config.tie_word_embeddings and config.zero_centered_norm
    assert config.intermediate_size == 3584
    expected = count_parameters(
        Qwen3_5ForCausalLM, Qwen3_5TextConfig.from_dict(published()["text_config"])
    )
    assert count_parameters(MemLMForCausalLM, config) == expected


def test_stretched_positions_are_those_of_a_text():
    values = published()
    values["text_config"]["rope_parameters"] |= {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 262144,
    }
    config = MemLMConfig.from_mapping(ARCHITECTURES["qwen3_5"].read_config(values))
    scaling = config.plan()[3].mixer[1].rope_scaling
    assert scaling["rope_type"] == "yarn" and "mrope_section" not in scaling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_output_gate": False}, "qwen3_5_text: config.json has attn_output_gate False"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type 'sigmoid'"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers \[1\]"),
        ({"linear_rank": 4}, "linear_rank 4"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused_by_name(options, message):
    values = published()
    values["text_config"] |= options
    with pytest.raises(UserError, match=message):
        ARCHITECTURES["qwen3_5"].read_config(values)


def test_what_has_no_place_there_is_refused_by_name(pairs):
    dense, experts = (ARCHITECTURES[name] for name in CLASSES)
    with pytest.raises(UserError, match="layer 0.ffn: 'moe' has no place in a qwen3_5_text"):
        dense.write_config(pairs["qwen3_5_moe"].ours.config)
    with pytest.raises(UserError, match="layer 0.ffn: 'swiglu' has no place in a qwen3_5_moe"):
        experts.write_config(pairs["qwen3_5"].ours.config)
    layers = [dict(pattern) for pattern in pairs["qwen3_5_moe"].ours.config.layers]
    for pattern in layers:
        pattern["ffn"] = {**pattern["ffn"], "normalize_weights": False}
    config = MemLMConfig(hidden_size=32, zero_centered_norm=True, layers=layers)
    with pytest.raises(UserError, match="layer 0.ffn: normalize_weights False"):
        experts.write_config(config)


def test_models_that_see_are_not_written(pairs, tmp_path, capsys):
    pairs["qwen3_5"].ours.save_pretrained(tmp_path / "ours")
    assert convert([str(tmp_path / "ours"), str(tmp_path / "new"), "--to", "qwen3_5"]) == 2
    assert "qwen3_5_text" in capsys.readouterr().err
