"""Llama, Mistral and Qwen3 of transformers give the same numbers here, and go back bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.errors import UserError
from memlm.models.convert import main
from memlm.models.interop import ARCHITECTURES
from tests.models.interop.tools import check_same, perturbed, same_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, rms_norm_eps=1e-5, rope_parameters=LLAMA3),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, head_dim=12),
    "mistral": MistralConfig(**SIZES, sliding_window=6),
    "mistral full": MistralConfig(**SIZES, sliding_window=None, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "qwen3 windows": Qwen3Config(
        **SIZES | {"num_hidden_layers": 3},
        head_dim=8,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory) -> tuple[PreTrainedModel, Path]:
    """A model of transformers, and the folder that it wrote itself to."""
    torch.manual_seed(0)
    model = perturbed(AutoModelForCausalLM.from_config(CONFIGS[request.param]))
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    model.save_pretrained(folder)
    return model, folder


def test_the_same_logits_loss_and_generated_tokens(saved):
    theirs, folder = saved
    ours = MemLMForCausalLM.from_pretrained(folder)
    assert type(ours) is MemLMForCausalLM and ours.config.model_type == "memlm"
    check_same(ours, theirs, torch.randint(50, (3, 40)))


@torch.no_grad()
def test_the_same_hidden_states_the_last_behind_the_norm(saved):
    theirs, folder = saved
    ours = MemLMForCausalLM.from_pretrained(folder)
    ids = torch.randint(50, (2, 9))
    found, expected = (model(ids, output_hidden_states=True) for model in (ours, theirs))
    assert len(found.hidden_states) == len(expected.hidden_states) == len(ours.model.layers) + 1
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, atol=2e-5, rtol=2e-5)
    assert torch.equal(ours.lm_head(found.hidden_states[-1]), found.logits)


def test_a_model_comes_back_bit_by_bit_and_computes_the_same(saved, tmp_path):
    theirs, folder = saved
    model_type = theirs.config.model_type
    assert main([str(folder), str(tmp_path / "ours")]) == 0
    assert main([str(tmp_path / "ours"), str(tmp_path / "back"), "--to", model_type]) == 0
    assert same_tensors(tmp_path / "back", folder)
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(back) is type(theirs)
    assert not any(info.values())
    ids = torch.randint(50, (2, 40))
    assert torch.equal(back(ids).logits, theirs(ids).logits)
    # What generation stops at is kept, though a config of ours names one token.
    assert back.generation_config.eos_token_id == [2, 3]


def test_a_converted_folder_and_a_model_loaded_directly_are_the_same(saved, tmp_path):
    _, folder = saved
    assert main([str(folder), str(tmp_path / "ours")]) == 0
    MemLMForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "direct")
    assert same_tensors(tmp_path / "ours", tmp_path / "direct")
    written, direct = (
        MemLMConfig.from_pretrained(tmp_path / name).to_dict() for name in ("ours", "direct")
    )
    assert written == direct


def read(model_type: str, **values: Any) -> MemLMConfig:
    """A config of ours from a config.json as it may have been published."""
    defaults = {"model_type": model_type, **SIZES, "eos_token_id": 2}
    return MemLMConfig.from_mapping(ARCHITECTURES[model_type].read_config(defaults | values))


def test_files_of_older_versions_spell_stretched_positions_otherwise():
    scaling = {"type": "linear", "factor": 2.0}
    older = read("llama", rope_theta=5e5, rope_scaling=scaling)
    newer = read("llama", rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0})
    assert older.layers == newer.layers
    assert older.layers[0]["mixer"]["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    scaling = {"type": "yarn", "factor": 4.0, "finetuned": True, "beta_fast": None}
    yarn = read("mistral", rope_scaling=scaling).layers[0]["mixer"]["rope_scaling"]
    assert (yarn["rope_type"], yarn["factor"]) == ("yarn", 4.0)
    assert not {"finetuned", "beta_fast", "type"} & yarn.keys()


def test_what_is_left_out_of_a_config_json_is_what_transformers_takes():
    mixer = read("mistral").layers[0]["mixer"]
    assert mixer["type"] == "sliding_attention" and mixer["window"] == 4096
    assert read("qwen3").layers[0]["mixer"]["head_dim"] == 128


def test_keys_without_a_part_in_the_computation_are_passed_over():
    published = {
        "architectures": ["LlamaForCausalLM"],
        "_name_or_path": "someone/model",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.0",
        "pretraining_tp": 2,
        "pruned_heads": {},
        "tokenizer_class": "LlamaTokenizer",
        "_attn_implementation_autoset": True,
        "use_bfloat16": True,
        "use_cache": True,
        "max_sequence_length": 2048,
        "rope_interleaved": False,
        "quantization_config": None,
        "pad_token_id": -1,
        "temperature": 0.6,
    }
    assert read("llama", **published).pad_token_id is None


@pytest.mark.parametrize(
    ("model_type", "values", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"partial_rotary_factor": 0.5}, "all channels"),
        ("llama", {"residual_multiplier": 2.0}, "residual_multiplier 2.0"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"hidden_size": "wide"}, "'hidden_size' expected int"),
        ("llama", {"num_attention_heads": 0}, "config.json is not valid"),
        ("qwen3", {"num_hidden_layers": 10**12}, "it must be from 1 to 10000"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("qwen3", {"layer_types": ["linear_attention"] * 2}, "linear_attention"),
    ],
)
def test_what_would_change_the_computation_is_refused(model_type, values, named):
    with pytest.raises(UserError, match=named):
        read(model_type, **values)


ATTENTION = {"type": "attention", "num_heads": 2}


@pytest.mark.parametrize(
    ("model_type", "values", "named"),
    [
        ("llama", {"layers": [{"mixer": "gated_delta", "ffn": "swiglu"}]}, "layer 0.mixer"),
        (
            "llama",
            {"layers": [{"mixer": ATTENTION, "memory": "gated_delta", "ffn": "swiglu"}]},
            "layer 0.memory: 'gated_delta'",
        ),
        (
            "llama",
            {"layers": [{"mixer": ATTENTION, "ffn": "swiglu", "norm": "post"}]},
            "layer 0.norm: 'post'",
        ),
        ("llama", {"layers": [{"mixer": ATTENTION}]}, "layer 0.ffn: None"),
        (
            "llama",
            {"layers": [{"mixer": ATTENTION | {"window": 4}, "ffn": "swiglu"}]},
            "layer 0.mixer: window 4",
        ),
        (
            "llama",
            {"layers": [{"mixer": ATTENTION | {"rope": False}, "ffn": "swiglu"}]},
            "without rotary positions",
        ),
        (
            "llama",
            {"layers": [{"mixer": ATTENTION | {"qkv_bias": True}, "ffn": "swiglu"}]},
            "qkv_bias True with output_bias False",
        ),
        (
            "llama",
            {
                "layers": [
                    {"mixer": ATTENTION, "ffn": "swiglu"},
                    {"mixer": {"type": "attention", "num_heads": 4}, "ffn": "swiglu"},
                ]
            },
            "layer 1.mixer: num_heads 4 beside 2 of layer 0",
        ),
        (
            "llama",
            {
                "layers": [
                    {"mixer": ATTENTION, "ffn": "swiglu"},
                    {"mixer": ATTENTION, "ffn": {"type": "swiglu", "intermediate_size": 9}},
                ]
            },
            "layer 1.ffn",
        ),
        ("llama", {"output": "neural_cache"}, "output"),
        ("llama", {"zero_centered_norm": True}, "zero_centered_norm"),
        ("qwen3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: a bound of the log"),
        (
            "mistral",
            {"layers": [{"mixer": ATTENTION | {"qk_norm": True}, "ffn": "swiglu"}]},
            "layer 0.mixer: qk_norm True has no place in a mistral model",
        ),
        ("qwen3", {}, "qk_norm False"),
        (
            "qwen3",
            {
                "layers": [
                    {"mixer": ATTENTION | {"qk_norm": True, "window": window}, "ffn": "swiglu"}
                    for window in (4, 5)
                ]
            },
            "a window of 5 beside one of 4",
        ),
    ],
)
def test_what_the_other_side_cannot_hold_is_refused_by_name(model_type, values, named):
    with pytest.raises(UserError, match=named):
        ARCHITECTURES[model_type].write_config(MemLMConfig(hidden_size=32, **values))


def test_a_model_of_ours_without_a_limit_of_length_is_written():
    layers = [{"mixer": {"type": "attention", "num_heads": 2}, "ffn": "swiglu"}]
    written = ARCHITECTURES["llama"].write_config(MemLMConfig(hidden_size=32, layers=layers))
    assert LlamaConfig.from_dict(written).num_attention_heads == 2
